"""Image formats: which are opened with Pillow, faults of JPEG markers, and grey or colour of more than 8 bits."""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

with suppress(ImportError):  # the extra `phone`
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.MAX_IMAGE_PIXELS = None  # `decode` has a limit of its own
# A profile or XMP of some megabytes is not a bomb. The limit on all of them together, 64 MB, stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# The formats of photographs, by Pillow's names, and the suffixes of their files; the first one is given to new files.
# Pillow has forty more; one of them, EPS, is a program that Ghostscript would run. docs/inputs.md lists them for users.
# HEIC, HEIF and AVIF may have no decoder here. Their files are then left out as unreadable, not ignored.
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
    "HEIF": (".heic", ".heif"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
IN_WORDS = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF or HEIC"
Image.init()
_FORMATS: list[str] = [name for name in SUFFIXES_OF if name in Image.OPEN]
# Source: ISO/IEC 23008-12, brands of the ftyp box
_BRANDS = re.compile(rb"....ftyp.{0,64}?(avif|avis|heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)

_MISSING = {
    name: f"{known_as} has no decoder here: pip install 'wasteddp[phone]'"
    for name, known_as in (("HEIF", "HEIC"), ("AVIF", "AVIF"))
}

# Markers of a JPEG. Source: ISO/IEC 10918-1, table B.1
_START_OF_SCAN, _END_OF_IMAGE, _JFIF, _ADOBE = 0xDA, 0xD9, 0xE0, 0xEE
APP1, APP2 = 0xE1, 0xE2
_SEQUENTIAL = (0xC0, 0xC1)
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers of no length
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)  # a restart marker belongs to the scan
_MAX_GAP_BYTES = 64  # more could be a segment whose marker was damaged

# TIFF 6.0, sections 8 and 19
_BITS, _PHOTOMETRIC, _FORMAT, _MAX_VALUE, _MAX_VALUE_OF_TYPE = 258, 262, 339, 281, 341
_WHITE_IS_ZERO, _SIGNED, _FLOAT = 0, 2, 3
_PNG = b"\x89PNG\r\n\x1a\n"
_NEARLY_BLACK = 16  # of 256: 12 bits in 16


def _silence_libtiff() -> None:
    """Its messages go to stderr and do not name a file. Pillow's error, which follows, is reported with the name.

    If the library is not found (as on macOS), they are still printed.
    """
    with suppress(OSError, AttributeError, StopIteration):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        library = ctypes.CDLL(next(line.split(maxsplit=5)[5] for line in maps if "/libtiff" in line))
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(library, name)(None)


_silence_libtiff()


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it. Pillow's warnings are not printed: they name no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image


def missing_decoder(data: bytes) -> str:
    """Return what to install for a HEIC or AVIF; '' for other bytes, and where the decoder is installed."""
    brand = _BRANDS.match(data)
    name = "AVIF" if brand and brand[1].startswith(b"avi") else "HEIF"
    return _MISSING[name] if brand and name not in Image.OPEN else ""


def is_decoder_here_now(detail: str) -> bool:
    """Whether `detail` names a missing decoder, as `missing_decoder` does, that has been installed since."""
    return any(detail == missing and name in Image.OPEN for name, missing in _MISSING.items())


# --- JPEG markers -----------------------------------------------------------------------------------------------------


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def has_segment(data: bytes, marker: int, begins_with: bytes) -> bool:
    """Return whether a JPEG has such a segment before its pixels; 3 us, a third of the time of a byte search."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != _START_OF_SCAN:
        if data[position + 1] == marker and data.startswith(begins_with, position + 4):
            return True
        is_fill = data[position + 1] == 0xFF  # any number of these may precede a marker
        position += 1 if is_fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def repair_markers(data: bytes) -> bytes:
    """Return the JPEG without bytes between segments, and with a valid JFIF version, colour transform and scan range.

    These faults cost no pixel, and every viewer ignores them; after the repair a strict decoder can still prove that
    all pixels are there. The compressed pixels stay as they are. A JPEG without these faults is returned unchanged.
    """
    parts, position, is_sequential, has_jfif = [data[:2]], 2, False, False
    while found := _MARKER.search(data, position):
        marker, body = found[1][0], found.end()
        if found.start() - position > _MAX_GAP_BYTES:
            return data
        if marker == _END_OF_IMAGE:
            return b"".join([*parts, data[found.start() :]])
        if marker in _ALONE:
            parts.append(found[0])
            position = body
            continue
        position = body + int.from_bytes(data[body : body + 2], "big")
        segment = data[found.start() : position]
        is_sequential |= marker in _SEQUENTIAL
        if marker == _JFIF and data.startswith(b"JFIF\0", body + 2):
            has_jfif, version = True, len(found[0]) + 7
            segment = segment[:version] + b"\1" + segment[version + 1 :]
        elif marker == _ADOBE and not has_jfif and segment[-1:] not in (b"\0", b"\1", b"\2"):
            continue  # where JFIF states the colours, the transform is not used
        elif marker == _START_OF_SCAN:
            if is_sequential:
                segment = segment[:-3] + b"\x00\x3f\x00"
            after = _AFTER_SCAN.search(data, position)
            end = after.start() if after else len(data)
            segment += data[position:end]
            position = end
        parts.append(segment)
    return b"".join([*parts, data[position:]])


# --- more than 8 bits -------------------------------------------------------------------------------------------------


class UnknownRangeError(ValueError):
    """The file does not state which values are black and white."""


def to_eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Return a loaded image with 8 bits a channel. `data` is its file, or empty.

    The range is that of the type, or a depth that the file states. It is never that of one image's brightest pixel,
    which would make the brightness of an object depend on what is next to it.

    Raises:
        UnknownRangeError: the range is not stated, or the pixels contradict it.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(np.asarray(image), tags, data)
    if max(tags.get(_BITS, (8,))) > 8 or (image.format == "PNG" and data[24:25] > b"\x08"):
        # Pillow keeps the upper 8 of 16 bits
        stated, brightest = _stated_top(tags), int(np.asarray(image.convert("RGB")).max(initial=0))
        if (stated and stated < 65535) or brightest < _NEARLY_BLACK:
            raise UnknownRangeError(
                f"16-bit colour that uses only {f'0 to {stated:g}' if stated else 'a sixteenth'} of its range: "
                "it would be nearly black; convert it to 8 bits"
            )
    return image


def _grey(levels: npt.NDArray[Any], tags: Any, data: bytes) -> Image.Image:
    bits, kind = max(tags.get(_BITS, (16,))), max(tags.get(_FORMAT, (1,)))
    if kind == 1 and levels.dtype == np.int32:
        levels = levels.view(np.uint32)  # Pillow has no unsigned type of 32 bits
    name = f"{bits}-bit {'float' if kind == _FLOAT else 'grey'}"
    top = _stated_top(tags) or _top_of_png(levels, data)
    if top is None and bits > 16:
        raise UnknownRangeError(f"{name} states no range: black and white are not known; convert it to 8 or 16 bits")
    is_stated = top is not None or bits < 16
    top = top or float(2 ** (bits - (kind == _SIGNED)) - 1)
    low, high = float(levels.min(initial=0)), float(levels.max(initial=0))
    if not 0 <= low <= high <= top:  # also NaN
        raise UnknownRangeError(f"{name} has values from {low:g} to {high:g}, its range is 0 to {top:g}")
    if not is_stated and high < (top + 1) / _NEARLY_BLACK:
        raise UnknownRangeError(
            f"{name} with values up to {high:g} states no smaller range (TIFF MaxSampleValue, PNG sBIT): "
            "it would be nearly black; convert it to 8 bits"
        )
    shares = levels.astype(np.float64) / top
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray((shares * 255).round().astype(np.uint8))


def _stated_top(tags: Any) -> float | None:
    """Return the greatest value that a TIFF states, if it is that of a depth (4095), not of one image's pixels."""
    for tag in (_MAX_VALUE_OF_TYPE, _MAX_VALUE):
        value = tags.get(tag)
        top = float(max(value) if isinstance(value, tuple) else value or 0)
        if top > 0 and np.log2(top + 1).is_integer():
            return top
    return None


def _top_of_png(levels: npt.NDArray[Any], data: bytes) -> float | None:
    """Return the greatest value of a PNG that states how many of its 16 bits are used (sBIT), or None.

    The standard wants such values scaled up to 16 bits. Some cameras do not scale: then lower bits are used.
    """
    if not data.startswith(_PNG):
        return None
    position = len(_PNG)
    while position + 9 <= len(data) and (name := data[position + 4 : position + 8]) != b"IDAT":
        if name == b"sBIT":
            unused = 16 - data[position + 8]
            if not 0 < unused < 16:
                return None
            top = 2 ** (16 - unused) - 1
            is_scaled = int(levels.max(initial=0)) > top or not ((levels & (2**unused - 1)) > 1).any()
            return 65535.0 if is_scaled else float(top)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return None
