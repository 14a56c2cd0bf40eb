"""Sources that are not folders of classes: what the messages advise, and tables as other programs write them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import jpeg

from wasteddp.data.decoding.decode import UndecodableError, check_image
from wasteddp.data.manifest import LeftOut, Manifest
from wasteddp.errors import RecipeError, SettingsError, ShardError, SourceError
from wasteddp.inference.predict import find_images
from wasteddp.sharding import scan
from wasteddp.sharding.build import Job, make_shards
from wasteddp.sharding.corrections import read_corrections
from wasteddp.sharding.job import list_images
from wasteddp.sharding.recipe import load_pairs
from wasteddp.sharding.selection import check_usable
from wasteddp.sharding.sources.archives import open_source
from wasteddp.sharding.sources.files import File
from wasteddp.sharding.sources.layout import SourceImage, read_folders, read_table
from wasteddp.tools.dashboard import load as load_dashboard

Folder = Callable[..., Path]


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(number) if name.endswith(".jpg") else b"text")
    return root


DETECTION = "its labels are boxes, not classes of images"


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["images/train/1.jpg", "labels/train/1.txt", "images/val/2.jpg"], DETECTION),
        (["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"], DETECTION),
        (["annotations/train.json", "train2017/1.jpg", "val2017/2.jpg"], DETECTION),
        (
            ["train.csv", "train/1.jpg", "test/2.jpg"],
            r"If train\.csv names the classes: .* shard .*/here/train\.csv --out",
        ),
        (["labels.csv", "1.jpg"], r"If labels\.csv names the classes"),
        (["inner.zip", "README.md"], r"Unpack inner\.zip first$"),
        (["a.zip", "b.zip", "c.zip", "d.zip"], r"Unpack a\.zip, b\.zip, c\.zip and 1 more first$"),
        (["train-000.tar"], r"if these are tars of webdataset: wasteddp index FOLDER"),
        (["train-000000.tar", "manifest.json"], r"If it is a shard set already, train on it: data\.shards"),
        (["notes.txt"], "a folder that holds one folder of images for each class$"),
        (["glass/1.jpg", "metal/2.jpg", "paper/notes.txt"], r"remove the empty folder\(s\)$"),
    ],
)
def test_a_source_of_another_kind_is_refused_with_what_to_do(names: list[str], advice: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "here", *names)
    with pytest.raises(SourceError, match=advice):
        read_folders(open_source(folder, work_folder=tmp_path), folder)


def test_an_archive_of_another_kind_names_the_files_in_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("train.csv", "image_id,label\n")
        archive.writestr("train/1.jpg", jpeg(1))
    with pytest.raises(
        SourceError, match=r"If train\.csv names .*: unpack the archive, and wasteddp shard FOLDER/train\.csv --out SET"
    ):
        read_folders(open_source(tmp_path / "outer.zip", work_folder=tmp_path), tmp_path / "outer.zip")


def test_a_zip_that_was_not_copied_to_its_end_is_called_incomplete(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("glass/1.jpg", jpeg(1))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:-60])
    with pytest.raises(SourceError, match="copy or download it again"):
        open_source(tmp_path / "cut.zip", work_folder=tmp_path)


@pytest.mark.parametrize("inside", ["", "set", "glass/set"])
def test_a_set_is_not_written_among_its_images(inside: str, image_folder: Folder) -> None:
    folder = image_folder({"glass": 2, "metal": 2})
    before = sorted(folder.rglob("*"))
    with pytest.raises(SourceError, match="is in the folder of the images"):
        make_shards(Job(folder, folder / inside), workers=1)
    assert sorted(folder.rglob("*")) == before
    for out in (folder / ".hidden" / "set", folder.parent / "images2"):  # hidden folders are not read as images
        assert len(list_images(Job(folder, out), folder.parent).layout.images) == 4


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={0}\r\n", "SEP={0}{0}\n"])
def test_rows_without_text_and_the_line_of_the_separator_are_not_read(
    separator: str, first: str, tmp_path: Path
) -> None:
    lines = ["path,label", "1.jpg,glass", ",", "2.jpg,metal", " , ", ",", ",,"]
    (tmp_path / "table.csv").write_text(first.format(separator) + "\n".join(lines).replace(",", separator))
    assert [image.class_name for image in read_table(tmp_path / "table.csv")[1].images] == ["glass", "metal"]
    lines = ["path,class,action", "1.jpg,glass,correct", ",,"]
    (tmp_path / "corrections.csv").write_text(first.format(separator) + "\n".join(lines).replace(",", separator))
    assert read_corrections(tmp_path / "corrections.csv").class_of == {"1.jpg": "glass"}
    line = 4 if first else 3
    for name, read, rows in (
        ("table.csv", read_table, ["path,label", "1.jpg,glass", "2.jpg,"]),
        ("corrections.csv", read_corrections, ["path,class,action", "1.jpg,glass,correct", "2.jpg,,"]),
    ):
        (tmp_path / name).write_text(first.format(separator) + "\n".join(rows).replace(",", separator))
        with pytest.raises(SourceError, match=rf"{name}, line {line}: '2\.jpg'"):
            read(tmp_path / name)


def test_a_row_with_a_path_alone_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,label\n1.jpg,glass\n,\n2.jpg,\n")
    with pytest.raises(SourceError, match=r"line 4: '2\.jpg','',''"):
        read_table(tmp_path / "table.csv")


def test_columns_that_are_not_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text("path,label,is_valid,Site\n1.jpg,glass,1,a\n2.jpg,metal,0,b\n")
    read_table(tmp_path / "table.csv")
    assert capsys.readouterr().out.endswith("columns that are not used: is_valid, site\n")
    read_table(tmp_path / "table.csv", group_column="Site")
    assert capsys.readouterr().out.endswith("columns that are not used: is_valid\n")
    (tmp_path / "table.csv").write_text("path,label,\n1.jpg,glass,\n2.jpg,metal,\n")
    read_table(tmp_path / "table.csv")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS, not the image"),
        (b"\n<!DOCTYPE html><html>404", "a web page, not an image"),
        (b"<HTML>", "a web page, not an image"),
        (b"text", "cannot identify image file"),
    ],
)
def test_what_a_download_left_in_the_place_of_an_image_is_named(data: bytes, detail: str) -> None:
    with pytest.raises(UndecodableError) as refused:
        check_image(data)
    assert (refused.value.reason, refused.value.detail[: len(detail)]) == ("unreadable", detail)


def test_a_scan_that_stops_reports_how_many_images_it_did_not_read(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder({"a": 60, "b": 60})
    for number in range(1, 61):
        (folder / "a" / f"a{number}.jpg").write_bytes(b"")
    source = open_source(folder, work_folder=tmp_path)
    images = read_folders(source, folder).images
    with pytest.raises(SourceError, match=r"13 of 120 images .* more than the 12 allowed; 107 were not read:"):
        scan.scan(source, images, workers=1, journal=tmp_path / "journal")


def test_a_class_without_a_usable_image_names_its_own_images() -> None:
    names = [("glass", "glass/1.jpg"), ("glass", "glass/2.jpg"), ("rare", "rare/3.jpg")]
    images = [SourceImage(File(path, 1, ""), name) for name, path in names]
    left_out = [LeftOut(path, "unreadable", "damaged") for _, path in names[1:]]
    with pytest.raises(
        SourceError, match=r"the class rare has no usable image; left out: rare/3\.jpg: unreadable: dam"
    ):
        check_usable(["glass", "rare"], images, [0], left_out)


def test_a_set_that_is_not_finished_is_not_taken_for_images(image_folder: Folder, tmp_path: Path) -> None:
    job = Job(image_folder({"glass": 6, "metal": 6}), tmp_path / "set")
    for name in "ab":
        (tmp_path / "images" / "glass" / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be used"):
        make_shards(replace(job, options=replace(job.options, max_left_out=0)), workers=1)
    with pytest.raises(ShardError, match="run the same `wasteddp shard` again: it continues"):
        Manifest.load(job.out)


def test_missing_and_unknown_bins_are_named(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder({"glass": 2, "metal": 2})
    job = Job(folder, tmp_path / "set", bins={"glass": "hub", "plastic": "yellow"})
    with pytest.raises(SourceError, match="without a bin: metal; bins of unknown classes: plastic;"):
        list_images(job, tmp_path)


def test_files_of_another_structure_are_refused_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "bins.yaml").write_text("hub: [glass, metal]\n")
    with pytest.raises(RecipeError, match="`class: bin`: hub: Input should be a valid string\n"):
        load_pairs(tmp_path / "bins.yaml", "bin")
    (tmp_path / "dashboard.yaml").write_text("name: 1\nsections: 2\n")
    with pytest.raises(SettingsError) as refused:
        load_dashboard(tmp_path / "dashboard.yaml")
    assert "sections: Input should be" in str(refused.value)
    assert "pydantic" not in str(refused.value)


def test_files_that_are_not_images_are_counted_below_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "photos", "1.jpg", "notes.txt", "inside/2.jpg", "inside/clip.mp4", "inside/photo")
    assert [Path(path).name for path in find_images([str(folder)])] == ["1.jpg", "2.jpg"]
    assert f"ignored 3 file(s) without the suffix of an image: {folder}/notes.txt, " in capsys.readouterr().err
    list(find_images([str(folder / "inside" / "2.jpg")]))
    assert not capsys.readouterr().err
