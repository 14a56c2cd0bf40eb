"""The images in the bodies of requests, in memory alone."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

_FIELDS = 64  # parts of a form that are not files


class BodyError(ValueError):
    """The body is not what its type says."""


class TooManyError(ValueError):
    """The body has more files or fields than are read."""


def images_of(content_type: str, body: bytes, *, most: int) -> list[tuple[str, bytes]]:
    """Return (name, bytes) of each file in a multipart body; of another type, the body itself with the name "".

    Args:
        most: files that are read. Half a million empty ones would take 5 s.

    Raises:
        BodyError: a multipart body is damaged, or has no file.
        TooManyError: it has more than `most` files, or many other fields.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return [("", body)]
    if not options.get(b"boundary"):
        raise BodyError("the multipart body has no boundary")
    parts = _Parts(most)
    try:
        parser = MultipartParser(options[b"boundary"], callbacks=parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BodyError(f"the multipart body is damaged: {error}") from error
    if not parts.is_ended:
        raise BodyError("the multipart body is cut")
    if not parts.files:
        raise BodyError("the multipart body has no file; send each image as a part with a filename")
    return parts.files


class _Parts:
    def __init__(self, most: int) -> None:
        self.files = list[tuple[str, bytes]]()
        self.is_ended = False
        self._most, self._num_left = most, most + _FIELDS
        self._field, self._value, self._disposition = b"", b"", b""
        self._data = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def _begin(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise TooManyError
        self._field, self._value, self._disposition = b"", b"", b""
        self._data = bytearray()

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" in options:
            if len(self.files) == self._most:
                raise TooManyError
            self.files.append((options[b"filename"].decode(errors="replace"), bytes(self._data)))

    def _end_all(self) -> None:
        self.is_ended = True
