"""Images in two splits, under two labels or in two sets are reported."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from wasteddp.cli import main
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.synthetic import draw_image


def write_tar(path: Path, samples: dict[str, tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (label, image) in samples.items():
            for suffix, data in (("jpg", image), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_index_and_verify_report_images_in_two_splits_and_under_two_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [draw_image("can", number, size_px=64, seed=0) for number in range(4)]
    write_tar(tmp_path / "train-0.tar", {"a": ("can", images[0]), "b": ("box", images[1]), "c": ("can", images[2])})
    write_tar(tmp_path / "val-0.tar", {"d": ("can", images[3]), "e": ("can", images[0]), "f": ("can", images[1])})
    for command in (["index", str(tmp_path)], ["verify", str(tmp_path)]):
        assert main([*command, "--workers", "1"]) == 0
        out = capsys.readouterr().out
        assert "2 image(s) of val are also in train, byte for byte: a.jpg in train-0.tar = e.jpg in val-0.tar;" in out
        assert "1 image(s) have several labels: b.jpg in train-0.tar (box) and f.jpg in val-0.tar (can)" in out


def folder_of(folder: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(("split", "code"), [("test", 1), ("train", 0)])
def test_two_sets_are_compared_by_split(
    tmp_path: Path, split: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {(kind, n): draw_image(kind, n, size_px=128, seed=0) for kind in ("can", "box") for n in range(6)}
    copy = io.BytesIO()
    Image.open(io.BytesIO(drawn["can", 0])).save(copy, "JPEG", quality=60)
    first = folder_of(
        tmp_path / "1", {f"train/{kind}/{n}.jpg": drawn[kind, n] for kind in ("can", "box") for n in (0, 1)}
    )
    second = folder_of(
        tmp_path / "2", {f"train/{kind}/{n}.jpg": drawn[kind, n] for kind in ("can", "box") for n in (2, 3)}
    )
    folder_of(second, {f"{split}/can/near.jpg": copy.getvalue(), f"{split}/box/same.jpg": drawn["box", 1]})
    for number, source in (("1", first), ("2", second)):
        make_shards(Job(source, tmp_path / "sets" / number, Options()), workers=1)
    capsys.readouterr()
    one, two = (str(tmp_path / "sets" / number) for number in "12")
    assert main(["compare", one, two, "--workers", "1"]) == code
    out = capsys.readouterr().out
    assert f"1 image(s) of {two} {split} are also in {one} train, byte for byte: train-0000000" in out
    assert f"2 image(s) of {two} {split} also show in {one} train, identical ones included: train-0000000" in out
    assert main(["compare", one, one, "--workers", "1"]) == 0


def test_sets_without_a_common_image_share_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        images = {
            f"train/{k}/{n}.jpg": draw_image(k, n, size_px=128, seed=number) for k in ("can", "box") for n in (0, 1)
        }
        make_shards(Job(folder_of(tmp_path / f"i{number}", images), tmp_path / f"s{number}"), workers=1)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "s0"), str(tmp_path / "s1")]) == 0
    assert capsys.readouterr().out.startswith(f"no image of {tmp_path / 's1'} is in {tmp_path / 's0'}")
