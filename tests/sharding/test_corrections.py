"""Corrected labels from a CSV: taken, counted, recorded, and refused where they do not fit the source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_build import read_samples

from wasteddp.cli import main
from wasteddp.data.manifest import LeftOut, Manifest
from wasteddp.files import CsvWriter
from wasteddp.sharding.corrections import read_corrections
from wasteddp.sharding.sources.synthetic import KINDS

Folder = Callable[..., Path]


def labels_of(folder: Path) -> dict[str, str]:
    manifest = Manifest.load(folder)
    return {
        str(s["source"]): str(s["label"]) for split in manifest.splits for s in read_samples(manifest.folder, split)
    }


def test_labels_are_corrected_images_dropped_and_the_manifest_reports_it(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = image_folder(), tmp_path / "corrections.csv"
    (images / "glass" / "=1.jpg").write_bytes((images / "glass" / "glass1.jpg").read_bytes() + b"\0")
    (images / "glass" / "caf\udce9.jpg").write_bytes((images / "glass" / "glass2.jpg").read_bytes() + b"\0")
    with file.open("w", newline="") as text:
        writer = CsvWriter(text)
        for row in (
            ("path", "class", "action"),
            ("glass/glass3.jpg", "metal", ""),
            ("glass/=1.jpg", "paper", ""),
            ("glass/caf\\udce9.jpg", "paper", ""),
            ("paper\\paper1.jpg", "paper", ""),
            ("metal/metal2.jpg", "", "drop"),
        ):
            writer.write(row)
    out = tmp_path / "set"
    assert main(["shard", str(images), "--out", str(out), "--corrections", str(file)]) == 0
    assert "3 label(s) corrected, 1 confirmed, 1 image(s) dropped" in capsys.readouterr().out
    labels, manifest = labels_of(out), Manifest.load(out)
    assert labels["glass/glass3.jpg"] == "metal"
    assert labels["glass/=1.jpg"] == labels["glass/caf\udce9.jpg"] == labels["paper/paper1.jpg"] == "paper"
    assert "metal/metal2.jpg" not in labels
    assert manifest.left_out == (LeftOut("metal/metal2.jpg", "dropped", "dropped by corrections.csv"),)
    assert manifest.recipe["corrections"] == {
        "file": "corrections.csv",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "labels": 4,
        "dropped": 1,
    }
    assert main(["verify", str(out)]) == 0


def test_a_corrected_label_ends_a_conflict(image_folder: Folder, tmp_path: Path) -> None:
    images, file = image_folder(), tmp_path / "c.csv"
    (images / "paper" / "copy.jpg").write_bytes((images / "glass" / "glass1.jpg").read_bytes())
    file.write_text("path;class\npaper/copy.jpg;glass\n")
    assert main(["shard", str(images), "--out", str(tmp_path / "set"), "--corrections", str(file)]) == 0
    assert [left.reason for left in Manifest.load(tmp_path / "set").left_out] == ["duplicate"]


def test_the_same_command_finds_its_set_and_other_corrections_are_another_set(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = image_folder(), tmp_path / "c.csv"
    command = ["shard", str(images), "--out", str(tmp_path / "set"), "--corrections", str(file)]
    file.write_text("path,action\nglass/glass1.jpg,drop\n")
    assert main(command) == 0
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    file.write_text("path,action\nglass/glass2.jpg,drop\n")
    with pytest.raises(SystemExit):
        main(command)
    assert "finished set of other images or other options" in capsys.readouterr().err


def test_a_file_of_the_review_page_is_taken(
    image_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = image_folder(), tmp_path / "corrections.csv"
    (images / "metal").rename(images / "=metal")
    file.write_text(
        "path,label,class,action\nglass/glass1.jpg,glass,glass,confirm\nglass/glass2.jpg,glass,'=metal,correct\n"
        "glass/glass3.jpg,glass,,drop\n./=metal/metal1.jpg,'=metal,glass,correct\n"
    )
    assert main(["shard", str(images), "--out", str(tmp_path / "set"), "--corrections", str(file)]) == 0
    assert "2 label(s) corrected, 1 confirmed, 1 image(s) dropped" in capsys.readouterr().out
    labels = labels_of(tmp_path / "set")
    assert (labels["glass/glass1.jpg"], labels["glass/glass2.jpg"]) == ("glass", "=metal")
    assert labels["=metal/metal1.jpg"] == "glass"
    assert "glass/glass3.jpg" not in labels


def test_a_recipe_takes_corrections(tmp_path: Path) -> None:
    recipe, file = tmp_path / "tiny.yaml", tmp_path / "c.csv"
    recipe.write_text(
        "name: tiny\ntitle: t\nsynthetic: true\ndraw: {classes: 2, images_per_class: 8, size_px: 48}\n"
        "split: {fractions: [1, 0, 0]}\n"
    )
    kind, other = KINDS[:2]
    command = ["shard", str(recipe), "--out", str(tmp_path / "set")]
    assert main(command) == 0
    path = next(source for source in labels_of(tmp_path / "set") if source.startswith(kind))
    file.write_text(f"path,class\n{path},{other}\n")
    assert main([*command, "--overwrite", "--corrections", str(file)]) == 0
    assert labels_of(tmp_path / "set")[path] == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\nglass/gone.jpg,metal\n", "the source has no image glass/gone.jpg; its classes are glass, metal"),
        ("path,class\nglass/glass1.jpg,wood\n", "the source has no class wood; its classes are"),
        ("path,class\nx.jpg,wood\n", "the source has no image x.jpg; no class wood"),
        ("path,action\nglass/glass1.jpg,keep\n", "line 2: .* has no path, or neither a class nor the action drop"),
        ("path,class\nglass/glass1.jpg,\n", "neither a class"),
        ("path,class,action\nglass/glass1.jpg,,confirm\n", "neither a class"),
        ("path,class\n,glass\n", "has no path"),
        ("path,class\ng.jpg,glass\ng.jpg,metal\n", "line 3: 'g.jpg','metal','' is there twice"),
        ("name,class\na,b\n", "has the columns name, class"),
        ('path,class\n"a,b\n', "is not a CSV file"),
    ],
)
def test_corrections_that_do_not_fit_are_refused_with_one_message(
    image_folder: Folder, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.csv"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["shard", str(image_folder()), "--out", str(tmp_path / "set"), "--corrections", str(file)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_an_image_that_is_left_out_anyway_may_be_named(image_folder: Folder, tmp_path: Path) -> None:
    images, file = image_folder(), tmp_path / "c.csv"
    names = [f"{name}/{name}{number}.jpg" for name in ("glass", "metal", "paper") for number in range(1, 9)]
    (tmp_path / "train.txt").write_text("\n".join(names))
    file.write_text("path,class\nglass/glass9.jpg,metal\n")  # no list names it
    lists = ["--split-files", f"train={tmp_path / 'train.txt'}"]
    assert main(["shard", str(images), "--out", str(tmp_path / "s"), *lists, "--corrections", str(file)]) == 0
    assert read_corrections(file).class_of == {"glass/glass9.jpg": "metal"}
