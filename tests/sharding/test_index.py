"""Tars of other tools get a manifest, or an error that says why not."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pictures import jpeg
from PIL import Image

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest, read_index
from wasteddp.errors import ShardError, SourceError
from wasteddp.sharding.index import choose_splits, index_folder
from wasteddp.sharding.verify import verify


def write_tar(path: Path, members: Mapping[str, bytes], *, tar_format: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def indexed_images(manifest: Manifest) -> list[tuple[str, int, bytes]]:
    found = []
    for split in manifest.splits.values():
        for shard in split.shards:
            tar = (manifest.folder / shard.tar).read_bytes()
            for record in read_index(manifest.folder, shard):
                begin = int(record["offset"])
                found.append((split.name, int(record["label"]), tar[begin : begin + int(record["length"])]))
    return found


def test_a_set_of_webdatasets_own_writer_is_indexed_by_class_number(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("valid", 2)):
        with webdataset.TarWriter(str(tmp_path / f"{split}-000.tar")) as writer:
            for number in range(count):
                writer.write({"__key__": f"{split}{number}", "jpg": jpeg(number), "cls": number % 2})
    manifest = index_folder(tmp_path, workers=2, classes=("glass", "metal"))
    assert manifest.classes == ("glass", "metal")
    assert indexed_images(manifest) == [
        *(("train", n % 2, jpeg(n)) for n in range(5)),
        *(("val", n % 2, jpeg(n)) for n in range(2)),
    ]
    assert verify(tmp_path, workers=1).damage == ()


def test_a_jpeg_with_faulty_markers_is_indexed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = jpeg(1).index(b"\xff\xda") + 11
    faulty = jpeg(1)[:place] + bytes(3) + jpeg(1)[place + 3 :]
    write_tar(tmp_path / "train.tar", {"1.jpg": faulty, "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"1"})
    manifest = index_folder(tmp_path, workers=1)
    assert indexed_images(manifest) == [("train", 0, faulty), ("train", 1, jpeg(2))]
    assert "1 JPEG(s) have faulty markers and are used, since all their pixels decode: train.tar/1" in (
        capsys.readouterr().out
    )


def test_img2dataset_tars_take_their_label_from_the_json(tmp_path: Path) -> None:
    members = {}
    for number, name in enumerate(("metal", "glass")):
        members[f"0000{number}.jpg"] = jpeg(number)
        members[f"0000{number}.json"] = json.dumps({"caption": "x", "kind": name, "status": "success"}).encode()
        members[f"0000{number}.txt"] = b"x"
    write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(ShardError, match=r"sample '00000' \(jpg, json, txt\) has no label"):
        index_folder(tmp_path, workers=1)
    manifest = index_folder(tmp_path, workers=1, label_keys=("kind",))
    assert manifest.classes == ("glass", "metal")
    assert [(split, label) for split, label, _ in indexed_images(manifest)] == [("train", 1), ("train", 0)]


def test_labels_lose_the_spaces_at_their_ends(tmp_path: Path) -> None:
    labels = ("glass ", "glass", " metal")
    members = [(f"{n}.jpg", jpeg(n)) for n in range(3)] + [
        (f"{n}.json", json.dumps({"label": label}).encode()) for n, label in enumerate(labels)
    ]
    write_tar(tmp_path / "train-000.tar", dict(sorted(members)))
    assert index_folder(tmp_path, workers=1).classes == ("glass", "metal")


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_several_dots_and_any_order_within_a_key_are_read(tmp_path: Path, tar_format: int) -> None:
    long = "folder.with.dots/" + "x" * 150 + "/" + "é" * 60
    members = {
        f"{long}/1.cls": b"glass\n",
        f"{long}/1.mask.png": jpeg(9),
        f"{long}/1.jpg": jpeg(1),
        f"{long}/2.v2.jpg": jpeg(2),
        f"{long}/2.cls": b"metal",
    }
    write_tar(tmp_path / "a.tar", members, tar_format=tar_format)
    assert indexed_images(index_folder(tmp_path, workers=1)) == [("train", 0, jpeg(1)), ("train", 1, jpeg(2))]


def test_pickles_are_never_loaded_and_images_that_cannot_be_decoded_are_left_out(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    members = {"1.jpg": jpeg(1), "1.cls": b"0", "1.pyd": pickle.dumps(Trap()), "1.pkl": pickle.dumps(Trap())}
    members |= {"2.jpg": jpeg(2, size=(200, 200))[:900], "2.cls": b"1", "3.jpg": jpeg(3), "3.cls": b"1"}
    write_tar(tmp_path / "a.tar", members)
    manifest = index_folder(tmp_path, workers=1)
    assert manifest.classes == ("0", "1")
    assert manifest.splits["train"].samples_per_class == (1, 1)
    assert [(left.source, left.reason) for left in manifest.left_out] == [("a.tar/2.jpg", "truncated")]


@pytest.mark.parametrize(
    ("cut", "message"), [(1024 + 700, "unexpected end of data|in 1.jpg"), (None, "after a whole member")]
)
def test_a_tar_that_is_cut_in_or_between_members_is_named(tmp_path: Path, cut: int | None, message: str) -> None:
    write_tar(tmp_path / "cut.tar", {"1.cls": b"0", "1.jpg": jpeg(1), "2.cls": b"1", "2.jpg": jpeg(2)})
    whole = (tmp_path / "cut.tar").read_bytes()
    edge = whole.index(b"2.cls")
    (tmp_path / "cut.tar").write_bytes(whole[: cut or edge])
    with pytest.raises(ShardError, match=rf"cut\.tar is damaged or truncated: ({message})"):
        index_folder(tmp_path, workers=1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"", "2.cls": b"0"}, r"sample '1' \(jpg\) has no label"),
        ({"1.jpg": b"", "1.png": b"", "1.cls": b"0"}, "has 2 images: 1.jpg, 1.png"),
        (
            {f"cam1.2026.{number}.jpg": b"" for number in range(5000)},
            r"'cam1' has 5,000 images: (cam1.2026.\d.jpg, ){3}cam1.2026.3.jpg and 4,996 more\n.*\n.*without dots",
        ),
        ({"1.jpg": b"", "2.jpg": b"", "1.cls": b"0"}, "sample '1' .* has no label"),
        (
            {"1.jpg": b"", "1.cls": b"0", "2.jpg": b"", "2.cls": b"0", "1.txt": b""},
            "of '1' are not consecutive",
        ),
        ({"1.txt": b""}, "holds no image"),
        ({"1.cls": b"0"}, "holds no image"),
        ({"1.jpg": b"", "1.json": b"[" * 100_000}, "sample '1' .* has no label"),
        ({"1.jpg": b"", "1.cls": b"9" * 5000}, "has the label number 1,000,000, the limit is 999,999"),
        ({"1.jpg": b"", "1.json": b'{"label": 123456789}'}, "has the label number 123,456,789"),
    ],
)
def test_samples_without_one_image_and_one_label_are_named(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "a.tar", {name: data or jpeg(1) for name, data in members.items()})
    with pytest.raises(ShardError, match=message):
        index_folder(tmp_path, workers=1)


def test_images_of_any_format_and_links_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    members: dict[str, bytes] = {}
    for number, kind in enumerate(("BMP", "GIF", "TIFF")):
        data = io.BytesIO()
        pixels.save(data, kind)
        members |= {f"{number}.{kind.lower()}": data.getvalue(), f"{number}.cls": b"%d" % (number % 2)}
    members |= {"3.jpg": jpeg(3), "3.tiff": b"a depth map", "3.cls": b"0", "5.cls": b"1", "6.jpg": b"", "6.cls": b"0"}
    members |= {"__MACOSX/._3.jpg": b"", "@eaDir/3.jpg/x.jpg": b""}
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for key, kind, target in (("7", tarfile.LNKTYPE, "3.jpg"), ("8", tarfile.SYMTYPE, "/etc/x.jpg")):
            link, label = tarfile.TarInfo(f"{key}.jpg"), tarfile.TarInfo(f"{key}.cls")
            link.type, link.linkname = kind, target
            archive.addfile(link)
            label.size = 1
            archive.addfile(label, io.BytesIO(b"1"))
    manifest = index_folder(tmp_path, workers=1)
    images = [members["0.bmp"], members["1.gif"], members["2.tiff"], jpeg(3), jpeg(3)]
    assert indexed_images(manifest) == [("train", n, image) for n, image in zip((0, 1, 0, 0, 1), images, strict=True)]
    assert [(left.source, left.reason, left.detail) for left in manifest.left_out] == [
        ("a.tar/5", "unreadable", "it has a label but no image (cls)"),
        ("a.tar/6.jpg", "empty", "the file has 0 bytes"),
        ("a.tar/8.jpg", "unreadable", "it is a link to /etc/x.jpg, which is not a file in the archive"),
    ]
    assert verify(tmp_path, workers=1).damage == ()


@pytest.mark.parametrize(
    ("names", "splits", "expected"),
    [
        (["imagenet1k-train-0000", "imagenet1k-validation-00"], [], ["train", "val"]),
        (["shard_train_0", "Shard_Val_0", "test0"], [], ["train", "val", "test"]),
        (["00000", "a-strain-1"], [], ["train", "train"]),
        (["train/0", "val/0"], [], ["train", "val"]),
        (["a", "b"], [("val", "b*"), ("train", "*")], ["train", "val"]),
        (["train-0", "hold-out"], [], "1 of the 2 tars of here have no word for one split in their names"),
        (["train-val-0"], [], "1 of the 1 tars .* such as train-val-0.tar"),
        (["train-val-0"], [("train", "*")], ["train"]),
        (["a"], [("val", "b*")], r"--split val=b\* matches none of the 1 tars"),
        (["a"], [("holdout", "a*")], "holdout is not a split"),
    ],
)
def test_the_split_of_a_tar_is_a_word_of_its_name_or_as_stated(
    names: list[str], splits: list[tuple[str, str]], expected: list[str] | str
) -> None:
    tars = [f"{name}.tar" for name in names]
    if isinstance(expected, str):
        with pytest.raises(ShardError, match=expected):
            choose_splits(tars, splits, "here")
    else:
        assert list(choose_splits(tars, splits, "here").values()) == expected


def test_folders_of_tars_by_split_and_a_map_of_classes(tmp_path: Path) -> None:
    for split, seed in (("train", 1), ("val", 3)):
        members = {"1.jpg": jpeg(seed), "1.cls": b"Glass", "2.jpg": jpeg(seed + 1), "2.cls": b"glass"}
        write_tar(tmp_path / "s" / split / "0.tar", members | {"3.jpg": jpeg(seed + 5), "3.cls": b"metal"})
    (tmp_path / "s" / "@eaDir").mkdir()
    (tmp_path / "s" / "@eaDir" / "train.tar").touch()
    (tmp_path / "s" / "._train.tar").touch()
    (tmp_path / "names.yaml").write_text("Glass: glass")
    assert main(["index", str(tmp_path / "s"), "--classes", str(tmp_path / "names.yaml")]) == 0
    manifest = Manifest.load(tmp_path / "s")
    assert [shard.index for split in manifest.splits.values() for shard in split.shards] == ["train/0.idx", "val/0.idx"]
    assert manifest.classes == ("glass", "metal")
    assert manifest.splits["val"].samples_per_class == (2, 1)
    assert verify(tmp_path / "s", workers=1).damage == ()


def test_labels_must_be_of_one_kind_and_have_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"glass"})
    with pytest.raises(ShardError, match=r"some labels are numbers \(0\) and some are names \(glass\)"):
        index_folder(tmp_path, workers=1)
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"3"})
    with pytest.raises(ShardError, match=r"labels up to 3 and 2 class name\(s\)"):
        index_folder(tmp_path, workers=1, classes=("a", "b"))
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"a", "2.jpg": jpeg(2), "2.cls": b"b"})
    with pytest.raises(SourceError, match="no images of: c"):
        index_folder(tmp_path, workers=1, classes=("a", "c"))
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"m\xe9tal", "2.jpg": jpeg(2), "2.cls": b"m\xe8tal"})
    with pytest.raises(SourceError, match="has a name that is not UTF-8"):
        index_folder(tmp_path, workers=1)
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"1"})
    with pytest.raises(SourceError, match="the class 'a' is named twice"):
        index_folder(tmp_path, workers=1, classes=("a", "a"))


def test_folders_without_plain_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no \*\.tar \(0 other entries\)"):
        index_folder(tmp_path, workers=1)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ShardError, match=r"1 compressed tar\(s\), such as a.tar.gz"):
        index_folder(tmp_path, workers=1)


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    """GNU tar's old sparse format: typeflag S. It is created by hand because Python cannot write it."""
    write_tar(tmp_path / "a.tar", {"1.cls": b"0", "1.jpg": bytes(512)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = content.index(b"1.jpg")
    content[header + 156 : header + 157] = b"S"
    content[header + 148 : header + 156] = b" " * 8
    checksum = sum(content[header : header + 512])
    content[header + 148 : header + 156] = b"%06o\0 " % checksum
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"1\.jpg is stored as a sparse file"):
        index_folder(tmp_path, workers=1)


def test_the_command_takes_class_names_from_a_file_and_keeps_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(png, "PNG")
    write_tar(tmp_path / "s" / "test_0.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.png": png.getvalue(), "2.cls": b"1"})
    (tmp_path / "names.txt").write_text("glass\nmetal\n")
    command = ["index", str(tmp_path / "s"), "--classes-from", str(tmp_path / "names.txt")]
    assert main(command) == 0
    assert "warning: there are no samples in train, val" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "s").splits["test"].samples_per_class == (1, 1)
    with pytest.raises(SystemExit):
        main(command)
    assert "already has a manifest.json" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
