"""Bytes of an image file -> RGB array, and RGB array -> JPEG. All calls of decoders on the CPU are here; no torch.

Legend: H W are pixels of the upright image, after its EXIF orientation.

libjpeg-turbo (simplejpeg) decodes JPEG: 260 us for 512x384 on one core, compared with 600-900 us in Pillow. It decodes
faster at 1/2, 1/4 and 1/8 of the size; its other scales take longer than the whole image (5/8 takes 610 us, 7/8 takes
990). Pillow decodes CMYK JPEG and all other formats.

Images that cannot be stored in a shard unchanged are encoded as JPEG again. The same pixels give the same bytes.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from wasteddp.data.decoding.formats import (
    APP1,
    APP2,
    UnknownRangeError,
    has_segment,
    is_jpeg,
    missing_decoder,
    open_image,
    repair_markers,
    to_eight_bits,
)

ImageHWC = npt.NDArray[np.uint8]
GreyHW = npt.NDArray[np.uint8]

# 178 million pixels are half a gigabyte of RGB. As in Pillow, twice its default of 89 million is a decompression bomb.
MAX_PIXELS = 178_956_970  # checked on the header, before any pixel is decoded

MAX_JPEG_SIDE_PX = 65_500  # of libjpeg

_ORIENTATION_TAG = 0x0112
_UPRIGHT = 1
DEFAULT_QUALITY = 95
_decoded = threading.local()


class Header(NamedTuple):
    """The contents of an image's header: the size of the upright image, and its EXIF orientation."""

    height: int
    width: int
    turn: int


class Encoded(NamedTuple):
    """A plain JPEG to decode on the device, and the crop to take from it: top, left, height, width, px."""

    data: bytes
    box: tuple[int, int, int, int]


class UndecodableError(ValueError):
    """The bytes are not an image that can be decoded. `reason` is one of `manifest.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG, 1 (upright) to 8; 1 if it has none."""
    if not has_segment(data, APP1, b"Exif\x00\x00"):
        return _UPRIGHT
    try:
        with open_image(data) as image:
            return _turn_of(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return _UPRIGHT


def _turn_of(image: Image.Image) -> int:
    value: int = image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
    return value if value in range(1, 9) else _UPRIGHT


def header(data: bytes) -> Header:
    """Return size and orientation, without decoding pixels; 5 us for a JPEG.

    Raises:
        UndecodableError: the data is empty, not an image, or has more than `MAX_PIXELS`.
    """
    if not data:
        raise UndecodableError("empty", "the file has 0 bytes")
    try:
        if is_jpeg(data):
            height, width, turn = _jpeg_header(data)
        else:
            with open_image(data) as image:
                tags: Any = getattr(image, "tag_v2", {})  # of a TIFF: Pillow's size may be that of the upright image
                width, height = tags.get(256, image.width), tags.get(257, image.height)
                # Reading the EXIF block of a PNG decodes the whole image, so a bomb must be found before that.
                fits = height * width <= MAX_PIXELS
                turn = _turn_of(image) if fits else _UPRIGHT
    except Exception as error:
        raise _undecodable(error, data) from error
    if height * width > MAX_PIXELS:
        raise UndecodableError("too_large", f"{width}x{height} px; the limit is {MAX_PIXELS:,} pixels")
    return Header(width, height, turn) if turn >= 5 else Header(height, width, turn)  # 5 to 8 are rotated by 90 degrees


def _jpeg_header(data: bytes) -> Header:
    """Size as stored, and orientation."""
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
    except ValueError as error:
        data = repair_markers(data)
        try:
            with open_image(data) as image:
                width, height = image.size
        except Exception:
            raise error from None
    return Header(height, width, orientation(data))


def size_px(data: bytes) -> tuple[int, int]:
    """Return (H, W) of the upright image; see `header`."""
    return header(data)[:2]


def decode_rgb(
    data: bytes,
    *,
    known: Header | None = None,
    min_height_px: int = 0,
    min_width_px: int = 0,
    is_fast: bool = False,
) -> ImageHWC:
    """Return upright RGB pixels, uint8 [H, W, 3].

    Args:
        data: the image file.
        known: the result of `header`, if it is known already.
        min_height_px: with `min_width_px`, allows decoding a JPEG at a half, a quarter or an eighth of its size, as
            long as both sides of the upright image have at least these lengths. 0: full size.
        min_width_px: see `min_height_px`.
        is_fast: repeat a JPEG's colour, if it is stored at half resolution, instead of interpolating it.

    Raises:
        UndecodableError: the data is empty, truncated, not an image, has more than `MAX_PIXELS`, or an unknown range
            of values.
    """
    *size, turn = known or header(data)  # refuses bombs before memory is allocated
    is_faulty = False
    if is_jpeg(data):
        height, width = _scaled_size(size[0], size[1], min_height_px, min_width_px)
        if turn >= 5:
            height, width = width, height
        try:
            pixels = _decode_jpeg(data, min_height=height, min_width=width, fastupsample=is_fast)
            return pixels if turn == _UPRIGHT else _turn(pixels, turn)
        except ValueError as error:
            if not any(word in str(error).lower() for word in ("cmyk", "colorspace", "subsampling")):
                raise _undecodable(error, data) from error
        is_faulty = _is_tolerated(data)
        data = repair_markers(data)
    pixels = _decode_with_pillow(data)
    if pixels.shape[:2] != tuple(size):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise UndecodableError("unreadable", f"{found} px, the header says {size[1]}x{size[0]}")
    _decoded.is_tolerated = is_faulty or getattr(_decoded, "is_tolerated", False)
    return pixels


def _decode_jpeg(data: bytes, **how: Any) -> npt.NDArray[np.uint8]:
    """Decode strictly: with a warning it is refused, unless repaired markers take the cause away."""
    try:
        return simplejpeg.decode_jpeg(data, strict=True, **how)  # type: ignore[no-any-return]
    except ValueError:
        repaired = repair_markers(data)
        if repaired == data:
            raise
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(repaired, strict=True, **how)
    _decoded.is_tolerated = True
    return pixels


def take_tolerated() -> bool:
    """Return whether this thread has decoded a JPEG with faults that cost no pixel since the last call."""
    was = getattr(_decoded, "is_tolerated", False)
    _decoded.is_tolerated = False
    return was


def _scaled_size(height: int, width: int, min_height_px: int, min_width_px: int) -> tuple[int, int]:
    """Return (H, W) at the smallest fast DCT scale that is large enough; (0, 0), for full size, without limits."""
    if not min_height_px and not min_width_px:
        return 0, 0
    for factor in (8, 4, 2):
        scaled = -(-height // factor), -(-width // factor)
        if scaled[0] >= min_height_px and scaled[1] >= min_width_px:
            return scaled
    return height, width


def is_plain_jpeg(data: bytes) -> bool:
    """Return whether every decoder shows this JPEG alike: upright; grey, YCbCr or RGB; one image (not MPO)."""
    if not is_jpeg(data) or has_segment(data, APP2, b"MPF\x00") or orientation(data) != _UPRIGHT:
        return False
    try:
        return simplejpeg.decode_jpeg_header(data)[2] in ("Gray", "YCbCr", "RGB")
    except ValueError:
        return False


class Checked(NamedTuple):
    """What a scan keeps of an image that decodes whole."""

    height: int  # px, upright
    width: int
    grey: GreyHW  # of a plain JPEG at a reduced size
    is_plain: bool  # it can go into a shard unchanged
    is_tolerated: bool  # a JPEG with faults that cost no pixel


def check_image(data: bytes, *, min_side_px: int = 64) -> Checked:
    """Decode all of an image at the least cost, with grey pixels as the result (of a JPEG no side under `min_side_px`).

    All compressed bytes of a JPEG are decoded, including colour; only the inverse DCT is limited to grey and a fraction
    of the size. With random bit errors it refuses the same files as a full decode does (116 of 300), in half the time.

    Args:
        data: the image file.
        min_side_px: a JPEG may be decoded at a reduced size, as long as its sides have at least this length.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    known = header(data)
    if is_plain_jpeg(data):
        with suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="GRAY", min_height=min_side_px, min_width=min_side_px, strict=True
            )
            return Checked(known.height, known.width, pixels[:, :, 0], is_plain=True, is_tolerated=False)
    grey = np.asarray(Image.fromarray(decode_rgb(data, known=known)).convert("L"))
    return Checked(known.height, known.width, grey, is_plain=False, is_tolerated=_is_tolerated(data))


def _is_tolerated(data: bytes) -> bool:
    if not is_jpeg(data):
        return False
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return True
    return repair_markers(data) != data


def _decode_with_pillow(data: bytes) -> ImageHWC:
    try:
        with open_image(data) as image:
            return _upright_rgb(image, data)
    except Exception as error:
        raise _undecodable(error, data) from error


def rgb_of(image: Image.Image) -> ImageHWC:
    """Return the upright RGB pixels of an image that Pillow opened, uint8 [H, W, 3].

    Raises:
        UndecodableError: it cannot be decoded, has more than `MAX_PIXELS`, or an unknown range of values.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError("too_large", f"{image.width}x{image.height} px; the limit is {MAX_PIXELS:,} pixels")
    if not image.width * image.height:
        raise UndecodableError("empty", f"{image.width}x{image.height} px")
    try:
        return _upright_rgb(image, b"")
    except Exception as error:
        raise _undecodable(error, b"") from error


def _upright_rgb(image: Image.Image, data: bytes) -> ImageHWC:
    image.load()
    pixels = np.array(_to_rgb(to_eight_bits(image, data)))  # a copy: Pillow's own memory is read-only
    turn = _turn_of(image)  # of a TIFF that Pillow turned when it was loaded: 1
    return pixels if turn == _UPRIGHT else _turn(pixels, turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: transparent parts become white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def _turn(pixels: ImageHWC, turn: int) -> ImageHWC:
    """Return upright pixels for EXIF orientation `turn` (2 to 8). Source: EXIF 2.32, table of tag 0x0112."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)  # 5: mirrored along the main diagonal
    vertical = turn in (3, 4, 7, 8)
    horizontal = turn in (2, 3, 6, 7)
    # numpy calls a side of 1 px contiguous whatever its stride, and torch takes no negative ones: always a copy
    return pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1].copy()


def _undecodable(error: Exception, data: bytes) -> UndecodableError:
    if isinstance(error, UnknownRangeError):
        return UndecodableError("unknown_range", str(error))
    if isinstance(error, UnidentifiedImageError) and (missing := missing_decoder(data)):
        return UndecodableError("unreadable", missing)
    if isinstance(error, UnidentifiedImageError) and (other := _other_content(data)):
        return UndecodableError("unreadable", other)
    text = str(error).lower()
    ran_out = any(word in text for word in ("truncated", "premature", "eof", "end of file"))
    return UndecodableError("truncated" if ran_out else "unreadable", _first_line(error))


def _other_content(data: bytes) -> str:
    """Return what a download left in the place of an image; "" if it is not known."""
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of Git LFS, not the image: git lfs pull"
    if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    return ""


def _first_line(error: Any) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", line)  # an address would differ from run to run


def encode_jpeg(pixels_HWC: ImageHWC, *, quality: int) -> bytes:
    """Encode with full colour resolution (4:4:4): subsampling would blur the edges of small coloured objects."""
    encoded: bytes = simplejpeg.encode_jpeg(pixels_HWC, quality=quality, colorspace="RGB", colorsubsampling="444")
    return encoded


def reencode(data: bytes, *, max_side_px: int | None, quality: int) -> bytes:
    """Return any image as an upright RGB JPEG with sides of at most `max_side_px`; images are never enlarged.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    height, width = size_px(data)
    scale = min(1.0, (max_side_px or height + width) / max(height, width))
    target_height, target_width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = decode_rgb(data, min_height_px=target_height, min_width_px=target_width)
    if pixels.shape[:2] != (target_height, target_width):
        shrunk = Image.fromarray(pixels).resize((target_width, target_height), Image.Resampling.LANCZOS)
        pixels = np.asarray(shrunk)
    return encode_jpeg(np.ascontiguousarray(pixels), quality=quality)
