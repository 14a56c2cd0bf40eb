"""Damaged gallery.json and tracking.json, of a run that another person handed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from wasteddp.errors import TrackingError
from wasteddp.training.tracking import pictures, wandb_client

BOMB = "[" * 100_000


def test_a_damaged_gallery_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = pictures.Picture(b"jpeg", {"true": "glass"})
    pictures.save(tmp_path, 3, pictures.Gallery("augmented", [picture], ("glass",)))
    wrong = (BOMB, "", "[]", '{"pictures": 1}', '{"pictures": [{"file": "../../settings.yaml"}]}')
    for step, text in enumerate(wrong, start=4):
        (tmp_path / "media" / f"step-{step:08d}").mkdir()
        (tmp_path / "media" / f"step-{step:08d}" / "gallery.json").write_text(text)
    (tmp_path / "media" / "step-x").mkdir()
    ((folder, content),) = pictures.listed(tmp_path, 0, 100)
    assert (folder.name, content["pictures"]) == ("step-00000003", [{"file": "00.jpg", "true": "glass"}])
    assert capsys.readouterr().err.count("its pictures are left out") == len(wrong)


@pytest.mark.parametrize("text", [BOMB, "[]", "{}", '{"tags": 1}'])
def test_a_damaged_identity_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracking.json").write_text(text)
    with pytest.raises(TrackingError, match=r"tracking\.json cannot be read"):
        wandb_client.load_identity(tmp_path)
