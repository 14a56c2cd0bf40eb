"""Damaged gallery.json and tracking.json, of a run that another person handed over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import jpeg

from wasteddp.errors import TrackingError
from wasteddp.training.tracking import pictures, wandb_client

BOMB = "[" * 100_000


def test_a_damaged_gallery_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = pictures.Picture(jpeg(1), {"true": "glass"})
    pictures.save(tmp_path, 3, pictures.Gallery("augmented", [picture], ("glass",)))
    facts = {"source": "a.jpg", "true": "a", "predicted": "b", "probability": 0.5}
    mistakes = pictures.Gallery("mistakes", [pictures.Picture(jpeg(1), facts)], ("a", "b"), [[1, 2], [3, 4]])
    pictures.save(tmp_path, 4, mistakes)
    right = (tmp_path / "media" / "step-00000004" / "gallery.json").read_text()
    wrong = (
        BOMB,
        "",
        "[]",
        '{"pictures": 1}',
        right.replace("00.jpg", "../../settings.yaml"),
        right.replace("00.jpg", "01.jpg"),  # not there
        right.replace('"true"', '"source"'),
        right.replace("0.5", '"0.5"'),
        right.replace('"b"\n ]', '"b", "c"\n ]'),
        right.replace("mistakes", "others"),
    )
    for step, text in enumerate(wrong, start=5):
        assert text != right
        shutil.copytree(tmp_path / "media" / "step-00000004", tmp_path / "media" / f"step-{step:08d}")
        (tmp_path / "media" / f"step-{step:08d}" / "gallery.json").write_text(text)
    pictures.save(tmp_path, 99, pictures.Gallery("augmented", [replace(picture, jpeg=b"no JPEG")], ("glass",)))
    (tmp_path / "media" / "step-x").mkdir()
    (folder, content), (_, of_mistakes) = pictures.listed(tmp_path, 0, 100)
    assert (folder.name, content["pictures"]) == ("step-00000003", [{"file": "00.jpg", "true": "glass"}])
    assert of_mistakes == json.loads(right)
    assert capsys.readouterr().err.count("its pictures are left out") == len(wrong) + 1


@pytest.mark.parametrize("text", [BOMB, "[]", "{}", '{"tags": 1}'])
def test_a_damaged_identity_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracking.json").write_text(text)
    with pytest.raises(TrackingError, match=r"tracking\.json cannot be read"):
        wandb_client.load_identity(tmp_path)
