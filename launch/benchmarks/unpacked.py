"""A split of a shard set as a folder of class folders, for those who read folders."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path


def unpack(shards: Path, out: Path, *, split: str) -> None:
    """Writes the images of a split of the set in the folder `shards`.

    Raises:
        SystemExit: there is none.
    """
    tars = sorted(shards.glob(f"{split}-*.tar"))
    if not tars:
        raise SystemExit(f"{shards} has no {split}-*.tar: all sides read these; make them with `wasteddp shard`")
    for tar in tars:
        with tarfile.open(tar) as members:
            image, name = b"", ""
            for member in members:
                file = members.extractfile(member)
                content = file.read() if file else b""
                if member.name.endswith(".json"):
                    folder = out / json.loads(content)["label"]
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(image)
                else:
                    image, name = content, Path(member.name).name
