"""Bytes to pixels: every format, every EXIF orientation, every kind of damage."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import jpeg
from PIL import Image, ImageOps

from wasteddp.data.decoding import decode as decoding
from wasteddp.data.decoding import formats
from wasteddp.data.decoding.decode import (
    UndecodableError,
    check_image,
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


JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


def deep_colour(levels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = np.repeat(levels[:, :, None], 3, axis=2).astype(">u2").tobytes()
    width = len(rows) // len(levels)
    lines = b"".join(b"\0" + rows[i : i + width] for i in range(0, len(rows), width))
    header = struct.pack(">IIBBBBB", levels.shape[1], len(levels), 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def make_image(width: int = 60, height: int = 44) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(3, size=(width, height))))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(turn: int, kind: str) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(make_image(), kind, quality=95, **{"tiffinfo" if kind == "TIFF" else "exif": exif})
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), float)
    pixels = decode_rgb(data)
    assert pixels.shape[:2] == size_px(data) == expected.shape[:2]
    assert np.abs(pixels - expected).mean() < 1
    assert is_plain_jpeg(data) == (turn == 1 and kind == "JPEG")
    line = saved(Image.new("RGB", (40, 1)), kind, **{"tiffinfo" if kind == "TIFF" else "exif": exif})
    assert min(decode_rgb(line).strides) > 0  # torch takes no others


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


RAMP = np.linspace(0, 4095, 64 * 64).round().reshape(64, 64)  # 12 bits
FLOAT_MAX, MAX, WHITE_IS_ZERO = 341, 281, 262  # TIFF tags


def png_of_depth(levels: np.ndarray, bits: int) -> bytes:
    """A 16-bit PNG that states how many bits are used."""
    data = saved(Image.fromarray(levels.astype(np.uint16)), "PNG")
    chunk = b"sBIT" + bytes([bits])
    return data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray((RAMP * 16).astype(np.uint16)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", tiffinfo={MAX: 4095}),
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF", tiffinfo={MAX: 4095}),
        saved(Image.fromarray((RAMP / 4095).astype(np.float32)), "TIFF", tiffinfo={FLOAT_MAX: 1.0}),
        saved(Image.fromarray((65535 - RAMP * 16).astype(np.uint16)), "TIFF", tiffinfo={WHITE_IS_ZERO: 0}),
        b"P5 64 64 4095\n" + RAMP.astype(">u2").tobytes(),
        png_of_depth(RAMP, 12),
        png_of_depth(RAMP * 16, 12),
    ],
    ids=["type", "12 in 16", "12 in 32", "float", "white is zero", "pgm", "sBIT as it is", "sBIT scaled"],
)
def test_deep_grey_is_scaled_by_its_type_or_stated_depth(data: bytes) -> None:
    for levels in (decode_rgb(data)[:, :, 0], check_image(data).grey):
        assert np.abs(levels - RAMP / 4095 * 255).max() <= 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (saved(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), "16-bit grey with values up to 4095 states no smaller"),
        (saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", tiffinfo={MAX: 3900}), "nearly black"),
        (saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit grey states no range"),
        (saved(Image.fromarray((RAMP / 4095).astype(np.float32)), "TIFF"), "32-bit float states no range"),
        (
            saved(Image.fromarray((RAMP * np.nan).astype(np.float32)), "TIFF", tiffinfo={FLOAT_MAX: 1.0}),
            "values from nan",
        ),
        (saved(Image.fromarray((RAMP * 16).astype(np.uint16)), "TIFF", tiffinfo={MAX: 4095}), "its range is 0 to 4095"),
        (deep_colour(RAMP), "16-bit colour"),
    ],
)
def test_deep_pixels_of_an_unknown_range_are_refused(data: bytes, why: str) -> None:
    for function in (decode_rgb, check_image):
        with pytest.raises(UndecodableError, match=why) as refused:
            function(data)
        assert refused.value.reason == "unknown_range"


def test_deep_grey_that_lies_on_its_side_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)[:4]
    pixels = decode_rgb(saved(Image.fromarray(levels), "PNG", exif=exif))
    assert (pixels[:, :, 0] == np.rot90(np.round(levels / 257), -1)).all()


def with_sampling(*factors: int) -> bytes:
    """A mid-grey colour JPEG of 48 x 32 px with these sampling factors (0x21: twice across, once down)."""
    head = saved(Image.new("RGB", (48, 32)), "JPEG", subsampling=0)
    scan = head.index(b"\xff\xda") + 2
    head = bytearray(head[: scan + int.from_bytes(head[scan : scan + 2], "big")])
    for place, factor in enumerate(factors):
        head[head.index(b"\xff\xc0") + 11 + 3 * place] = factor
    across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    # Huffman codes of the standard tables: no difference, then the end of the block
    unit = "".join(code * (f >> 4) * (f & 15) for code, f in zip(("001010", "0000", "0000"), factors, strict=True))
    bits = unit * (-(-48 // (8 * across)) * -(-32 // (8 * down)))
    bits += "1" * (-len(bits) % 8)
    return bytes(head) + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"


def faulty(kind: str, data: bytes) -> bytes:
    scan = data.index(b"\xff\xda")
    return {
        "bytes before a marker": data[:20] + b"\0\x41\0" + data[20:],
        "scan range": data[: scan + 11] + b"\0\0\0" + data[scan + 14 :],
        "JFIF version": data[:11] + b"\2" + data[12:],
        "colour transform": data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7" + data[20:],
    }[kind]


@pytest.mark.parametrize("kind", ["bytes before a marker", "scan range", "JFIF version", "colour transform"])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_jpeg_with_faulty_markers_has_the_pixels_of_the_sound_one(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    sound = jpeg(1, size=(300, 200), exif=exif)
    if not sound.startswith(JFIF[:11], 2):
        sound = sound[:2] + JFIF + sound[2:]
    data = faulty(kind, sound)
    assert (decode_rgb(data) == decode_rgb(sound)).all()
    checked = check_image(data)
    assert (checked.height, checked.width) == size_px(data) == decode_rgb(sound).shape[:2]
    assert checked.is_tolerated
    assert not checked.is_plain
    assert not check_image(sound).is_tolerated
    for cut in (len(data) // 2, len(data) - 200):
        for function in (decode_rgb, check_image):
            with pytest.raises(UndecodableError, match="truncated"):
                function(data[:cut])


@pytest.mark.parametrize("factors", [(0x31, 0x11, 0x11), (0x22, 0x21, 0x11), (0x11, 0x22, 0x22), (0x42, 0x11, 0x11)])
def test_a_jpeg_of_any_sampling_is_read_where_it_is_whole(factors: tuple[int, ...]) -> None:
    data = with_sampling(*factors)
    assert (decode_rgb(data) == np.full((32, 48, 3), 128)).all()
    assert check_image(data).is_tolerated
    with pytest.raises(UndecodableError):
        decode_rgb(data[:-4])


def test_a_png_with_a_large_profile_is_read() -> None:
    data = saved(make_image(), "PNG", icc_profile=bytes(3_000_000))
    assert decode_rgb(data).shape == (44, 60, 3)


@pytest.mark.parametrize(("brand", "name"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")])
def test_an_image_of_a_phone_without_a_decoder_names_the_extra(
    brand: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, None))
    assert formats.missing_decoder(data) == "", "it is damaged"
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(formats, "_FORMATS", ["JPEG"])
    with pytest.raises(UndecodableError, match=rf"{name} has no decoder here: pip install 'wasteddp\[phone\]'"):
        size_px(data)


def test_a_heic_is_read_where_its_decoder_is_installed() -> None:
    pytest.importorskip("pillow_heif")
    data = saved(make_image(64, 48), "HEIF", quality=95)
    assert size_px(data) == (48, 64)
    assert np.abs(decode_rgb(data).astype(int) - np.asarray(make_image(64, 48))).mean() < 8


def test_messages_of_libtiff_stay_out_of_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(saved(make_image(), "TIFF", compression="tiff_lzw"))
    data[200:260] = b"\xff" * 60
    with pytest.raises(UndecodableError):
        decode_rgb(bytes(data))
    assert capfd.readouterr().err == ""


def test_a_large_jpeg_may_come_back_smaller_but_not_below_what_was_asked() -> None:
    pixels = decode_rgb(jpeg(1, size=(800, 600)), min_height_px=100, min_width_px=100)
    assert 100 <= pixels.shape[0] < 600
    assert 100 <= pixels.shape[1] < 800


@pytest.mark.parametrize("decode", [decode_rgb, check_image])
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
    grey = check_image(jpeg(1, size=(512, 384))).grey
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
