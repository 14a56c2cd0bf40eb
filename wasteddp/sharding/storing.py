"""What of an image goes into a shard: its own bytes, or a JPEG made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from wasteddp.data.encode import reencode
from wasteddp.errors import SourceError, storage
from wasteddp.sharding import scan
from wasteddp.sharding.job import Options
from wasteddp.sharding.sources.archives import Source
from wasteddp.sharding.sources.layout import Picture
from wasteddp.sharding.writer import Sample


def load_sample(
    source: Source, picture: Picture, record: scan.Scan, classes: Sequence[str], options: Options
) -> Sample:
    """Reads an image again, proves that it is the one that was scanned, and re-encodes it if it cannot stay."""
    path = picture.file.path
    with storage("reading an image again", path):
        data = source.read(path)
    sha256 = hashlib.sha256(data).digest()
    if sha256 != record["sha256"].tobytes():
        raise SourceError(
            f"{path} changed while it was being sharded", "what was proved of it no longer holds", "start again"
        )
    if not stays(record, options):
        data = reencode(data, max_side_px=options.max_side_px, quality=options.quality)
        sha256 = hashlib.sha256(data).digest()
    label = classes.index(picture.class_name)
    return Sample(data, sha256, label, picture.class_name, path)


def stays(record: scan.Scan, options: Options) -> bool:
    """Whether the image's own bytes go into the shard."""
    too_large = options.max_side_px is not None and max(record["height"], record["width"]) > options.max_side_px
    return bool(record["is_plain"]) and not too_large
