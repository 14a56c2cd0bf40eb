"""Shard sets are built from images: with the same bytes after any interruption, and without a silent loss."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pictures import jpeg
from PIL import Image

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest, read_index
from wasteddp.errors import ShardError, SourceError, StorageError
from wasteddp.sharding import build, scan, splits, writer
from wasteddp.sharding import recipe as recipes
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.synthetic import KINDS, draw_folder, draw_image

Folder = Callable[..., Path]
SMALL = Options(shard_mb=0.02)  # several shards of a few images


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_samples(folder: Path, split: str) -> list[dict[str, object]]:
    tars = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # WebDataset leaves its files open until garbage collection
        samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
        gc.collect()
    return [{"key": s["__key__"], "jpg": s["jpg"], **json.loads(s["json"])} for s in samples]


def test_names_that_are_not_utf8_are_kept_and_the_files_are_utf8(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder({"glass": 2, "metal": 2})
    (images / "glass" / "glass1.jpg").rename(images / "glass" / "caf\udce9.jpg")
    (images / "glass" / "br\udce9k.jpg").write_text("no image")
    (images / "metal" / "t\udce9xt.txt").touch()
    assert main(["shard", str(images), "--out", str(tmp_path / "out"), "--fractions", "1,0,0"]) == 0
    assert "metal/t\\udce9xt.txt" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out")
    assert [left.source for left in manifest.left_out] == ["glass/br\udce9k.jpg"]
    (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    assert "glass/caf\udce9.jpg" in {sample["source"] for sample in read_samples(tmp_path / "out", "train")}


def test_webdataset_reads_what_the_index_points_at(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder()
    manifest = make_shards(Job(images, tmp_path / "out", SMALL), workers=2)
    assert len(manifest.splits["train"].shards) > 1
    total = 0
    for split in manifest.splits.values():
        samples = read_samples(manifest.folder, split.name)
        assert [s["key"] for s in samples] == [f"{split.name}-{n:08d}" for n in range(split.num_samples)]
        position = 0
        for shard in split.shards:
            tar = (manifest.folder / shard.tar).read_bytes()
            assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.num_bytes, shard.sha256)
            for record in read_index(manifest.folder, shard):
                sample, offset = samples[position], int(record["offset"])
                assert tar[offset : offset + int(record["length"])] == sample["jpg"]
                assert record["sha256"].tobytes().hex() == sample["sha256"]
                assert manifest.classes[int(record["label"])] == sample["label"] == str(sample["source"]).split("/")[0]
                assert sample["label_number"] == record["label"]
                assert (images / str(sample["source"])).read_bytes() == sample["jpg"]
                position += 1
        total += len(samples)
    assert total == 33


def test_bytes_do_not_depend_on_workers_times_or_the_kind_of_source(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder()
    make_shards(Job(images, tmp_path / "1" / "set", SMALL), workers=1)
    shutil.make_archive(str(tmp_path / "a"), "zip", images)
    shutil.make_archive(str(tmp_path / "a"), "gztar", images)
    for file in images.rglob("*.jpg"):
        os.utime(file, (1, 1))
    for number, source in enumerate((images, tmp_path / "a.zip", tmp_path / "a.tar.gz"), start=2):
        make_shards(Job(source, tmp_path / str(number) / "set", SMALL), workers=number)
        members = contents(tmp_path / str(number) / "set")
        expected = contents(tmp_path / "1" / "set")
        if source.suffix == ".gz":  # make_archive writes names that start with ./, which is dropped
            assert members.keys() == expected.keys()
        assert members == expected


def test_samples_of_a_split_are_ordered_by_content_and_members_carry_no_time(
    image_folder: Folder, tmp_path: Path
) -> None:
    manifest = make_shards(Job(image_folder(), tmp_path / "out"), workers=2)
    hashes = [str(s["sha256"]) for s in read_samples(manifest.folder, "train")]
    assert hashes == sorted(hashes)
    with tarfile.open(manifest.folder / "train-000000.tar") as archive:
        assert {(m.mtime, m.uname, m.gname, m.mode) for m in archive} == {(0, "wasteddp", "wasteddp", 0o444)}


def test_a_finished_set_is_left_alone_and_another_is_refused_unless_overwritten(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = image_folder(), tmp_path / "out"
    make_shards(Job(images, out, SMALL), workers=2)
    (out / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make_shards(Job(images, out, SMALL), workers=2)
    assert "already made from these 33 images with these options: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ShardError, match="finished set of other images or other options"):
        make_shards(Job(images, out), workers=2)
    (images / "glass" / "new.jpg").write_bytes(jpeg(1000))
    with pytest.raises(ShardError, match="finished set of other images or other options"):
        make_shards(Job(images, out, SMALL), workers=2)
    assert not (out / build.WORK_NAME).exists()
    manifest = make_shards(Job(images, out), workers=2, overwrite=True)
    wanted = {f for s in manifest.splits.values() for shard in s.shards for f in (shard.tar, shard.index)}
    assert {path.name for path in out.iterdir()} == wanted | {"manifest.json", "notes.txt"}


def test_a_finished_set_that_lost_a_shard_is_not_called_finished(image_folder: Folder, tmp_path: Path) -> None:
    images, out = image_folder(), tmp_path / "out"
    make_shards(Job(images, out), workers=2)
    (out / "val-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"val-000000\.tar or its index is missing or changed: 0 bytes"):
        make_shards(Job(images, out), workers=2)


def test_tars_of_somebody_else_are_not_replaced(image_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"theirs")
    with pytest.raises(ShardError, match=r"holds 1 file\(s\) that this would replace, such as train-000000.tar"):
        make_shards(Job(image_folder(), out), workers=2)
    assert contents(out) == {"train-000000.tar": b"theirs"}


def test_a_missing_source_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no"):
        make_shards(Job(tmp_path / "nowhere", tmp_path / "out"), workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_killed_at_any_time_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    draw_folder(images, kinds=KINDS[:2], images_per_class=1, size_px=48, seed=0)
    for number in range(200):
        (images / KINDS[number % 2] / f"{number}.jpg").write_bytes(jpeg(number))
    make_shards(Job(images, tmp_path / "quiet" / "set", SMALL), workers=2)
    out = tmp_path / "killed" / "set"
    # Slow down reading, so that the kill comes before the end: the images of a test are written in a moment.
    program = (
        "import sys, time; from pathlib import Path\n"
        "from wasteddp.sharding import build\n"
        "from wasteddp.sharding.sources.files import FolderSource\n"
        "read = FolderSource.read\n"
        "FolderSource.read = lambda self, path: (time.sleep(0.004), read(self, path))[1]\n"
        "options = build.Options(shard_mb=0.02)\n"
        "build.make_shards(build.Job(Path(sys.argv[1]), Path(sys.argv[2]), options), workers=2)\n"
    )
    command = [sys.executable, "-c", program, str(images), str(out)]
    finished_before = []
    for moment in ("scan", "write"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        journal = out / build.WORK_NAME / ("scan.jsonl" if moment == "scan" else "shards.txt")
        while process.poll() is None:
            if journal.exists() and len(journal.read_bytes().splitlines()) > 3:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists(), "the kill came too late to prove anything"
        finished_before.append({path: path.stat().st_mtime_ns for path in out.glob("*.tar")})
    assert not finished_before[0]
    assert len(finished_before[1]) >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(tmp_path / "quiet" / "set")
    redone = [path for path, stamp in finished_before[1].items() if path.stat().st_mtime_ns != stamp]
    # a tar that was renamed but not yet recorded at the kill is written again: at most one for each worker
    assert len(redone) <= min(2, len(finished_before[1]) - 1)


def test_a_finished_shard_that_was_damaged_before_the_restart_is_written_again(
    image_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = image_folder(), tmp_path / "a" / "set"
    quiet = make_shards(Job(images, tmp_path / "b" / "set", SMALL), workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_shards(Job(images, out, SMALL), workers=2)
    with (out / "train-000001.tar").open("r+b") as file:
        file.write(b"damage")
    (out / "train-000099.tar.tmp").write_bytes(b"left by a kill")
    make_shards(Job(images, out, SMALL), workers=2)
    assert contents(out) == contents(quiet.folder)


def test_a_full_disk_is_one_clear_error_and_the_next_start_goes_on(
    image_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = image_folder(), tmp_path / "a" / "set"
    quiet = make_shards(Job(images, tmp_path / "b" / "set", SMALL), workers=2)
    written = 0

    def fill_up(self: writer._HashingFile, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    original = writer._HashingFile.write
    with monkeypatch.context() as patch:
        patch.setattr(writer._HashingFile, "write", fill_up)
        with pytest.raises(StorageError, match=r"writing a shard: No space left on device(.|\n)*free some space"):
            make_shards(Job(images, out, SMALL), workers=2)
    assert list(out.glob("*.tar"))
    assert not list(out.glob("*.tmp"))
    make_shards(Job(images, out, SMALL), workers=2)
    assert contents(out) == contents(quiet.folder)


def test_a_folder_that_cannot_be_written_is_a_clear_error(image_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="creating the folder of the set: Not a directory"):
        make_shards(Job(image_folder(), tmp_path / "file" / "out"), workers=2)


def test_two_at_once_cannot_write_one_set(image_folder: Folder, tmp_path: Path) -> None:
    with (
        build.work_folder(tmp_path / "out"),
        pytest.raises(ShardError, match="another `wasteddp shard` is writing"),
    ):
        make_shards(Job(image_folder(), tmp_path / "out"), workers=2)


def test_what_training_cannot_read_as_it_is_becomes_an_upright_rgb_jpeg(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
    picture = Image.open(io.BytesIO(draw_image("can", 0, size_px=64, seed=0))).resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(images / "a" / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(images / "a" / "cmyk.jpg")
    picture.convert("L").save(images / "a" / "grey.jpg")
    picture.save(images / "a" / "plain.jpg")
    picture.resize((200, 125)).save(images / "a" / "large.jpg")
    picture.save(images / "b" / "two.mpo", quality=95, save_all=True, append_images=[picture])
    picture.save(images / "b" / "x.png")
    picture.save(images / "b" / "x.bmp")
    picture.save(images / "b" / "x.webp", lossless=True)
    picture.convert("P").save(images / "b" / "x.gif", save_all=True, append_images=[picture.rotate(180).convert("P")])
    picture.quantize(16).save(images / "b" / "palette.png")
    grey16 = np.asarray(picture.convert("L"), dtype=np.uint16) * 257
    Image.fromarray(grey16).save(images / "b" / "sixteen.png")
    options = Options(fractions=(1, 0, 0), max_side_px=100)
    manifest = make_shards(Job(images, tmp_path / "out", options), workers=2)
    assert manifest.left_out == ()
    stored = {Path(str(s["source"])).name: s["jpg"] for s in read_samples(manifest.folder, "train")}
    assert len(stored) == 12
    as_they_were = {name for name, data in stored.items() if data == next(images.rglob(name)).read_bytes()}
    assert as_they_were == {"plain.jpg", "grey.jpg"}
    for name, data in stored.items():
        with Image.open(io.BytesIO(data)) as image:  # type: ignore[arg-type]
            assert image.format == "JPEG"
            assert image.mode == ("L" if name == "grey.jpg" else "RGB")
            assert image.size == {"turned.jpg": (40, 64), "large.jpg": (100, 62)}.get(name, (64, 40))
            if name in ("x.png", "x.bmp", "x.webp", "two.mpo", "sixteen.png"):
                wanted = picture.convert("L").convert("RGB") if name == "sixteen.png" else picture
                difference = np.abs(np.asarray(image, float) - np.asarray(wanted, float)).mean()
                assert difference < 4, name


def test_a_class_that_loses_all_its_images_is_an_error(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder({"a": 3, "b": 1})
    (images / "b" / "b1.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"the class b has no usable image; left out: b/b1\.jpg: empty"):
        make_shards(Job(images, tmp_path / "out"), workers=2)


def test_lists_decide_the_split_and_what_no_list_names_is_counted(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder({"a": 3, "b": 3})
    (tmp_path / "train.txt").write_text("a1.jpg 2\nb1.jpg 1\nb9.jpg 1\n")
    (tmp_path / "test.txt").write_text("a2.jpg 2\nb2.jpg 1\n")
    job = Job(images, tmp_path / "out", split_files=splits.parse_split_files([str(tmp_path)]))
    manifest = make_shards(job, workers=2)
    assert {s.name: s.samples_per_class for s in manifest.splits.values()} == {"train": (1, 1), "test": (1, 1)}
    assert [(left.source, left.reason) for left in manifest.left_out] == [
        ("a/a3.jpg", "not_listed"),
        ("b/b3.jpg", "not_listed"),
        ("b9.jpg", "unreadable"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.5, 0.1, 0.1)}, "add up to 0.7"),
        ({"quality": 0}, "--quality is 0"),
        ({"near_duplicate_distance": 12}, "give 0 to 11"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        make_shards(Job(tmp_path, tmp_path / "out", Options(**options)), workers=2)  # type: ignore[arg-type]


def test_a_split_source_is_not_split_again(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder({"train/a": 1, "train/b": 1, "test/a": 1})
    for options, message in (
        (Options(fractions=(0.7, 0.15, 0.15)), "is already split into test, train"),
        (Options(group_near_duplicates=True), "images that are already split"),
    ):
        with pytest.raises(SourceError, match=message):
            make_shards(Job(images, tmp_path / "out", options), workers=2)


def test_near_duplicates_across_splits_are_grouped_or_else_counted(tmp_path: Path) -> None:
    images = tmp_path / "images"
    draw_folder(images, kinds=KINDS[:2], images_per_class=20, size_px=96, seed=0)
    for path in sorted(images.rglob("*.jpg")):
        with Image.open(path) as image:
            image.save(path.with_name(f"again-{path.name}"), quality=70)
    options = {"fractions": (0.5, 0.25, 0.25)}
    ungrouped = Options(group_near_duplicates=False, **options)  # type: ignore[arg-type]
    apart = make_shards(Job(images, tmp_path / "1", ungrouped), workers=2)
    across = apart.near_duplicates["across_splits"]
    assert apart.near_duplicates["num_pairs"] >= 36
    assert sum(counts["pairs"] for counts in across.values()) == len(apart.near_duplicates["pairs"]) > 5
    first, _, second, _, _ = apart.near_duplicates["pairs"][0]
    assert Path(first).name.removeprefix("again-") == Path(second).name.removeprefix("again-")
    together = make_shards(Job(images, tmp_path / "2", Options(**options)), workers=2)  # type: ignore[arg-type]
    assert together.near_duplicates["pairs"] == []
    assert together.near_duplicates["largest_chain"] >= 2


def test_a_set_split_by_the_older_rule_keeps_it_and_its_manifest_is_as_before(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder()
    before = make_shards(Job(images, tmp_path / "out", Options(split_rule="hash")), workers=2)
    assert before.recipe["options"].keys() == {
        *("fractions", "split_seed", "max_side_px", "quality", "shard_mb", "keep_conflicts"),
        *("group_near_duplicates", "near_duplicate_distance", "max_left_out"),
    }
    assert before.recipe["options"]["fractions"] is None
    assert before.recipe["options"]["group_near_duplicates"] is False
    assert make_shards(Job(images, tmp_path / "out"), workers=2).sha256 == before.sha256
    assert "keeps its rule for splits, hash" in capsys.readouterr().out
    assert make_shards(Job(images, tmp_path / "out"), workers=2, overwrite=True).sha256 == before.sha256
    other = make_shards(Job(images, tmp_path / "out", Options(split_rule="stratified")), workers=2, overwrite=True)
    assert other.recipe["options"]["split_rule"] == "stratified"


def test_an_image_that_changes_between_the_passes_is_noticed(
    image_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_folder()
    original = scan.scan

    def scan_then_change(*args: object, **kwargs: object) -> scan.ScanResult:
        result = original(*args, **kwargs)  # type: ignore[arg-type]
        (images / "glass" / "glass1.jpg").write_bytes(jpeg(777))
        return result

    monkeypatch.setattr(scan, "scan", scan_then_change)
    with pytest.raises(SourceError, match=r"glass1\.jpg changed while it was being sharded"):
        make_shards(Job(images, tmp_path / "out"), workers=2)


def test_trashnet_has_its_three_conflicting_pairs_and_2521_images_remain(trashnet_zip: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "shards" / "trashnet.yaml"
    manifest = recipes.make_recipe(
        recipe, out=tmp_path / "out", local=trashnet_zip.parent, options=Options(), workers=2, overwrite=False
    )
    assert manifest.classes == ("glass", "paper", "cardboard", "plastic", "metal", "trash")
    assert {s.name: s.num_samples for s in manifest.splits.values()} == {"train": 1764, "val": 327, "test": 430}
    left_out = {Path(left.source).stem for left in manifest.left_out if left.reason == "conflicting_label"}
    assert left_out == {"glass176", "plastic152", "glass389", "plastic332", "glass115", "metal91"}
    assert len(manifest.left_out) == 6
    assert manifest.near_duplicates["across_splits"]["train-test"]["test_images"] >= 9


def test_classes_are_taken_from_a_set_or_a_model_and_absent_ones_are_reported(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = make_shards(Job(image_folder(), tmp_path / "trained", classes=("paper", "metal", "glass")), workers=2)
    own = image_folder({"glass": 2, "paper": 1}, name="own")
    (own / "metal").mkdir()
    command = ["shard", str(own), "--out", str(tmp_path / "out"), "--classes-from", str(trained.folder)]
    assert main([*command, "--fractions", "0,0,1"]) == 0
    assert "has no image of 1 of the 3 classes: metal" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.classes == trained.classes
    assert {name: split.samples_per_class for name, split in manifest.splits.items()} == {"test": (1, 0, 2)}
    (own / "metal").rename(own / "unknown")
    (own / "unknown" / "1.jpg").write_bytes(jpeg(99))
    with pytest.raises(SystemExit):
        main(["shard", str(own), "--out", str(tmp_path / "2"), "--classes-from", str(trained.folder)])
    assert "classes not expected: unknown" in capsys.readouterr().err


def test_a_set_that_is_extended_keeps_each_image_in_its_split(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder({"glass": 20, "metal": 20})
    (images / "glass" / "turned.png").write_bytes((images / "glass" / "glass1.jpg").read_bytes())
    Image.open(images / "glass" / "glass2.jpg").resize((50, 40)).save(images / "metal" / "encoded-again.png")
    old = make_shards(Job(images, tmp_path / "old", Options(split_seed=3)), workers=2)
    for number in range(60):
        (images / "metal" / f"new{number}.jpg").write_bytes(jpeg(1000 + number))
    new = make_shards(Job(images, tmp_path / "new", extends=old), workers=2)
    before, after = ({s["source"]: name for name in m.splits for s in read_samples(m.folder, name)} for m in (old, new))
    assert before.items() <= after.items()
    assert abs(new.splits["train"].samples_per_class[1] - 0.7 * 81) <= 2  # a chain counts for one class
    assert new.recipe["options"]["split_seed"] == 3
    assert new.recipe["extends"]["sha256"] == old.sha256
    with pytest.raises(SourceError, match="with other options for the split"):
        make_shards(Job(images, tmp_path / "3", Options(fractions=(0.8, 0.1, 0.1)), extends=old), workers=2)


def test_a_file_system_without_locks_is_named_and_used(
    image_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    make_shards(Job(image_folder({"glass": 3, "metal": 3}), tmp_path / "out"), workers=1)
    assert (
        f"{tmp_path / 'out'} cannot be locked (Function not implemented): it is marked as in use"
        in capsys.readouterr().out
    )


def test_the_manifest_counts_jpegs_with_faulty_markers(image_folder: Folder, tmp_path: Path) -> None:
    images = image_folder()
    sound = (images / "glass" / "glass1.jpg").read_bytes()
    (images / "glass" / "glass1.jpg").write_bytes(sound[:20] + b"\0\0\0" + sound[20:])
    manifest = make_shards(Job(images, tmp_path / "set", Options(fractions=(1, 0, 0))), workers=1)
    assert manifest.num_tolerated == 1
    assert json.loads((manifest.folder / "manifest.json").read_text())["num_tolerated"] == 1
    indexed = main(["index", str(manifest.folder), "--overwrite"])
    assert indexed == 0
    assert Manifest.load(manifest.folder).num_tolerated == 0  # it was encoded again
