"""Stores images of a run in its folder, from which they can be sent to a dashboard at any time.

    runs/<name>/media/step-00000000/gallery.json    augmented training images, as the network sees them
    runs/<name>/media/step-00000120/gallery.json    the most confident mistakes of the evaluation at step 120, and its
                                    00.jpg ...      confusion matrix

A folder gets its name when it is complete. If a step is repeated after a kill, the same images replace it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from wasteddp.data import gpu_decoding
from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.decoding.decode import ImageHWC, encode_jpeg
from wasteddp.errors import print_warning
from wasteddp.files import read_regular
from wasteddp.inference.metrics import Seen
from wasteddp.settings import describe_problems
from wasteddp.training.dataloaders import Inputs

_FILE = "gallery.json"
_FOLDER = re.compile(r"step-([0-9]{1,18})")
_SIDE_PX = 160  # of a thumbnail
_QUALITY = 88


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG and the facts about it."""

    jpeg: bytes
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The images of a step. `kind` is "augmented" or "mistakes"; `confusion`, [K, K] with the true classes as rows, is
    empty unless the images are of an evaluation."""

    kind: str
    pictures: Sequence[Picture]
    classes: tuple[str, ...]
    confusion: list[list[int]] = field(default_factory=list)


def augmented(data: Inputs, augment: Augment, count: int) -> Gallery:
    """Return the first training images of the run, cropped and augmented as the network will see them."""
    samples = data.plan.step_samples(0, 0, rank=0, world_size=1)[:count]
    batch = next(data.train_loader.batches([(0, 0, samples)]))
    gpu_decoding.fill(batch.images_BCHW, batch.encoded_B)  # this batch is not copied to a device
    normalised_BCHW = augment(batch.images_BCHW, batch.samples, 0)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
    pixels_BCHW = ((normalised_BCHW * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    labels = [data.manifest.classes[label] for label in batch.labels_B.tolist()]
    pictures = [
        Picture(_thumbnail(pixels), {"true": label})
        for pixels, label in zip(pixels_BCHW.permute(0, 2, 3, 1).numpy(), labels, strict=True)
    ]
    return Gallery("augmented", pictures, data.manifest.classes)


def mistakes(data: Inputs, seen: Seen, count: int) -> Gallery:
    """Return the most confident mistakes, worst first, with the images read again from the shards."""
    chosen = seen.mistakes.surest[:count]
    samples = np.array([mistake.sample for mistake in chosen], dtype=np.int64)
    pictures = []
    if chosen:
        pixels_BHWC = next(data.val_loader.batches([(0, 0, samples)])).images_BCHW.permute(0, 2, 3, 1).numpy()
        for pixels, mistake in zip(pixels_BHWC, chosen, strict=True):
            facts = {
                "source": data.val_reader.source(mistake.sample),
                "true": seen.classes[mistake.true],
                "predicted": seen.classes[mistake.predicted],
                "probability": mistake.confidence,
            }
            pictures.append(Picture(_thumbnail(pixels), facts))
    return Gallery("mistakes", pictures, seen.classes, seen.confusion.tolist())


def save(folder: Path, step: int, gallery: Gallery) -> None:
    """Write a gallery into `folder`/media."""
    final = folder / "media" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries = []
    for number, picture in enumerate(gallery.pictures):
        name = f"{number:02d}.jpg"
        (temporary / name).write_bytes(picture.jpeg)
        entries.append({"file": name, **picture.facts})
    content = {"kind": gallery.kind, "classes": gallery.classes, "confusion": gallery.confusion, "pictures": entries}
    (temporary / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


class _Entry(BaseModel, strict=True):
    file: Annotated[str, Field(pattern=r"^[\w-]+\.jpg$")]
    true: str


class _Mistake(_Entry):
    source: str
    predicted: str
    probability: float


class _Augmented(BaseModel, strict=True):
    kind: Literal["augmented"]
    pictures: list[_Entry]


class _Mistakes(BaseModel, strict=True):
    kind: Literal["mistakes"]
    pictures: list[_Mistake]
    classes: list[str]
    confusion: list[list[int]]

    @model_validator(mode="after")
    def _one_row_and_column_for_each_class(self) -> Self:
        if {len(self.confusion), *map(len, self.confusion)} != {len(self.classes)}:
            raise ValueError("the confusion matrix does not have the size of the classes")
        return self


_CONTENT: TypeAdapter[_Augmented | _Mistakes] = TypeAdapter(
    Annotated[_Augmented | _Mistakes, Field(discriminator="kind")]
)


def listed(folder: Path, first: int, last: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (folder of the images, content of gallery.json) of the steps `first` .. `last`, oldest first.

    A folder whose gallery.json or images are damaged is passed over with a warning.
    """
    for path in sorted((folder / "media").glob("step-*")):
        found = _FOLDER.fullmatch(path.name)
        if found is None or not first <= int(found[1]) <= last:
            continue
        try:
            content = json.loads(read_regular(path / _FILE))
            for picture in _CONTENT.validate_python(content).pictures:
                with Image.open(path / picture.file) as image:
                    image.verify()
        except (OSError, ValueError, SyntaxError, RecursionError) as error:  # SyntaxError: of Pillow
            reason = describe_problems(error) if isinstance(error, ValidationError) else str(error)
            print_warning(f"{path / _FILE} cannot be read: {reason}; its pictures are left out")
            continue
        yield path, content


def _thumbnail(pixels_HWC: ImageHWC) -> bytes:
    side = max(pixels_HWC.shape[:2])
    if side > _SIDE_PX:
        scale = _SIDE_PX / side
        size = (max(1, round(pixels_HWC.shape[1] * scale)), max(1, round(pixels_HWC.shape[0] * scale)))
        pixels_HWC = np.asarray(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.LANCZOS))
    return encode_jpeg(np.ascontiguousarray(pixels_HWC), quality=_QUALITY)
