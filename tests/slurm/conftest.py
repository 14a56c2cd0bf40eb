from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, cluster_of, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster. If Slurm cannot run, skip with the reason, or fail if WASTEDDP_REQUIRE_SLURM is set, as in .ci/run."""
    if reason := why_not():
        if os.environ.get("WASTEDDP_REQUIRE_SLURM"):
            pytest.fail(f"Slurm is required here: {reason}")
        pytest.skip(reason)
    with cluster_of(9) as running:
        yield running
