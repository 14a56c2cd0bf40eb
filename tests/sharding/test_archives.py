"""Folders, zips, tars and CSVs: which images, classes and splits are read from them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import jpeg

from wasteddp.errors import SourceError
from wasteddp.sharding.sources.archives import FolderSource, open_source
from wasteddp.sharding.sources.layout import Layout, read_folders, read_table


def understood(path: Path, tmp_path: Path) -> Layout:
    return read_folders(open_source(path, work_folder=tmp_path), path)


def write_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, b"" if name.endswith("/") else jpeg(number))
    return path


def write_tar(path: Path, names: list[str], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for number, name in enumerate(names):
            data = jpeg(number)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return Path(path)


def test_class_folders_are_classes_in_sorted_order(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    layout = understood(image_folder({"metal": 2, "glass": 1}), tmp_path)
    assert layout.classes == ("glass", "metal")
    assert [p.file.path for p in layout.images] == ["glass/glass1.jpg", "metal/metal1.jpg", "metal/metal2.jpg"]
    assert not layout.is_split


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_split_folders_are_splits(image_folder: Callable[..., Path], tmp_path: Path, word: str) -> None:
    layout = understood(image_folder({"train/a": 1, "train/b": 1, f"{word}/a": 1, "test/b": 1}), tmp_path)
    assert layout.classes == ("a", "b")
    assert sorted((p.split, p.class_name) for p in layout.images) == [
        ("test", "b"),
        ("train", "a"),
        ("train", "b"),
        ("val", "a"),
    ]


def test_wrapping_folders_hidden_files_and_macos_leftovers_are_skipped(tmp_path: Path) -> None:
    names = ["x/y/glass/1.jpg", "x/y/metal/2.jpg", "__MACOSX/x/y/glass/._1.jpg", "x/y/.DS_Store", "x/README.txt"]
    layout = understood(write_zip(tmp_path / "a.zip", names), tmp_path)
    assert [(p.class_name, p.file.path) for p in layout.images] == [
        ("glass", "x/y/glass/1.jpg"),
        ("metal", "x/y/metal/2.jpg"),
    ]
    assert layout.ignored == ("x/README.txt",)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_tar_gives_the_same_files_as_a_folder(tmp_path: Path, suffix: str) -> None:
    mode = "w:" + suffix.removeprefix("tar").removeprefix(".")
    path = write_tar(tmp_path / f"a.{suffix}", ["./s/glass/1.jpg", "./s/metal/2.jpg"], mode)
    source = open_source(path, work_folder=tmp_path)
    assert [file.path for file in source.files] == ["s/glass/1.jpg", "s/metal/2.jpg"]
    assert source.read("s/metal/2.jpg") == jpeg(1)


def test_members_that_point_outside_stay_names_and_write_nothing(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = write_zip(inner / "a.zip", ["../../glass/1.jpg", "../../metal/2.jpg"])
    assert understood(archive, inner).classes == ("glass", "metal")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "inner"]


def test_a_folder_that_links_to_its_parent_is_read_once(image_folder: Callable[..., Path]) -> None:
    folder = image_folder({"a": 1, "b": 1})
    (folder / "a" / "again").symlink_to(folder)
    assert len(FolderSource(folder).files) == 2


def test_a_changed_zip_member_is_an_os_error_not_other_bytes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ["a/1.jpg", "b/2.jpg"])
    content = bytearray(path.read_bytes())
    content[content.index(jpeg(0)) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        open_source(path, work_folder=tmp_path).read("a/1.jpg")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"glass": 2, "metal": 0}, r"1 class folder\(s\) of .* hold no image: metal"),
        ({"glass": 2}, r"has 1 class\(es\): glass"),
        ({"glass": 0, "metal": 0}, r"holds no images \(0 files, 2 folders\)"),
        (
            {"train/a": 1, "train/b": 1, "holdout/a": 3},
            r"mixes split folders and other folders: holdout \(3 images\)",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_refused(
    image_folder: Callable[..., Path], tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        understood(image_folder(counts), tmp_path)


def test_other_classes_than_the_recipe_names_are_refused(image_folder: Callable[..., Path]) -> None:
    source = FolderSource(image_folder({"a": 1, "b": 1}))
    with pytest.raises(SourceError, match="no images of: c; classes not expected: b"):
        read_folders(source, "here", classes=("c", "a"))
    assert read_folders(source, "here", classes=("b", "a")).classes == ("b", "a")


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"hello world")
    with pytest.raises(SourceError, match=r"a\.zip is neither a zip nor a tar \(it starts with b'hello '\)"):
        open_source(tmp_path / "a.zip", work_folder=tmp_path)
    with pytest.raises(SourceError, match=r"there is no .*nowhere"):
        open_source(tmp_path / "nowhere", work_folder=tmp_path)


def test_a_cut_compressed_tar_is_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", ["a/1.jpg", "b/2.jpg"], "w:gz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match="is damaged"):
        open_source(path, work_folder=tmp_path)


def test_a_table_gives_labels_and_splits(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    image_folder({"x": 3})
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufeffpath,label,split\nimages/x/x1.jpg,a,train\nimages/x/x2.jpg,b,valid\nimages/x/no.jpg,b,test\n"
    )
    source, layout = read_table(table)
    assert [(p.class_name, p.split) for p in layout.images] == [("b", "test"), ("a", "train"), ("b", "val")]
    assert source.read("images/x/x1.jpg") == jpeg(1)
    with pytest.raises(FileNotFoundError):
        source.read("images/x/no.jpg")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("folder", ["images/x/", "images\\x\\", "./images/x/"])
def test_tables_of_other_programs_are_read(image_folder: Callable[..., Path], separator: str, folder: str) -> None:
    table = image_folder({"x": 2}).parent / "labels.csv"
    rows = [("Path", " Label"), (f"{folder}x1.jpg", "a"), (f"{folder}x2.jpg", "b, c" if separator != "," else "b")]
    table.write_text("".join(separator.join(row) + "\r\n" for row in rows), encoding="utf-16")
    source, layout = read_table(table)
    assert [source.read(image.file.path) for image in layout.images] == [jpeg(1), jpeg(2)]
    assert layout.classes[0] == "a"


def test_a_backslash_that_is_part_of_a_name_stays(image_folder: Callable[..., Path]) -> None:
    folder = image_folder({"x": 2}).parent
    (folder / "images/x/x1.jpg").rename(folder / "x\\1.jpg")
    (folder / "labels.csv").write_text("path,label\nx\\1.jpg,a\nimages/x/x2.jpg,b\n")
    source, _ = read_table(folder / "labels.csv")
    assert source.read("x\\1.jpg") == jpeg(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n1.jpg,a\n", "has 1 rows and the columns file, class"),
        ("path,label\n1.jpg,a\n1.jpg,b\n", "line 3: '1.jpg','b','' is listed twice"),
        ("path,label,split\n1.jpg,a,holdout\n", "line 2: .*'holdout' .*unknown split"),
        ("path,label,split\n1.jpg,a,train\n2.jpg,b,\n", "1 of 2 rows have no split"),
    ],
)
def test_tables_that_are_wrong_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_table(tmp_path / "labels.csv")
