"""What a new user brings: names that look the same, paths that are wrong, photographs without classes, copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import jpeg

from wasteddp.cli import main
from wasteddp.data.manifest import LeftOut, Manifest, Split
from wasteddp.data.summary import summarise
from wasteddp.errors import RecipeError, SourceError, joined, visible
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.groups import assign_groups
from wasteddp.sharding.job import list_images
from wasteddp.sharding.recipe import load_pairs
from wasteddp.sharding.sources.files import FolderSource
from wasteddp.sharding.sources.layout import (
    Layout,
    alike,
    check_classes,
    read_folders,
    read_table,
    require_files,
    warn_of_similar,
)

Folder = Callable[..., Path]
NFC, NFD = "m\u00e9tal", "me\u0301tal"
ALL_TRAIN = Options(fractions=(1.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("glass", "glass"),
        (NFC, NFC),
        (NFD, r"'me\u0301tal'"),
        ("glass ", "'glass '"),
        ("two  spaces", "'two  spaces'"),
        ("soft\u00adhyphen", r"'soft\xadhyphen'"),
        ("", "''"),
    ],
)
def test_names_that_could_be_mistaken_are_quoted(name: str, shown: str) -> None:
    assert visible(name) == shown
    assert joined(["paper", name]) == f"paper, {shown}"


def test_a_warning_has_the_line_that_merges_similar_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_similar([NFC, NFD, "glass"], "here")
    said = capsys.readouterr().out
    assert r"'me\u0301tal', 'm\xe9tal'; to merge them" in said
    warn_of_similar([NFC, NFD, "glass", "metal", "Metal", "METAL"], "here")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "'METAL', 'Metal', 'metal'; 'me" in first
    (tmp_path / "names.yaml").write_text("\n".join(line.strip() for line in lines))
    assert load_pairs(tmp_path / "names.yaml", "name") == {NFD: NFC, "METAL": "metal", "Metal": "metal"}
    warn_of_similar(["Glass", "metal"], "here", old=["glass", "metal"])
    said = capsys.readouterr().out
    assert "'Glass', 'glass' (also compared with the set that is extended)" in said
    assert said.endswith("\n    Glass: glass\n")
    warn_of_similar(["glass", "metal"], "here", old=["glass", "metal"])
    assert not capsys.readouterr().out


def test_a_set_is_extended_by_classes_of_another_form_only_with_a_warning(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_shards(Job(image_folder({NFC: 2, "glass": 1}), tmp_path / "old", ALL_TRAIN), workers=1)
    (tmp_path / "images" / NFC).rename(tmp_path / "images" / NFD)
    job = Job(tmp_path / "images", tmp_path / "new", extends=old)
    list_images(job, tmp_path)
    said = capsys.readouterr().out
    assert "warning: the classes are not those of" in said
    assert r"new: 'me\u0301tal'; without images: métal" in said
    assert "differ only in case" in said
    list_images(Job(tmp_path / "images", tmp_path / "new", extends=old, class_names={NFD: NFC}), tmp_path)
    assert "warning" not in capsys.readouterr().out


def test_classes_of_a_run_are_taken_under_other_names(image_folder: Folder, tmp_path: Path) -> None:
    folder, wanted = image_folder({NFD: 1, "glass": 1}), (NFC, "glass")
    with pytest.raises(SourceError, match=r"no images of: métal; classes not expected: 'me\\u0301tal'") as refused:
        list_images(Job(folder, tmp_path / "out", classes=wanted), tmp_path)
    assert r'--classes FILE with `"me\u0301tal": "m\xE9tal"` renames' in str(refused.value)
    renamed = Job(folder, tmp_path / "out", classes=wanted, class_names={NFD: NFC})
    assert list_images(renamed, tmp_path).layout.classes == wanted
    assert alike("GLASS", wanted) == "glass"
    assert alike("wood", wanted) == ""


def test_folders_and_tables_lose_the_spaces_at_the_ends_of_names(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder({"glass ": 1, "glass": 1, " site/x": 0, "metal": 1})
    (folder / " site" / "x").rmdir()
    (folder / " site").rmdir()
    layout = read_folders(FolderSource(folder), "here")
    assert layout.classes == ("glass", "metal")
    assert layout.notes() == ["removed the spaces at the ends of 1 class name(s): 'glass '"]
    (tmp_path / "table.csv").write_text(
        "path,label\nimages/glass /glass 1.jpg, glass \nimages/metal/metal1.jpg,metal\n"
    )
    _, table = read_table(tmp_path / "table.csv")
    assert table.classes == layout.classes
    (tmp_path / "names.yaml").write_text("'glass ': ' bottle'\n")
    assert load_pairs(tmp_path / "names.yaml", "name") == {"glass": "bottle"}
    for text in ("glass: bottle\n'glass ': jar\n", "glass: ' '\n"):
        (tmp_path / "names.yaml").write_text(text)
        with pytest.raises(RecipeError, match="two lines are for one class, apart from spaces"):
            load_pairs(tmp_path / "names.yaml", "name")
    assert {image.group for image in assign_groups(layout, 1, "").images} == {"glass", "metal"}
    assert {image.group for image in assign_groups(layout, 0, "^[^/]+").images} == {"glass", "metal"}


def test_a_class_without_a_name_is_refused(image_folder: Folder) -> None:
    with pytest.raises(SourceError, match="the class '' has no name"):
        read_folders(FolderSource(image_folder({" ": 1, "glass": 1})), "here")


def table_of(folder: Path, there: int, missing: int) -> tuple[Path, Layout]:
    """Write a CSV of two classes in turn, next to the images that are there."""
    lines = ["path,label,split"]
    for number in range(there + missing):
        if number < there:
            (folder / f"{number}.jpg").write_bytes(jpeg(number))
        lines.append(f"{number}.jpg,{'ab'[number % 2]},train")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv", read_table(folder / "table.csv")[1]


def test_a_table_whose_files_do_not_exist_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = table_of(tmp_path, there=2, missing=12)
    with pytest.raises(SourceError) as refused:
        list_images(Job(table, tmp_path / "out"), tmp_path)
    message = str(refused.value)
    assert message.startswith(f"12 of the 14 files of {table} do not exist")
    assert f"in its folder, {tmp_path}:\n    10.jpg\n" in message
    assert "move the CSV" in message
    (tmp_path / "elsewhere").mkdir()
    table = table.rename(tmp_path / "elsewhere" / "table.csv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "10.jpg").write_bytes(jpeg(10))
    with pytest.raises(SourceError, match=f"the first exists in {tmp_path}"):
        list_images(Job(table, tmp_path / "out"), tmp_path)


def test_a_few_missing_files_of_a_table_are_reported_and_a_lost_class_or_split_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, layout = table_of(tmp_path, there=4, missing=1)
    require_files(table, layout.images, allowed=1)
    assert "1 of the 5 files" in capsys.readouterr().out
    with pytest.raises(
        SourceError, match=r"1 of the 5 files .* do not exist, and 0 may be missing(.|\n)*--max-left-out"
    ):
        require_files(table, layout.images, allowed=0)
    table.write_text("path,label,split\n0.jpg,a,train\n1.jpg,b,train\nno.jpg,a,test\n")
    images = read_table(table)[1].images
    with pytest.raises(SourceError, match=r"1 of the 3 files .* do not exist, among them all of the split test; "):
        require_files(table, images, allowed=10)
    require_files(table, images, allowed=10, may_lack=True)


@pytest.mark.parametrize("may_lack", [False, True])
def test_photographs_without_class_folders_are_counted(tmp_path: Path, may_lack: bool) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    with pytest.raises(SourceError, match=r"0 class folder\(s\), and 3 image\(s\) in no class folder, such as 0\.jpg"):
        read_folders(FolderSource(tmp_path), "here", may_lack=may_lack)
    (tmp_path / "glass").mkdir()
    (tmp_path / "0.jpg").rename(tmp_path / "glass" / "0.jpg")
    with pytest.raises(SourceError, match=r"1 class folder\(s\): glass, and 2 image\(s\)"):
        read_folders(FolderSource(tmp_path), "here")
    with pytest.raises(SourceError, match="with two labels in a CSV"):
        check_classes({"glass"}, (), "here")


def test_the_summary_names_what_to_do_about_copies_and_missing_classes() -> None:
    left_out = (
        LeftOut("a.jpg", "conflicting_label", "same bytes as b.jpg (metal)"),
        LeftOut("c.jpg", "duplicate", "same bytes as d.jpg, which is kept"),
    )
    splits = {name: Split(name, (), (number, 3)) for name, number in (("train", 2), ("val", 1), ("test", 0))}
    said = summarise(Manifest(Path("set"), "set", ("rare ", "metal"), splits, left_out=left_out))
    assert "test has no samples of 'rare '" in said
    assert "--fractions" in said
    assert "--least-per-class" in said
    assert "--corrections FILE" in said
    assert "--keep-conflicts" in said
    assert "left out, duplicate: 1; manifest.json names them" in said
    assert "val has no samples" not in said


def test_only_images_that_were_read_before_are_counted_as_such(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = image_folder({"glass": 2, "metal": 2}), tmp_path / "out"
    cut = [folder / "metal" / f"metal{number}.jpg" for number in (1, 2)]
    for path in cut:
        path.write_bytes(b"")
    command = ["shard", str(folder), "--out", str(out), "--fractions", "1,0,0", "--workers", "1"]
    with pytest.raises(SystemExit):
        main(command)  # metal has no usable image
    for number, path in enumerate(cut):
        path.write_bytes(jpeg(100 + number))
    assert main(command) == 0
    assert "4 images in" in (said := capsys.readouterr().out)
    assert "2 of them were read before" in said
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        main([*command, "--leave-out", "x"])  # before anything is read
    assert main(command) == 0
    assert "images/s" in (said := capsys.readouterr().out)
    assert "read before" not in said
