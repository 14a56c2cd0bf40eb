"""The images that a model was wrong about, small, inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from wasteddp.data.decoding.decode import UndecodableError, decode_rgb
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import WastedError

SIDE_PX = 176  # on a screen of two pixels a point still sharp enough to see what it is
_QUALITY = 78  # about 5 KB a picture


def thumbnails(
    manifest: Manifest | None, record: Mapping[str, Any], samples: Sequence[int]
) -> tuple[dict[int, str], str]:
    """`data:` addresses of samples of an evaluation's split, and why some or all are missing, or ''.

    Args:
        manifest: of the shard set as it lies there now; pictures of another set would be of other samples.
        record: of the evaluation.
    """
    if not samples:
        return {}, ""
    if manifest is None:
        return {}, "the shard set cannot be read"
    if manifest.sha256 != record["hashes"]["manifest"]:
        return {}, f"{manifest.folder} is another shard set now than the one that was evaluated"
    found: dict[int, str] = {}
    try:
        with SplitReader(manifest, record["options"]["split"]) as reader:
            for sample in samples:
                found[sample] = _data_address(reader.read(sample))
    except (WastedError, UndecodableError) as error:
        return found, str(error).splitlines()[0]
    return found, ""


def _data_address(data: bytes) -> str:
    image = Image.fromarray(decode_rgb(data))
    image.thumbnail((SIDE_PX, SIDE_PX))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
