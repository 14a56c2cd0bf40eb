"""Images of one site, camera, session or object are never divided between splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import jpeg
from test_build import contents, read_samples

from wasteddp.cli import main
from wasteddp.data.dataset import GROUPS_NAME, read_groups
from wasteddp.data.manifest import Manifest
from wasteddp.errors import ShardError, SourceError
from wasteddp.sharding import groups
from wasteddp.sharding.array_job import Part, read_part, write_part
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.files import File
from wasteddp.sharding.sources.layout import Layout, SourceImage, read_table
from wasteddp.sharding.verify import verify, verify_remote


def write_sites(folder: Path, num_sites: int = 8, each: int = 5, names: tuple[str, ...] = ("glass", "metal")) -> Path:
    """Write FOLDER/site<n>/CLASS/<n>.jpg."""
    for site in range(1, num_sites + 1):
        for number, name in enumerate(names):
            place = folder / f"site{site}" / name
            place.mkdir(parents=True)
            for image in range(each):
                (place / f"{image}.jpg").write_bytes(jpeg(1000 * site + 100 * number + image))
    return folder


def splits_of_groups(manifest: Manifest) -> dict[str, set[str]]:
    """Return the splits of each group, from the labels in the tars."""
    found: dict[str, set[str]] = {}
    for split in manifest.splits:
        for sample in read_samples(manifest.folder, split):
            found.setdefault(str(sample["group"]), set()).add(split)
    return found


SITES = Options(shard_mb=0.02, group_level=1)


def test_a_group_is_in_one_split_and_the_splits_are_stratified(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=20)
    manifest = make_shards(Job(images, tmp_path / "set", SITES, class_folders="inner"), workers=2)
    assert all(len(splits) == 1 for splits in splits_of_groups(manifest).values())
    assert {name: split.samples_per_class for name, split in manifest.splits.items()} == {
        "train": (70, 70),
        "val": (15, 15),
        "test": (15, 15),
    }
    assert manifest.groups["rule"] == "folder level 1"
    assert manifest.groups["num_groups"] == 20


@pytest.mark.parametrize("rule", ["stratified", "hash"])
def test_the_file_of_groups_is_that_of_the_tars(tmp_path: Path, rule: str) -> None:
    images = write_sites(tmp_path / "images", num_sites=40, each=1)
    options = Options(shard_mb=0.01, group_pattern=r"(?P<site>site\d+)/", split_rule=rule)
    manifest = make_shards(Job(images, tmp_path / "set", options, class_folders="inner"), workers=2)
    found = read_groups(manifest)
    assert found is not None
    assert found.rule == r"pattern (?P<site>site\d+)/"
    for split in manifest.splits:
        written = [sample["group"] for sample in read_samples(manifest.folder, split)]
        assert [found.names[number] for number in found.of_split(manifest, split)] == written
    assert all(len(splits) == 1 for splits in splits_of_groups(manifest).values())
    assert len(manifest.splits["train"].shards) > 1


def test_near_duplicates_of_two_groups_join_them(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=12)
    pairs = [("site1", "site2"), ("site2", "site3"), ("site3", "site4")]
    for number, (one, other) in enumerate(pairs):
        (images / one / "glass" / f"near{number}.jpg").write_bytes(jpeg(90_000 + number))
        (images / other / "glass" / f"also{number}.jpg").write_bytes(jpeg(90_000 + number) + b"\0")
    manifest = make_shards(Job(images, tmp_path / "set", SITES, class_folders="inner"), workers=2)
    splits = splits_of_groups(manifest)
    assert len(set().union(*(splits[f"site{n}"] for n in (1, 2, 3, 4)))) == 1
    assert manifest.near_duplicates["largest_chain"] == 46


@pytest.mark.parametrize("named", ["site3", "folder=site3"])
def test_a_left_out_group_is_the_test_split_and_in_no_other(tmp_path: Path, named: str) -> None:
    images = write_sites(tmp_path / "images")
    (images / "site1" / "glass" / "same.jpg").write_bytes((images / "site3" / "glass" / "0.jpg").read_bytes())
    options = Options(shard_mb=0.02, group_level=1, leave_out=(named,))
    manifest = make_shards(Job(images, tmp_path / "set", options, class_folders="inner"), workers=2)
    splits = splits_of_groups(manifest)
    assert [group for group, names in splits.items() if "test" in names] == ["site3"]
    assert splits["site3"] == {"test"}
    assert manifest.splits["test"].num_samples == 10  # the copy in site1 is left out, not this one
    assert [left.source for left in manifest.left_out] == ["site1/glass/same.jpg"]
    assert manifest.splits["val"].num_samples == 10


def test_near_duplicates_of_a_left_out_group_are_counted(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images")
    (images / "site1" / "glass" / "near.jpg").write_bytes((images / "site3" / "glass" / "0.jpg").read_bytes() + b"\0")
    options = Options(group_level=1, leave_out=("site3",), fractions=(1, 0, 0))
    manifest = make_shards(Job(images, tmp_path / "set", options, class_folders="inner"), workers=2)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 71, "test": 10}
    assert manifest.near_duplicates["across_splits"]["train-test"] == {"pairs": 1, "test_images": 1}


def write_csv(path: Path, rows: str) -> Path:
    path.write_text(rows)
    for seed, line in enumerate(rows.splitlines()[1:]):
        file = path.parent / line.split(",")[0]
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(jpeg(seed))
    return path


def test_a_column_of_the_csv_names_the_groups_and_one_of_them_is_left_out(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,{'ab'[n % 2]},cam{n // 4}\n" for n in range(32))
    table = write_csv(tmp_path / "table.csv", "path,label,Camera\n" + rows)
    assert main(["shard", str(table), "--out", str(tmp_path / "set"), "--group-column", "camera",
                 "--leave-out", "camera=cam2"]) == 0  # fmt: skip
    manifest = Manifest.load(tmp_path / "set")
    splits = splits_of_groups(manifest)
    assert splits.pop("cam2") == {"test"}
    assert all(len(names) == 1 and names <= {"train", "val"} for names in splits.values())
    assert manifest.groups["rule"] == "column camera"


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        ("site", "1.jpg,a,\n", r"line 3: '1.jpg' has no site"),
        ("place", "1.jpg,a,B\n", r"has no column place; its columns are path, label, site"),
    ],
)
def test_a_column_that_is_not_there_or_empty_is_refused(tmp_path: Path, column: str, row: str, message: str) -> None:
    table = write_csv(tmp_path / "table.csv", f"path,label,site\n0.jpg,b,A\n{row}")
    with pytest.raises(SourceError, match=message):
        read_table(table, group_column=column)


def layout_of(*paths: str, **splits: str) -> Layout:
    return Layout(tuple(SourceImage(File(path, 1, ""), "a", splits.get(path[0], "")) for path in paths), ("a", "b"))


@pytest.mark.parametrize(
    ("level", "pattern", "wanted"),
    [
        (1, "", ["x", "y"]),
        (2, "", ["1", "2"]),
        (-1, "", ["s3", "s4"]),
        (0, r"s(\d)", ["3", "4"]),
        (0, r"(s)(?P<session>\d)", ["3", "4"]),
        (0, r"s\d", ["s3", "s4"]),
    ],
)
def test_groups_are_found_in_paths(level: int, pattern: str, wanted: list[str]) -> None:
    found = groups.assign_groups(layout_of("x/1/s3/a.jpg", "y/2/s4/a.jpg"), level, pattern)
    assert [image.group for image in found.images] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_level": 1, "group_pattern": "x"}, "more than one of --group-column"),
        ({"group_pattern": "("}, "is not a regular expression"),
        ({"leave_out": ("B",)}, "--leave-out B is given without groups"),
        ({"group_column": "site"}, "is not a CSV"),
        ({"group_level": 4}, "16 of 16 images have no group by folder level 4, such as site1/glass/0.jpg"),
        ({"group_pattern": "site1"}, "8 of 16 images have no group by pattern site1"),
        ({"group_level": 1, "leave_out": ("site9",)}, "no such group; by folder level 1 the groups are site1, site2"),
        ({"group_pattern": "(?P<site>site.)", "leave_out": ("camera=site1",)}, "--leave-out camera=site1: there is no"),
        ({"group_level": 1}, r"of 16 images, test would have none .*8 of them are in one group.* stay in one split"),
    ],
)
def test_groups_that_cannot_be_had_are_refused_with_one_message(
    tmp_path: Path, options: Mapping[str, object], message: str
) -> None:
    images = write_sites(tmp_path / "images", num_sites=2, each=4)
    with pytest.raises(SourceError, match=message):
        make_shards(Job(images, tmp_path / "set", Options(**options), class_folders="inner"), workers=1)  # type: ignore[arg-type]
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_group_that_a_list_puts_into_two_splits_is_refused_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_sites(tmp_path / "images", num_sites=3, each=2)
    (tmp_path / "train.txt").write_text("site1/glass/0.jpg\nsite1/metal/0.jpg\nsite2/glass/0.jpg\nsite3/metal/1.jpg\n")
    (tmp_path / "test.txt").write_text("site2/metal/1.jpg\nsite2/glass/1.jpg\n")
    command = ["shard", str(images), "--out", str(tmp_path / "set"), "--class-folders", "inner", "--split-files",
               f"train={tmp_path / 'train.txt'}", f"test={tmp_path / 'test.txt'}"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--group-level", "1"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "1 group(s) are in two splits: site2; of site2, site2/glass/0.jpg is in train and" in error
    assert "Traceback" not in error
    (tmp_path / "test.txt").write_text("site3/glass/0.jpg\n")
    (tmp_path / "train.txt").write_text("site1/glass/0.jpg\nsite1/metal/0.jpg\nsite2/glass/0.jpg\n")
    assert main([*command, "--group-level", "1"]) == 0
    assert splits_of_groups(Manifest.load(tmp_path / "set"))["site3"] == {"test"}


def test_split_folders_that_divide_a_group_are_refused(tmp_path: Path) -> None:
    for place in ("train/glass/s1", "train/metal/s2", "test/glass/s1", "test/metal/s3"):
        (tmp_path / "images" / place).mkdir(parents=True)
        (tmp_path / "images" / place / "a.jpg").write_bytes(jpeg(len(place) + ord(place[-1])))
    with pytest.raises(SourceError, match="1 group"):
        make_shards(Job(tmp_path / "images", tmp_path / "set", Options(group_level=-1)), workers=1)


@pytest.mark.parametrize("inside", ["", "all/data/", "train/"])
def test_folders_of_sites_are_offered_with_the_command_to_type(
    tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sites(tmp_path / "my images" / inside)
    if inside == "train/":
        write_sites(tmp_path / "my images" / "test")
    out = tmp_path / "set"
    with pytest.raises(SystemExit) as stopped:
        main(["shard", str(tmp_path / "my images"), "--out", str(out)])
    assert stopped.value.code == 2
    level = {"": 1, "all/data/": 3, "train/": 2}[inside]
    command = f"wasteddp shard '{tmp_path}/my images' --out {out} --class-folders inner --group-level {level}"
    assert command in capsys.readouterr().err.splitlines()[3]
    if inside != "train/":
        capsys.readouterr()
        more = ["shard", str(tmp_path / "my images"), "--out", str(out), "--class-folders", "inner"]
        assert main([*more, "--overwrite"]) == 0
        assert f"{command}\n" in capsys.readouterr().out
        more.append("--overwrite")
        assert main([*more, "--group-level", str(level), "--leave-out", "site1"]) == 0
        assert splits_of_groups(Manifest.load(out))["site1"] == {"test"}


def test_parts_make_the_bytes_of_one_machine(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images")
    options = Options(shard_mb=0.01, group_level=1, folds=2, fractions=(1, 0, 0))
    job = Job(images, tmp_path / "many" / "set", options, class_folders="inner")
    for stage in (read_part, write_part):
        for number in (2, 1):
            stage(job, Part(number, 2), workers=1)
    make_shards(job, workers=1)
    make_shards(Job(images, tmp_path / "one" / "set", options, class_folders="inner"), workers=2)
    assert contents(tmp_path / "many" / "set") == contents(tmp_path / "one" / "set")
    assert GROUPS_NAME in contents(tmp_path / "one" / "set")


def test_a_set_with_groups_is_extended_by_their_splits(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images")
    old = make_shards(Job(images, tmp_path / "old", SITES, class_folders="inner"), workers=1)
    before = splits_of_groups(old)
    for site in (1, 2, 3):
        for file in (images / f"site{site}").rglob("*.jpg"):  # the old images are gone, new ones of the site came
            file.write_bytes(jpeg(50_000 + 100 * site + int(file.stem) + 10 * (file.parent.name == "glass")))
            file.rename(file.with_name(f"new{file.name}"))
    new = make_shards(Job(images, tmp_path / "new", Options(), class_folders="inner", extends=old), workers=1)
    assert splits_of_groups(new) == before


def test_verify_finds_a_damaged_file_of_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_sites(tmp_path / "images")
    manifest = make_shards(Job(images, tmp_path / "set", SITES, class_folders="inner"), workers=1)
    assert main(["verify", str(manifest.folder)]) == 0
    assert verify_remote(manifest.folder.as_uri(), workers=1).damage == ()
    file = manifest.folder / GROUPS_NAME
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ShardError, match=r"groups.bin has .* bytes and another sha256"):
        read_groups(manifest)
    for found in (verify(manifest.folder, workers=1), verify_remote(manifest.folder.as_uri(), workers=1)):
        assert GROUPS_NAME in found.damage[0]
        assert len(found.damage) == 1
    num_samples = sum(split.num_samples for split in manifest.splits.values())
    for head, number in ((b"[" * 100_000, 0), (b"{}", 0), (b'["a"]', 1)):  # with the right hash
        content = head + b"\n" + number.to_bytes(4, "little") * num_samples
        file.write_bytes(content)
        record = {**manifest.groups, "sha256": hashlib.sha256(content).hexdigest()}
        with pytest.raises(ShardError, match=r"the names of the groups in .* cannot be read"):
            read_groups(replace(manifest, groups=record))
    file.unlink()
    assert GROUPS_NAME in verify(manifest.folder, workers=1).damage[0]


def test_compare_reports_groups_that_two_sets_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_sites(tmp_path / "images")
    other = tmp_path / "other"
    seeds = iter(range(70_000, 80_000))
    for site, place in (("site1", "site1"), ("x", "site7"), ("y", "site8")):
        for file in (images / place).rglob("*.jpg"):
            (other / site / file.parent.name).mkdir(parents=True, exist_ok=True)
            (other / site / file.parent.name / file.name).write_bytes(jpeg(next(seeds)))
    first = make_shards(
        Job(images, tmp_path / "1", Options(group_level=1, leave_out=("site1",)), class_folders="inner"), workers=1
    )
    second = make_shards(
        Job(other, tmp_path / "2", Options(group_level=1, fractions=(1, 0, 0)), class_folders="inner"), workers=1
    )
    capsys.readouterr()
    assert main(["compare", str(first.folder), str(second.folder), "--workers", "1"]) == 1
    line = f"1 group(s) by folder level 1 of {second.where} train are also in {first.where} test: site1"
    assert line in capsys.readouterr().out


def test_a_set_without_groups_has_no_file_and_the_same_manifest_as_before(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images")
    manifest = make_shards(Job(images, tmp_path / "set", Options(), class_folders="inner"), workers=1)
    text = json.loads((manifest.folder / "manifest.json").read_text())
    assert not {"groups", "num_tolerated"} & text.keys()
    assert not {"folds", "leave_out", "group_level"} & text["recipe"]["options"].keys()
    assert read_groups(manifest) is None
    assert "group" not in read_samples(manifest.folder, "train")[0]
