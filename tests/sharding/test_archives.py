"""Folders, zips, tars and CSVs: which images, classes and splits are read from them."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import jpeg

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest
from wasteddp.errors import SourceError
from wasteddp.sharding.sources.archives import open_source
from wasteddp.sharding.sources.files import FolderSource
from wasteddp.sharding.sources.layout import Layout, read_folders, read_table, rename_classes, split_words


def understood(path: Path, tmp_path: Path) -> Layout:
    return read_folders(open_source(path, work_folder=tmp_path), path)


def write_zip(path: Path, names: list[str], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
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


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("training_set/training_set", "test_set/test_set"),
        ("train/train", "test/test"),
        ("train_images", "eval-images"),
        ("TrainSet", "valset2"),
        ("dev", "test1"),
        ("data/seg_train", "data/seg_test"),
        ("train1", "train2", "test"),
    ],
)
def test_split_folders_are_found_by_words(
    image_folder: Callable[..., Path], tmp_path: Path, names: tuple[str, ...]
) -> None:
    layout = understood(image_folder({f"{name}/{c}": 1 for name in names for c in ("a", "b")}), tmp_path)
    assert layout.classes == ("a", "b")
    assert {p.split for p in layout.images} == {next(iter(split_words(name))) for name in names}
    assert layout.ignored == ()


def test_a_lone_folder_train_is_a_split_and_words_in_class_names_are_not(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    assert {p.split for p in understood(image_folder({"Train/a": 1, "Train/b": 1}), tmp_path).images} == {"train"}
    layout = understood(image_folder({"test_tube": 1, "toy-train": 1, "glass": 1}, name="other"), tmp_path)
    assert (layout.classes, layout.is_split) == (("glass", "test_tube", "toy-train"), False)


def test_sites_are_refused_until_the_class_folders_are_named(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = FolderSource(image_folder({f"{site}/{c}": 1 for site in ("site1", "site2") for c in ("glass", "metal")}))
    with pytest.raises(SourceError, match="each of the 2 folders site1, site2 in here holds the folders glass, metal"):
        read_folders(source, "here")
    assert read_folders(source, "here", class_folders="inner").classes == ("glass", "metal")
    assert read_folders(source, "here", class_folders="outer").classes == ("site1", "site2")


def test_classes_are_renamed_and_merged(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder({"Glass": 1, "glass": 1, "m\u00e9tal": 1, "me\u0301tal": 1, "paper": 1})
    (tmp_path / "names.yaml").write_text("Glass: glass\n'm\u00e9tal': metal\n'me\u0301tal': metal\n", encoding="utf-8")
    assert main(["shard", str(folder), "--out", str(tmp_path / "plain"), "--fractions", "1,0,0"]) == 0
    output = capsys.readouterr().out
    assert r"case, spaces or Unicode form: 'Glass', 'glass'; 'me\u0301tal', 'm\xe9tal'; to merge" in output
    out = tmp_path / "out"
    command = ["shard", str(folder), "--out", str(out), "--fractions", "1,0,0"]
    assert main([*command, "--classes", str(tmp_path / "names.yaml")]) == 0
    assert "differ only" not in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert manifest.classes == ("glass", "metal", "paper")
    assert manifest.recipe["class_names"]["Glass"] == "glass"
    with pytest.raises(SourceError, match="has no class wood; its classes are Glass, glass"):
        rename_classes(read_folders(FolderSource(folder), "here"), {"wood": "paper"}, "here")


def test_links_to_folders_are_followed_once_in_sorted_order(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, other = image_folder({"a": 1, "b": 1}), image_folder({"x": 1, "x/deep": 1}, name="other")
    for link, target in (
        ("a/again", folder),
        ("a/above", tmp_path),
        ("z", other / "x"),
        ("c", other / "x"),
        ("b/same", folder / "a"),
        ("loop", folder / "loop"),
    ):
        (folder / link).symlink_to(target)
    source = FolderSource(folder)
    assert [file.path for file in source.files] == ["a/a1.jpg", "b/b1.jpg", "c/deep/deep1.jpg", "c/x1.jpg", "loop"]
    assert source.notes == [
        f"followed 1 link(s) to folders: {folder}/c",
        "did not follow 4 link(s) to folders that are read in another place or hold this one: "
        + ", ".join(f"{folder}/{link}" for link in ("a/above", "a/again", "b/same", "z")),
    ]


def test_folders_of_the_system_are_ignored_and_the_list_can_be_added_to(image_folder: Callable[..., Path]) -> None:
    folder = image_folder({"a": 1, "b": 1, "@eaDir/a.jpg": 1, "__MACOSX/a": 1, "a/.thumbs": 1, "masks": 1})
    source = FolderSource(folder, ignore=("mask*",))
    assert [file.path for file in source.files] == ["a/a1.jpg", "b/b1.jpg"]
    assert source.notes == [
        "ignored 4 hidden or system file(s) or folder(s): "
        + ", ".join(f"{folder}/{name}" for name in ("@eaDir", "__MACOSX", "masks", "a/.thumbs"))
    ]


def test_what_is_not_a_regular_file_is_left_out(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder({"a": 1, "b": 1})
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "a" / "zero.jpg").symlink_to("/dev/zero")
    (folder / "a" / "loop.jpg").symlink_to("loop.jpg")
    wrong = {"pipe.jpg": "a pipe or a device", "zero.jpg": "a pipe or a device", "loop.jpg": "Too many levels"}
    table = tmp_path / "images" / "t.csv"
    lines = [f"a/{name},a" for name in (*wrong, "a1.jpg", "n\0.jpg", "x" * 300 + ".jpg")]
    table.write_text("\n".join(["path,label", *lines, "b/b1.jpg,b"]))
    wrong |= {"n\0.jpg": "NUL", "x" * 300 + ".jpg": "File name too long"}
    for source in (FolderSource(folder), read_table(table)[0]):
        for file in source.files:
            if file.path.removeprefix("a/") in wrong:
                with pytest.raises(OSError, match=wrong[file.path.removeprefix("a/")]):
                    source.read(file.path)
    assert len(source.files) == 7


@pytest.mark.parametrize("encoding", ["", "utf-8", "cp932", "gbk"])
def test_names_in_a_zip_are_decoded_as_stated_or_refused(tmp_path: Path, encoding: str) -> None:
    class Raw(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            return self.filename.encode(encoding or "cp932"), self.flag_bits & ~0x800

    classes = ("\u8868\u793a\u677f", "\u8868\u7d19")  # in cp932 they have the byte 0x5C
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, name in enumerate(classes):
            archive.writestr(Raw(f"{name}/{number}.jpg"), jpeg(number))
    if encoding:
        stated = "" if encoding == "utf-8" else encoding
        source = open_source(tmp_path / "a.zip", work_folder=tmp_path, encoding=stated)
        assert read_folders(source, "here").classes == classes
        assert source.read(f"{classes[1]}/1.jpg") == jpeg(1)
    for wrong in ("", "ascii", "no-such") if encoding != "utf-8" else ("ascii",):
        with pytest.raises(SourceError, match="has names that are not"):
            open_source(tmp_path / "a.zip", work_folder=tmp_path, encoding=wrong)


def test_links_in_a_tar_are_resolved_and_names_keep_their_bytes(tmp_path: Path) -> None:
    def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return member

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(link("./b/early.jpg", tarfile.SYMTYPE, "../a/1.jpg"))
        member = tarfile.TarInfo("./a/1.jpg")
        member.size = len(jpeg(1))
        archive.addfile(member, io.BytesIO(jpeg(1)))
        archive.addfile(link("./b/hard.jpg", tarfile.LNKTYPE, "./a/1.jpg"))
        archive.addfile(link("./b/twice.jpg", tarfile.SYMTYPE, "early.jpg"))
        archive.addfile(link("./b/self.jpg", tarfile.SYMTYPE, "self.jpg"))
        archive.addfile(link("./b/x\udc95\\y.jpg", tarfile.SYMTYPE, "hard.jpg"))
    source = open_source(tmp_path / "a.tar", work_folder=tmp_path)
    names = ["a/1.jpg", "b/early.jpg", "b/hard.jpg", "b/self.jpg", "b/twice.jpg", "b/x\udc95\\y.jpg"]
    assert [file.path for file in source.files] == names
    for name in names:
        if name == "b/self.jpg":
            with pytest.raises(OSError, match=r"a link to self\.jpg, which is not a file in the archive"):
                source.read(name)
        else:
            assert source.read(name) == jpeg(1)


def test_a_damaged_header_within_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ["a/1.jpg", "b/2.jpg", "c/3.jpg"], "w")
    content = bytearray(path.read_bytes())
    content[content.index(b"b/2.jpg")] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is damaged: no header of a member at byte"):
        open_source(path, work_folder=tmp_path)


def test_a_changed_zip_member_is_an_os_error_not_other_bytes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ["a/1.jpg", "b/2.jpg"])
    content = bytearray(path.read_bytes())
    content[content.index(jpeg(0)) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        open_source(path, work_folder=tmp_path).read("a/1.jpg")


def test_a_damaged_deflated_member_is_an_os_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ["a/1.jpg", "b/2.jpg"], zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[37:87] = bytes(range(50, 100))
    path.write_bytes(content)
    source = open_source(path, work_folder=tmp_path)
    with pytest.raises(OSError, match="damaged member: Error -3"):
        source.read("a/1.jpg")
    assert source.read("b/2.jpg") == jpeg(1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"glass": 2, "metal": 0}, r"1 class folder\(s\) of .* hold no image: metal"),
        ({"glass": 2}, r"holds 1 class folder\(s\): glass\n"),
        ({"glass": 0, "metal": 0}, r"holds no images \(0 files, 2 folders\)"),
        (
            {"train/a": 1, "train/b": 1, "holdout/a": 3},
            r"mixes split folders and other folders: holdout \(3 images\)",
        ),
        ({"train_images": 2, "test_images": 2}, "4 images are in no class folder"),
        ({"train/a": 1, "val/a": 1, "dev/b": 1}, "has several folders for the split val"),
        ({"glass/train": 1, "glass/val": 1, "metal/train": 1, "metal/val": 1}, "holds the folders train, val"),
        ({"a": 1, "m\udce9tal": 1}, r"the class 'm\\udce9tal' has a name that is not UTF-8"),
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
        ("path,label\n1.jpg,a,,\n2.jpg,glass,brown\n", "line 3, has 3 cells, and the first line 2"),
        ("path,label,Label\n1.jpg,a,b\n", "two columns called 'label'"),
        ("path,label\n1.jpg,a\n1.jpg,b\n", "line 3: '1.jpg','b','' is listed twice"),
        ("path,label,split\n1.jpg,a,holdout\n", "line 2: .*'holdout' .*unknown split"),
        ("path,label,split\n1.jpg,a,train\n2.jpg,b,\n", "1 of 2 rows have no split"),
    ],
)
def test_tables_that_are_wrong_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_table(tmp_path / "labels.csv")


def test_a_zip_with_a_nameless_member_is_damaged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "photos.zip", ["a/1.jpg"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"")
    with pytest.raises(SourceError, match="it has a member without a name"):
        open_source(path, work_folder=tmp_path)
