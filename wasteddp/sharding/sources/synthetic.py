"""Synthetic images of waste, drawn with Pillow, for tests and a first training without a network.

The six classes differ only in shape. Size, pose, colours, background, light, clutter and noise have the same
distributions in all classes, so a classifier must learn the shapes. An image is a function of (seed, kind, number).

Legend: points are in [-1, 1], with the object's centre at 0 and y downwards.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from wasteddp.errors import SourceError, storage
from wasteddp.parallel import progress

KINDS = ("bag", "bottle", "box", "can", "organic", "paper")
Points = list[tuple[float, float]]
_BODY, _DARK, _LIGHT, _OTHER = range(4)  # the colours of an object


def draw_image(kind: str, number: int, *, size_px: int, seed: int) -> bytes:
    """Return one JPEG of `size_px` x `size_px` pixels."""
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    side = 2 * size_px
    patches = rng.uniform(0, 255, (int(rng.integers(3, 12)),) * 2).astype(np.uint8)
    mask = Image.fromarray(patches).resize((side, side), Image.Resampling.BICUBIC).point(lambda x: x // 3)
    scene = Image.composite(Image.new("RGB", mask.size, _colour(rng)), Image.new("RGB", mask.size, _colour(rng)), mask)
    for _ in range(rng.integers(0, 4)):
        width, height = rng.uniform(0.3, 0.9, 2)
        scrap = _ring(0, 0, width, height, corners=int(rng.integers(3, 7)))
        _put(scene, [(scrap, _BODY)], rng, scale=rng.uniform(0.1, 0.35), reach=0.95)
    _put(scene, list(_parts(kind, rng)), rng, scale=rng.uniform(0.55, 0.95), reach=0.3)
    pixels = np.asarray(scene.reduce(2), dtype=np.float32)
    tilt, across = rng.uniform(-0.25, 0.25, 2), np.linspace(-1, 1, size_px)
    light = (1 + tilt[0] * across[None, :] + tilt[1] * across[:, None]) * rng.uniform(0.75, 1.2)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(1, 7)
    image = Image.fromarray((pixels * light[:, :, None] + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(80, 95)))
    return buffer.getvalue()


def draw_folder(folder: Path, *, kinds: Sequence[str], images_per_class: int, size_px: int, seed: int) -> int:
    """Draw the images into a folder of class folders, except those that exist. Return the number of images.

    Args:
        folder: created if it does not exist.
        kinds: of `KINDS`; each is a class.
        images_per_class: at least 1.
        size_px: side of an image, 32 to 2048.
        seed: from 0; another seed draws other images.

    Raises:
        SourceError: a number is out of its range.
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


def _parts(kind: str, rng: np.random.Generator) -> Iterator[tuple[Points, int]]:
    """Yield the polygons of an object, in the order of drawing, each with the number of its colour."""
    a, b, c = rng.uniform(0.75, 1.25, 3)
    if kind == "bag":  # a round sack with a knot and its two ears
        yield _mirror([(0.05, -0.5), (0.3 * a, -0.3), (0.6 * a, 0.2 * b), (0.55 * a, 0.65), (0.35 * a, 0.85)]), _BODY
        yield [(0, -0.4), (-0.25 * b, -0.85), (0, -0.6), (0.25 * c, -0.85)], _DARK
        for x in rng.uniform(-0.4, 0.4, 6):
            yield [(x * 0.1, -0.4), (x + 0.03, 0.5), (x, 0.5)], int(rng.choice([_DARK, _LIGHT]))
    elif kind == "bottle":  # a long body with a narrow neck, a cap and a label
        right = [(0.09, -0.85), (0.09 * c, -0.6), (0.27 * a, -0.25 * b), (0.27 * a, 0.85), (0.22 * a, 0.9)]
        yield _mirror(right), _BODY
        yield _mirror([(0.12, -0.97), (0.12, -0.8)]), _OTHER
        yield _mirror([(0.27 * a, 0.1 * b), (0.27 * a, 0.5 * c)]), _LIGHT
    elif kind == "box":  # three faces and a tape
        x, y, dx, dy = 0.5 * a, 0.4 * b, 0.25 * c, 0.22 * a
        yield [(-x, -y), (x, -y), (x, y), (-x, y)], _BODY
        yield [(-x, -y), (dx - x, -y - dy), (x + dx, -y - dy), (x, -y)], _LIGHT
        yield [(x, -y), (x + dx, -y - dy), (x + dx, y - dy), (x, y)], _DARK
        yield [(-0.05, y), (-0.05, -y), (dx - 0.05, -y - dy), (dx + 0.05, -y - dy), (0.05, -y), (0.05, y)], _OTHER
    elif kind == "can":  # a short cylinder with a band, seen from above
        x, y, dy = 0.4 * a, 0.6 * b, 0.13 * c
        yield _ring(0, y, x, dy), _BODY
        yield _mirror([(x, -y), (x, y)]), _BODY
        yield _mirror([(x, -0.25), (x, 0.3)]), _OTHER
        yield from ((_ring(0, -y, x * s, dy * s), colour) for s, colour in ((1, _LIGHT), (0.85, _DARK), (0.2, _LIGHT)))
    elif kind == "organic":  # a bent peel with a stem and spots
        outer, inner = _ring(0, -0.4, 0.8, 0.9)[1:12], _ring(0, -0.4, 0.7, 0.55 - 0.1 * a)[1:12]
        yield outer + inner[::-1], _BODY
        yield [outer[0], (0.9, -0.4 * b), inner[0]], _DARK
        for x in rng.uniform(-0.45, 0.45, 5):
            yield _ring(x, 0.3 - 0.6 * x * x, *rng.uniform(0.02, 0.07, 2).tolist()), _DARK
    else:  # a crumpled sheet with lines
        x, y = 0.6 * a, 0.75 * b
        corners = [(-x, -y), (x, -y), (x, y), (-x, y)]
        yield [(px + rng.normal(0, 0.04), py + rng.normal(0, 0.04)) for px, py in corners], _LIGHT
        for top in np.arange(-y * 0.85, y * 0.8, 0.13 * c):
            yield [(-x * 0.8, top), (x * rng.uniform(0.1, 0.85), top), (-x * 0.8, top + 0.03)], _DARK


def _put(
    scene: Image.Image, parts: Sequence[tuple[Points, int]], rng: np.random.Generator, *, scale: float, reach: float
) -> None:
    """Rotate and stretch an object, and draw it with its shadow, at most `reach` away from the centre of the scene."""
    side, body = scene.width, np.array(_colour(rng))
    colours = [body, body * 0.6, 255 - (255 - body) * 0.5, np.array(_colour(rng))]
    angle, centre = rng.uniform(0, 2 * math.pi), (1 + rng.uniform(-reach, reach, 2)) * side / 2
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = turn * [rng.uniform(0.85, 1.15), 1] * scale * side / 2
    placed = [(np.array(points) @ turn.T + centre, colours[colour]) for points, colour in parts]
    shadow = Image.new("L", scene.size)
    for points, _ in placed:
        ImageDraw.Draw(shadow).polygon([(x, y) for x, y in points + side * 0.02], fill=90)
    scene.paste((0, 0, 0), mask=shadow.filter(ImageFilter.BoxBlur(side * 0.02)))
    for points, colour in placed:
        red, green, blue = colour.astype(int).tolist()
        ImageDraw.Draw(scene).polygon([(x, y) for x, y in points], fill=(red, green, blue))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.85) ** 1.3, rng.uniform(0.25, 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _mirror(right: Points) -> Points:
    return right + [(-x, y) for x, y in reversed(right)]


def _ring(x: float, y: float, width: float, height: float, corners: int = 24) -> Points:
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in 2 * math.pi * np.arange(corners) / corners]
