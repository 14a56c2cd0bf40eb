"""Bytes to pixels: every format, every EXIF orientation, every kind of damage."""

from __future__ import annotations

import io

import numpy as np
import pytest
from pictures import jpeg
from PIL import Image, ImageOps

from wasteddp.data.decoding import decode as decoding
from wasteddp.data.decoding.decode import (
    UndecodableError,
    decode_gray,
    decode_rgb,
    encode_jpeg,
    is_plain_jpeg,
    reencode,
    size_px,
)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_image(width: int = 60, height: int = 44) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(3, size=(width, height))))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_turns_it(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(make_image(), "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), float)
    pixels = decode_rgb(data)
    assert pixels.shape[:2] == size_px(data) == expected.shape[:2]
    assert np.abs(pixels - expected).mean() < 1
    assert is_plain_jpeg(data) == (turn == 1)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "L"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
    ],
)
def test_formats_and_colour_modes_become_rgb(kind: str, mode: str) -> None:
    source = make_image()
    pixels = decode_rgb(saved(source.convert(mode), kind))
    expected = np.asarray(source.convert("L" if mode == "L" else "RGB").convert("RGB"), float)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (44, 60, 3)
    assert np.abs(pixels - expected).mean() < 16  # a palette of 216 fixed colours loses most


def test_sixteen_bit_grey_is_scaled_not_clipped_and_transparency_is_white() -> None:
    levels = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    assert np.abs(decode_rgb(saved(Image.fromarray(levels), "PNG"))[:, :, 0] - levels / 257).max() <= 1
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_rgb(saved(clear, "PNG")).min() == 255


def test_a_large_jpeg_may_come_back_smaller_but_not_below_what_was_asked() -> None:
    pixels = decode_rgb(jpeg(1, size=(800, 600)), min_height_px=100, min_width_px=100)
    assert 100 <= pixels.shape[0] < 600
    assert 100 <= pixels.shape[1] < 800


@pytest.mark.parametrize(
    "decode", [decode_rgb, lambda data: decode_gray(data, min_side_px=64, is_plain=data[:2] == b"\xff\xd8")]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_images_are_refused_by_the_full_decode_and_by_the_cheap_proof(decode: object, kind: str) -> None:
    data = saved(make_image(300, 200), kind)
    for cut in (len(data) // 2, len(data) - 200):
        with pytest.raises(UndecodableError) as refused:
            decode(data[:cut])  # type: ignore[operator]
        assert refused.value.reason == "truncated"


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"no image", "unreadable"), (b"\xff\xd8\xff\xe0 nothing", "unreadable")]
)
def test_data_that_is_not_an_image_has_a_reason(data: bytes, reason: str) -> None:
    for function in (size_px, decode_rgb):
        with pytest.raises(UndecodableError) as refused:
            function(data)
        assert refused.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_any_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(make_image(), kind)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 60 * 44 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UndecodableError, match=r"too_large: 60x44 px; the limit is 2,639 pixels"):
        decode_rgb(data)


def test_grey_pixels_of_a_jpeg_are_small_but_not_too_small() -> None:
    grey = decode_gray(jpeg(1, size=(512, 384)), min_side_px=64, is_plain=True)
    assert grey.ndim == 2
    assert 64 <= min(grey.shape) < 384


def test_reencoding_shrinks_never_enlarges_and_is_deterministic() -> None:
    data = saved(make_image(300, 200), "PNG")
    small = reencode(data, max_side_px=150, quality=95)
    assert size_px(small) == (100, 150)
    assert small == reencode(data, max_side_px=150, quality=95)
    assert size_px(reencode(data, max_side_px=1000, quality=95)) == (200, 300)
    assert size_px(reencode(data, max_side_px=None, quality=95)) == (200, 300)
    assert is_plain_jpeg(encode_jpeg(decode_rgb(data), quality=90))
