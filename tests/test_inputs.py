"""What a run reads: refused where the ranks would not read the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wasteddp.data.manifest import Manifest
from wasteddp.errors import ShardError
from wasteddp.training.inputs import refuse_different_sets


class World:
    """Three ranks; the last one reads another manifest."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value, "f" * 64]


def test_ranks_that_read_different_sets_are_refused(small_shards: Path) -> None:
    manifest = Manifest.load(small_shards)
    with pytest.raises(ShardError, match=rf"rank 0 reads the manifest {manifest.sha256[:12]} and rank 2 ffffffffffff"):
        refuse_different_sets(manifest, World())  # type: ignore[arg-type]
