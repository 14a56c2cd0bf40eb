"""A set that is made in parts equals, bit for bit, the set that one machine makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_build import contents

from wasteddp import cli
from wasteddp.errors import RecipeError, ShardError, SourceError
from wasteddp.sharding import array_job, build, writer
from wasteddp.sharding.array_job import Part, read_part, write_part
from wasteddp.sharding.build import Job, Options, make_shards, prepare_folder

Folder = Callable[..., Path]
SMALL = Options(shard_mb=0.02, quality=90)


@pytest.fixture
def images(image_folder: Folder) -> Path:
    """40 files: 33 JPEGs, images that must be encoded, copies, and one that is damaged."""
    folder = image_folder()
    for number in (1, 2, 3):
        Image.open(folder / "glass" / f"glass{number}.jpg").save(folder / "glass" / f"drawn{number}.png")
    Image.open(folder / "metal" / "metal4.jpg").convert("L").save(folder / "metal" / "grey.jpg")
    (folder / "paper" / "copy.jpg").write_bytes((folder / "paper" / "paper2.jpg").read_bytes())
    (folder / "paper" / "copy.png").write_bytes((folder / "glass" / "drawn1.png").read_bytes())  # another label
    (folder / "paper" / "cut.jpg").write_bytes((folder / "paper" / "paper1.jpg").read_bytes()[:300])
    return folder


def make_in_parts(job: Job, num_parts: int) -> None:
    for number in range(1, num_parts + 1):
        read_part(job, Part(number, num_parts), workers=2)
    for number in range(num_parts, 0, -1):
        write_part(job, Part(number, num_parts), workers=2)


@pytest.mark.parametrize("num_parts", [1, 3, 50])  # 50: more parts than images
def test_parts_make_the_bytes_of_one_machine(
    images: Path, tmp_path: Path, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(Job(images, tmp_path / "one" / "set", SMALL), workers=2)
    job = Job(images, tmp_path / "many" / "set", SMALL)
    make_in_parts(job, num_parts)
    with monkeypatch.context() as patch:  # the last step reads no image and writes no shard
        patch.setattr("wasteddp.sharding.scan.examine", None)
        patch.setattr(writer, "_write_shard", None)
        manifest = make_shards(job, workers=2)
    assert len(manifest.splits["train"].shards) > 2
    assert contents(tmp_path / "many" / "set") == contents(tmp_path / "one" / "set")


def test_images_that_are_shrunk_end_shards_where_one_machine_does(images: Path, tmp_path: Path) -> None:
    options = Options(shard_mb=0.01, max_side_px=32)
    make_shards(Job(images, tmp_path / "one" / "set", options), workers=2)
    make_in_parts(job := Job(images, tmp_path / "many" / "set", options), 2)
    make_shards(job, workers=2)
    assert contents(tmp_path / "many" / "set") == contents(tmp_path / "one" / "set")


def test_a_failed_part_is_repeated_alone(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(Job(images, tmp_path / "one" / "set", SMALL), workers=2)
    job = Job(images, tmp_path / "many" / "set", SMALL)
    for number in (1, 3):
        read_part(job, Part(number, 3), workers=1)
    with pytest.raises(ShardError, match="13 of 40 images are not read yet: part 2/3\n"):
        write_part(job, Part(1, 3), workers=1)
    read_part(job, Part(2, 3), workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(array_job, "load_sample", lambda *_: (_ for _ in ()).throw(RuntimeError("the node died")))
        with pytest.raises(RuntimeError, match="the node died"):
            write_part(job, Part(1, 3), workers=1)
    for number in (2, 3, 1):
        write_part(job, Part(number, 3), workers=1)
    before = {path: path.stat().st_mtime_ns for path in job.out.glob("*.tar")}
    min(before).write_bytes(b"damaged since")
    for number in (1, 2, 3):
        write_part(job, Part(number, 3), workers=1)
    assert [path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns] == [min(before)]
    make_shards(job, workers=2)
    assert contents(tmp_path / "many" / "set") == contents(tmp_path / "one" / "set")


def test_the_last_step_does_what_a_part_left_undone(images: Path, tmp_path: Path) -> None:
    make_shards(Job(images, tmp_path / "one" / "set", SMALL), workers=2)
    job = Job(images, tmp_path / "many" / "set", SMALL)
    for number in (1, 2):
        read_part(job, Part(number, 2), workers=1)
    write_part(job, Part(2, 2), workers=1)
    journal = next((job.out / build.WORK_NAME).glob("scan-1*"))
    journal.write_text("\n".join(journal.read_text().splitlines()[:-1])[:-20])  # truncated by a kill
    make_shards(job, workers=2)
    assert contents(tmp_path / "many" / "set") == contents(tmp_path / "one" / "set")


def test_two_parts_work_at_once_and_a_whole_run_does_not_join_them(images: Path, tmp_path: Path) -> None:
    job = Job(images, tmp_path / "out", SMALL)
    read_part(job, Part(1, 2), workers=1)
    with build.work_folder(job.out, shared=True):
        read_part(job, Part(2, 2), workers=1)
        with pytest.raises(ShardError, match="another `wasteddp shard` is writing"):
            make_shards(job, workers=1)


def test_other_options_are_another_set(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_in_parts(Job(images, tmp_path / "out", Options(shard_mb=0.02, quality=50)), 2)
    with pytest.raises(ShardError, match="images are not read yet: part 1/2"):  # encoded with another quality
        write_part(Job(images, tmp_path / "out", SMALL), Part(1, 2), workers=1)
    make_in_parts(job := Job(images, tmp_path / "out", SMALL), 2)
    make_shards(job, workers=1)
    make_shards(Job(images, tmp_path / "one" / "out", SMALL), workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one" / "out")
    capsys.readouterr()
    read_part(job, Part(1, 2), workers=1)
    assert "has a manifest: no part is missing" in capsys.readouterr().out


def test_an_encoder_that_changed_between_reading_and_writing_is_noticed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(images, tmp_path / "out", Options(quality=90))
    read_part(job, Part(1, 1), workers=1)
    sizes = next((job.out / build.WORK_NAME).glob("sizes*"))
    lines = [json.loads(line) for line in sizes.read_text().splitlines() if line]
    sizes.write_text("".join(json.dumps([*line[:3], line[3] + 60_000]) + "\n" for line in lines))
    with pytest.raises(ShardError, match=r"-000000\.tar has \d+ samples in .* planned were"):
        write_part(job, Part(1, 1), workers=1)


def test_the_command_makes_parts(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["shard", str(images), "--out", str(tmp_path / "out"), "--workers", "1"]
    for stage in ("read", "write"):
        for part in ("1/2", "2/2"):
            assert cli.main([*command, "--part", part, "--stage", stage]) == 0
    said = capsys.readouterr().out
    assert "part 1/2: 20 of 40 images read" in said
    assert "part 2/2: 1 of 3 shards written" in said
    assert cli.main(command) == 0
    assert "samples in 3 shard(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3/2", "--stage", "read"], "--part is '3/2'"),
        (["--part", "0/2", "--stage", "read"], "--part is '0/2'"),
        (["--stage", "read"], "--part is ''"),
        (["--part", "1/2"], "--part was given without --stage"),
        (["--part", "1/2", "--stage", "read", "--overwrite"], "or with --overwrite"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(
    images: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["shard", str(images), "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_would_be_unpacked_drawn_or_downloaded_by_every_part_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(b"\x1f\x8b rest")
    with pytest.raises(SourceError, match="each part would unpack all of it"):
        read_part(Job(packed, tmp_path / "out"), Part(1, 2), workers=1)
    from wasteddp.sharding.recipe import local_job

    shards = Path(__file__).parents[2] / "shards"
    with pytest.raises(RecipeError, match="each part would draw all of them"):
        local_job(shards / "sample.yaml", out=None, local=tmp_path, options=Options())
    with pytest.raises(RecipeError, match="each part would download all of them"):
        local_job(shards / "trashnet.yaml", out=None, local=None, options=Options())


def test_parts_that_start_at_the_same_time_prepare_one_folder(tmp_path: Path) -> None:
    """Guards `shared` in prepare_folder: without it, one part removes the temporary file that another one renames."""
    work = tmp_path / "out" / ".sharding"
    work.mkdir(parents=True)
    job = Job(tmp_path, tmp_path / "out", replace(SMALL, split_rule="stratified"))

    def prepare(_: int) -> bytes:
        prepare_folder(job, work, overwrite=False)
        return (work / "begun").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(prepare, range(200))) == {b"stratified"}
    assert [path.name for path in work.iterdir()] == ["begun"]
