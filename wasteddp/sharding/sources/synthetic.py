"""Synthetic waste, drawn with Pillow: enough variety that learning it means something, and it needs no network.

Six kinds differ in shape and structure only. Size, pose, colour, background, light, clutter and noise are drawn from
the same distributions for all, so that a mean colour says little: the nearest class mean is right for 22 % of images,
chance for 17 %. An image is a function of (seed, kind, number).

Legend: S is the side of the canvas in px, twice that of the image; points are in [-1, 1] with the object's centre at 0.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from wasteddp.errors import SourceError, storage
from wasteddp.parallel import progress

Random = np.random.Generator
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


class _Pen:
    """Draws polygons and lines, in the object's own coordinates, on a transparent layer."""

    def __init__(self, side_px: int) -> None:
        self.layer = Image.new("RGBA", (side_px, side_px))
        self._draw = ImageDraw.Draw(self.layer, "RGBA")
        self._scale = side_px / 2

    def shape(self, points: Points, colour: Colour, alpha: int = 255) -> None:
        self._draw.polygon([self._px(p) for p in points], fill=(*colour, alpha))

    def line(self, points: Points, colour: Colour, width: float, alpha: int = 255) -> None:
        width_px = max(1, round(width * self._scale))
        self._draw.line([self._px(p) for p in points], fill=(*colour, alpha), width=width_px, joint="curve")

    def _px(self, point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] + 1) * self._scale, (point[1] + 1) * self._scale


def draw_image(kind: str, number: int, *, size_px: int, seed: int) -> bytes:
    """One JPEG of `size_px` squared."""
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    side = 2 * size_px
    scene = _background(rng, side)
    for _ in range(rng.integers(0, 4)):
        _put(scene, _clutter(rng, side // 4), rng, scale=rng.uniform(0.1, 0.35), reach=0.95)
    pen = _Pen(side)
    _SHAPES[kind](pen, rng, _colour(rng))
    _put(scene, pen.layer, rng, scale=rng.uniform(0.55, 0.95), reach=0.3)
    pixels = np.asarray(scene.reduce(2), dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(1, 7)
    lit = pixels * _light(rng, size_px)[:, :, None] + noise
    image = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(80, 95)))
    return buffer.getvalue()


def draw_folder(folder: Path, *, kinds: Sequence[str], images_per_class: int, size_px: int, seed: int) -> int:
    """Draws a folder of class folders; images that are there already stay. Returns how many there are.

    Raises:
        SourceError: a number out of its range.
    """
    if images_per_class < 1 or not 32 <= size_px <= 2048 or seed < 0:
        raise SourceError(
            f"{images_per_class} images per class of {size_px} px with seed {seed} cannot be drawn",
            "there would be no images",
            "give at least 1 image per class, a size of 32 to 2048 px, and a seed from 0",
        )
    with progress("drawing images", len(kinds) * images_per_class) as advance:
        for kind in kinds:
            with storage("making a folder for drawings", folder):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            for number in range(images_per_class):
                path = folder / kind / f"{kind}-{seed}-{size_px}-{number:05d}.jpg"
                if not path.exists():
                    with storage("writing a drawing", path):
                        temporary = path.with_suffix(".tmp")
                        temporary.write_bytes(draw_image(kind, number, size_px=size_px, seed=seed))
                        temporary.replace(path)
                advance()
    return len(kinds) * images_per_class


# --- kinds ------------------------------------------------------------------------------------------------------------


def _bottle(pen: _Pen, rng: Random, colour: Colour) -> None:
    body, neck = rng.uniform(0.2, 0.32), rng.uniform(0.07, 0.11)
    shoulder, collar = rng.uniform(-0.35, -0.1), rng.uniform(-0.7, -0.55)
    right = [(neck, -0.85), (neck, collar), (body * 0.85, shoulder - 0.05), (body, shoulder + 0.08), (body, 0.82)]
    right.append((body * 0.85, 0.9))
    pen.shape(_mirrored(right), colour, int(rng.integers(150, 256)))
    pen.line([(x * 0.75, y) for x, y in right[2:5]], _mix(colour, 255, 0.7), 0.05, 170)
    cap = _colour(rng)
    pen.shape([(-neck * 1.25, -0.95), (neck * 1.25, -0.95), (neck * 1.25, -0.8), (-neck * 1.25, -0.8)], cap)
    if rng.random() < 0.7:
        top, bottom = rng.uniform(0.05, 0.2), rng.uniform(0.4, 0.65)
        _band(pen, rng, body, top, bottom)


def _can(pen: _Pen, rng: Random, colour: Colour) -> None:
    width, height, tilt = rng.uniform(0.36, 0.46), rng.uniform(0.6, 0.78), rng.uniform(0.08, 0.16)
    dent = rng.uniform(0, 0.12) if rng.random() < 0.5 else 0.0
    side = [(-width, -height), (-width + dent, 0.05), (-width, height)]
    pen.shape([*side, *_ellipse(0, height, width, tilt, 0, math.pi)[::-1], *[(-x, y) for x, y in side[::-1]]], colour)
    for shade, left in ((0.45, -0.7), (0.25, 0.35)):
        x = width * left
        pen.shape([(x, -height), (x + 0.1, -height), (x + 0.1, height), (x, height)], _mix(colour, 255, shade), 150)
    _band(pen, rng, width - dent, -0.25, 0.3)
    metal = int(rng.integers(150, 220))
    pen.shape(_ellipse(0, -height, width, tilt), (metal, metal, metal))
    pen.shape(_ellipse(0, -height, width * 0.85, tilt * 0.8), (metal - 40, metal - 40, metal - 35))
    pen.shape(_ellipse(0.05, -height, width * 0.25, tilt * 0.35), (metal + 25, metal + 25, metal + 25))


def _box(pen: _Pen, rng: Random, colour: Colour) -> None:
    width, height = rng.uniform(0.4, 0.65), rng.uniform(0.3, 0.6)
    depth_x, depth_y = rng.uniform(0.15, 0.35), rng.uniform(0.15, 0.3)
    left, top, right, bottom = -width - depth_x / 2, -height + depth_y / 2, width - depth_x / 2, height + depth_y / 2
    front = [(left, top), (right, top), (right, bottom), (left, bottom)]
    lid = [(left, top), (left + depth_x, top - depth_y), (right + depth_x, top - depth_y), (right, top)]
    flank = [(right, top), (right + depth_x, top - depth_y), (right + depth_x, bottom - depth_y), (right, bottom)]
    for face, shade, towards in ((front, 0.0, 255), (lid, 0.35, 255), (flank, 0.35, 0)):
        pen.shape(face, _mix(colour, towards, shade))
        pen.line([*face, face[0]], _mix(colour, 0, 0.5), 0.012)
    middle = (left + right) / 2
    tape = [(middle, bottom), (middle, top), (middle + depth_x, top - depth_y)]
    pen.line(tape, _mix(colour, 255, rng.uniform(0.3, 0.6)), 0.1, 200)


def _paper(pen: _Pen, rng: Random, colour: Colour) -> None:
    sheet = _mix(colour, 255, rng.uniform(0.2, 0.7))
    width, height = rng.uniform(0.5, 0.7), rng.uniform(0.65, 0.85)
    corners = [(-width, -height), (width, -height), (width, height), (-width, height)]
    outline: Points = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        for t in np.linspace(0, 1, 7)[:-1]:
            outline.append((x0 + (x1 - x0) * t + rng.normal(0, 0.03), y0 + (y1 - y0) * t + rng.normal(0, 0.03)))
    pen.shape(outline, sheet)
    ink = _mix(sheet, 0, rng.uniform(0.4, 0.7))
    for y in np.arange(-height + 0.15, height - 0.1, rng.uniform(0.1, 0.16)):
        pen.line([(-width * 0.8, y), (width * rng.uniform(0.1, 0.85), y + rng.normal(0, 0.01))], ink, 0.025, 190)
    for _ in range(rng.integers(2, 6)):
        fold = [(rng.uniform(-width, width), -height), (rng.uniform(-width, width), height)]
        pen.line(fold, _mix(sheet, int(rng.choice([0, 255])), 0.3), 0.02, 150)


def _bag(pen: _Pen, rng: Random, colour: Colour) -> None:
    wide, knot = rng.uniform(0.5, 0.7), rng.uniform(-0.55, -0.4)
    right: Points = [(0.06, knot)]
    for t in np.linspace(0.1, 1, 9):
        bulge = wide * math.sin(min(1.0, t * 1.25) * math.pi / 2) * (1 if t < 0.8 else 1 - (t - 0.8) * 2.2)
        right.append((bulge + rng.normal(0, 0.03), knot + t * (0.85 - knot)))
    outline = _mirrored(right)
    pen.shape([(x + rng.normal(0, 0.015), y) for x, y in outline], colour, int(rng.integers(190, 256)))
    for side in (-1, 1):  # the ears of the knot
        tip = (side * rng.uniform(0.15, 0.3), knot - rng.uniform(0.25, 0.4))
        pen.shape([(0.0, knot + 0.03), tip, (side * 0.05, knot - 0.15)], _mix(colour, 0, 0.15))
    for _ in range(rng.integers(6, 12)):
        x = rng.uniform(-wide * 0.8, wide * 0.8)
        end = rng.uniform(0.1, 0.75)
        wrinkle = [(x * 0.08, knot + 0.04), (x * 0.6, knot + 0.4 * end + 0.1), (x, knot + (0.85 - knot) * end)]
        pen.line(wrinkle, _mix(colour, int(rng.choice([0, 255])), 0.4), 0.02, 170)


def _organic(pen: _Pen, rng: Random, colour: Colour) -> None:
    """A peel: a curved, tapering body with spots and a stem; or a bitten round fruit."""
    dark = _mix(colour, 0, 0.5)
    if rng.random() < 0.5:
        bend, thick = rng.uniform(0.5, 0.8), rng.uniform(0.14, 0.24)
        angles = np.linspace(-1.25, 1.25, 15)
        lift = bend * 0.6
        radii = [(a, thick * math.cos(a * 1.2)) for a in angles]
        edge = [(bend + r, a) for a, r in radii] + [(bend - r, a) for a, r in reversed(radii)]
        pen.shape([(r * math.sin(a), r * math.cos(a) - lift) for r, a in edge], colour)
        ridge = [(bend * math.sin(a), bend * math.cos(a) - lift) for a in angles]
        pen.line(ridge, dark, 0.02, 150)
        pen.line([ridge[-1], (ridge[-1][0] + 0.06, ridge[-1][1] - 0.15)], dark, 0.07)
        spots = ridge[2:-2]
    else:
        radius = rng.uniform(0.5, 0.65)
        angles = np.linspace(0, 2 * math.pi, 40)
        lobes = [radius * (1 - 0.12 * abs(math.cos(a / 2 + 0.8)) + 0.03 * math.sin(5 * a)) for a in angles]
        pen.shape([(r * math.cos(a), r * math.sin(a)) for r, a in zip(lobes, angles, strict=True)], colour)
        for _ in range(rng.integers(1, 3)):
            where = rng.uniform(-0.6, 0.6)
            flesh = _mix(colour, 255, 0.75)
            pen.shape(_ellipse(radius * math.cos(where) * 0.95, radius * math.sin(where), 0.25, 0.22), flesh)
        pen.line([(0, -radius * 0.85), (rng.uniform(-0.1, 0.1), -radius - 0.25)], dark, 0.05)
        leaf = [(0.0, -radius - 0.1), (0.15, -radius - 0.25), (0.35, -radius - 0.2), (0.2, -radius - 0.08)]
        pen.shape(leaf, _colour(rng))
        spots = [(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)) for _ in range(6)]
    for x, y in spots:
        if rng.random() < 0.6:
            size = rng.uniform(0.015, 0.05)
            pen.shape(_ellipse(x + rng.normal(0, 0.04), y + rng.normal(0, 0.04), size, size * 0.8), dark, 180)


_SHAPES: dict[str, Callable[[_Pen, Random, Colour], None]] = {
    "bag": _bag,
    "bottle": _bottle,
    "box": _box,
    "can": _can,
    "organic": _organic,
    "paper": _paper,
}
KINDS = tuple(_SHAPES)


# --- scene ------------------------------------------------------------------------------------------------------------


def _background(rng: Random, side: int) -> Image.Image:
    """A table, a floor or a belt: two tones blended in soft patches, sometimes with stripes or boards."""
    tone, other = _colour(rng), _colour(rng)
    share = rng.uniform(0.05, 0.35)
    blended = tuple(round(a + (b - a) * share) for a, b in zip(tone, other, strict=True))
    cells = int(rng.integers(3, 12))
    patches = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    mask = patches.resize((side, side), Image.Resampling.BICUBIC)
    scene = Image.composite(Image.new("RGB", mask.size, blended), Image.new("RGB", mask.size, tone), mask)
    if rng.random() < 0.4:
        draw = ImageDraw.Draw(scene)
        step, slope = int(rng.integers(side // 10, side // 3)), rng.uniform(-0.5, 0.5)
        line = _mix(tone, 0, 0.3)
        for x in range(-side, 2 * side, step):
            draw.line([(x, 0), (x + slope * side, side)], fill=line, width=int(rng.integers(1, 6)))
    return scene


def _clutter(rng: Random, side: int) -> Image.Image:
    """A scrap of no kind: a few corners in one colour."""
    pen = _Pen(side)
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
    radii = rng.uniform(0.3, 0.9, len(angles))
    pen.shape([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], _colour(rng))
    return pen.layer


def _put(scene: Image.Image, layer: Image.Image, rng: Random, *, scale: float, reach: float) -> None:
    """Turns, shrinks and stretches a layer; lays it and its shadow on the scene, up to `reach` off the centre."""
    side = scene.width
    width, height = max(8, int(side * scale * rng.uniform(0.85, 1.15))), max(8, int(side * scale))
    turned = layer.resize((width, height), Image.Resampling.BILINEAR).rotate(
        rng.uniform(0, 360), resample=Image.Resampling.BILINEAR, expand=True
    )
    x, y = ((side - turned.width) // 2, (side - turned.height) // 2)
    x += int(rng.uniform(-reach, reach) * side / 2)
    y += int(rng.uniform(-reach, reach) * side / 2)
    alpha = turned.getchannel("A")
    shadow = ImageChops.multiply(alpha, Image.new("L", alpha.size, int(rng.integers(40, 130))))
    offset = int(side * 0.02) + 1
    scene.paste((0, 0, 0), (x + offset, y + offset), shadow.filter(ImageFilter.BoxBlur(offset)))
    scene.paste(turned.convert("RGB"), (x, y), alpha)


def _light(rng: Random, size_px: int) -> npt.NDArray[np.float64]:
    """Brightness of each pixel: a lamp from one side."""
    across = np.linspace(-1, 1, size_px)
    tilt = rng.uniform(-0.25, 0.25, 2)
    light: npt.NDArray[np.float64] = 1 + tilt[0] * across[None, :] + tilt[1] * across[:, None]
    return light * rng.uniform(0.75, 1.2)


def _colour(rng: Random) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.85) ** 1.3, rng.uniform(0.25, 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _mix(colour: Colour, towards: int, share: float) -> Colour:
    red, green, blue = (round(c + (towards - c) * share) for c in colour)
    return red, green, blue


def _mirrored(right: Points) -> Points:
    return right + [(-x, y) for x, y in reversed(right)]


def _ellipse(x: float, y: float, width: float, height: float, begin: float = 0, end: float = 2 * math.pi) -> Points:
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in np.linspace(begin, end, 25).tolist()]


def _band(pen: _Pen, rng: Random, width: float, top: float, bottom: float) -> None:
    """A printed label around a bottle or a can."""
    label = _colour(rng)
    pen.shape([(-width, top), (width, top), (width, bottom), (-width, bottom)], label)
    middle = (top + bottom) / 2
    pen.line([(-width * 0.7, middle), (width * 0.7, middle)], _mix(label, 255, 0.7), (bottom - top) * 0.25)
