"""The formats that Pillow opens for this package, and how it is set up for that."""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, PngImagePlugin

with suppress(ImportError):  # the extra `phone`
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.MAX_IMAGE_PIXELS = None  # `decode` has a limit of its own
# A profile or XMP of some megabytes is no bomb. The limit on all of them together, 64 MB, stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What photographs come in. Pillow knows forty formats more; one of them, EPS, is a program that Ghostscript would run.
Image.init()
_FORMATS: list[str] = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
    if name in Image.OPEN
]
# Source: ISO/IEC 23008-12, brands of the ftyp box
_BRANDS = re.compile(rb"....ftyp.{0,64}?(avif|avis|heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)

_MISSING = {
    name: f"{known_as} has no decoder here: pip install 'wasteddp[phone]'"
    for name, known_as in (("HEIF", "HEIC"), ("AVIF", "AVIF"))
}


def _silence_libtiff() -> None:
    """Its messages go to stderr without the name of a file. Pillow's error, which follows, is reported with the name.

    Where the library is not found (not on Linux), they stay.
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
    """Return what to install for a HEIC or AVIF that Pillow does not identify; '' for other bytes."""
    brand = _BRANDS.match(data)
    return "" if brand is None else _MISSING["AVIF" if brand[1].startswith(b"avi") else "HEIF"]


def is_decoder_here_now(detail: str) -> bool:
    """Whether `detail` names a missing decoder, as `missing_decoder` does, that has been installed since."""
    return any(detail == missing and name in Image.OPEN for name, missing in _MISSING.items())
