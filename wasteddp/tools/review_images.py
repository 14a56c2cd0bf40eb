"""The images of a shard set for `wasteddp review`, by their paths in the source, and its near-duplicates.

Legend: P pairs.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from wasteddp.data.dataset import ShardSet
from wasteddp.data.decoding.decode import UndecodableError, check_image
from wasteddp.data.reader import SplitReader
from wasteddp.parallel import in_order, progress
from wasteddp.sharding.duplicates import PerceptualHash, find_near, perceptual_hash


@dataclass(frozen=True, slots=True)
class SetImage:
    """An image of the set. `path` is that in the source, as a CSV has it."""

    path: str
    split: str
    number: int  # in the split
    label: int


@dataclass(frozen=True, slots=True)
class ConflictingPairs:
    """Near-duplicates with different labels."""

    pairs: tuple[tuple[SetImage, SetImage], ...]  # the nearest first; at most `duplicates.MOST_LISTED`
    num_found: int
    is_complete: bool  # else there are more: some images have more near-duplicates than were looked for
    num_unread: int  # images that cannot be decoded


class SetImages:
    """All images of an open shard set. Readers are closed with `stack`."""

    def __init__(self, shard_set: ShardSet, stack: ExitStack) -> None:
        self.manifest = shard_set.manifest
        self._readers: dict[str, SplitReader] = {
            name: stack.enter_context(shard_set.reader(name))
            for name, split in self.manifest.splits.items()
            if split.num_samples
        }
        self._images = [
            SetImage(written(reader.source(number)), name, number, label)
            for name, reader in self._readers.items()
            for number, label in enumerate(reader.labels.tolist())
        ]
        self._by_path = {image.path: image for image in self._images}

    @property
    def splits(self) -> list[str]:
        """The splits that have images."""
        return list(self._readers)

    def find(self, path: str) -> SetImage | None:
        """Return the image with this path in the source; a CSV may have put ./ before it."""
        return self._by_path.get(path) or self._by_path.get(path.removeprefix("./"))

    def read(self, image: SetImage) -> bytes:
        return self._readers[image.split].read(image.number)

    def conflicting_pairs(self, *, workers: int) -> ConflictingPairs:
        """Decode all images, and find the near-duplicates that have different labels."""

        def hash_one(image: SetImage) -> PerceptualHash | None:
            data = self.read(image)
            try:
                return perceptual_hash(check_image(data).grey)
            except UndecodableError:
                return None

        images, hashes = list[SetImage](), list[PerceptualHash]()
        with progress("comparing images", len(self._images)) as advance:
            for image, one in zip(self._images, in_order(hash_one, self._images, workers=workers), strict=True):
                advance()
                if one is not None:
                    images.append(image)
                    hashes.append(one)
        near = find_near(
            np.array([one.bits64 for one in hashes], np.uint64),
            np.frombuffer(b"".join(one.bits256 for one in hashes), np.uint8).reshape(-1, 32),
            np.array([image.label for image in images], np.int64),
            ~np.eye(len(self.manifest.classes), dtype=bool),
        )
        pairs = tuple((images[left], images[right]) for left, right in near.pairs.tolist())
        num_found = int(near.pairs_KK.sum())
        return ConflictingPairs(pairs, num_found, near.is_complete, len(self._images) - len(images))


def written(path: str) -> str:
    """Return a path as a CSV has it: a byte that is not UTF-8 as \\udcXX."""
    return path.encode("utf-8", "backslashreplace").decode()
