"""slurm/shard.sh on a real Slurm: an array writes the same set as one machine."""

from __future__ import annotations

import re
from pathlib import Path

from cluster import Cluster, Job
from small_run import write_images

from wasteddp.sharding.build import Job as Sharding
from wasteddp.sharding.build import Options, make_shards

# A site on which the second element of the reading array finds no container image, until it is repaired.
SITE = """
INSIDE=(bash -c 'if [ "$STAGE$SLURM_ARRAY_TASK_ID" = read2 ] && [ ! -e {repaired} ]; then exit 9; fi; exec "$@"' inside)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_array_makes_the_set_of_one_machine_and_a_failed_element_is_repeated_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Guards --part of shard.sh: with 1/N for every element, the others' images are not read and the stage fails.

    And the done-marks: without them the command submits all three elements again.
    """
    images = write_images(tmp_path / "images", {"train": (9, 8, 7), "test": (3, 2, 2)})
    make_shards(Sharding(images, tmp_path / "one" / "set", Options(shard_mb=0.02)), workers=1)
    out = tmp_path / "many" / "set"
    (tmp_path / "site.sh").write_text(SITE.format(repaired=tmp_path / "repaired"))
    options = f"--nodelist=n1 --cpus-per-task=1 --output={tmp_path}/%x-%A_%a.txt"
    environment = {"SITE": str(tmp_path / "site.sh"), "SBATCH": options}

    def submit() -> dict[str, str]:
        command = ["bash", "slurm/shard.sh", "3", str(images), "--out", str(out), "--shard-mb", "0.02"]
        said = cluster.run(*command, environment=environment)
        return dict(re.findall(r"(\w+): (.*)", said))

    def job(line: str) -> Job:
        found = re.search(r"job (\d+)", line)
        assert found
        return Job(cluster, found[1], tmp_path / "none")

    first = submit()
    assert first["read"].endswith("elements 1 2 3")
    assert [job(first["read"]).end(f"_{number}") for number in (1, 2, 3)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert job(first["merge"]).end() == "CANCELLED"
    assert not (out / "manifest.json").exists()
    (tmp_path / "repaired").touch()
    second = submit()
    assert second["read"].endswith("elements 2")
    assert second["write"].endswith("elements 1 2 3")
    ended = job(second["merge"]).end()
    assert ended == "COMPLETED", "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert contents(out) == contents(tmp_path / "one" / "set")
    third = submit()
    assert third["read"] == third["write"] == "done"
    assert job(third["merge"]).end() == "COMPLETED"
