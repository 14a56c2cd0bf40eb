"""Every image is read once and checked. Unusable images do not stop the scan until there are too many."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import jpeg
from PIL import Image

from wasteddp.data.decoding import formats
from wasteddp.errors import SourceError
from wasteddp.sharding import scan as intake
from wasteddp.sharding.build import Job, make_shards
from wasteddp.sharding.sources.files import FolderSource
from wasteddp.sharding.sources.layout import SourceImage, read_folders


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def scan(folder: Path, journal: Path, **options: object) -> tuple[intake.ScanResult, tuple[SourceImage, ...]]:
    source = FolderSource(folder)
    images = read_folders(source, folder).images
    return intake.scan(source, images, workers=2, journal=journal, **options), images  # type: ignore[arg-type]


def test_each_unusable_image_is_listed_with_its_reason(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder({"a": 4, "b": 4})
    (folder / "a" / "empty.jpg").write_bytes(b"")
    (folder / "a" / "cut.jpg").write_bytes(jpeg(1, size=(300, 200))[:3000])
    (folder / "a" / "text.jpg").write_bytes(b"this is no image")
    (folder / "b" / "bomb.png").write_bytes(bomb())
    (folder / "b" / "link.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "b" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    result, images = scan(folder, tmp_path / "journal")
    reasons = {Path(left.source).name: left.reason for left in result.left_out(images)}
    assert reasons == {
        "empty.jpg": "empty",
        "cut.jpg": "truncated",
        "text.jpg": "unreadable",
        "bomb.png": "too_large",
        "link.jpg": "unreadable",
        "phone.heic": "unreadable",
    }
    assert (result.records["problem"] == 0).sum() == 8


def test_an_image_that_is_no_jpeg_and_too_wide_for_one_is_left_out_unless_it_is_shrunk(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder({"a": 2, "b": 2})
    Image.new("RGB", (70_000, 2)).save(folder / "a" / "belt.png")
    for _ in range(2):  # the second scan reads the journal
        result, images = scan(folder, tmp_path / "journal")
        (left,) = result.left_out(images)
        assert (left.source, left.reason) == ("a/belt.png", "too_large")
        assert left.detail == "70000x2 px, a JPEG has at most 65,500 on a side: --max-side shrinks it"
    assert not scan(folder, tmp_path / "journal", max_side_px=1000)[0].details
    with pytest.raises(SourceError, match="1 of 5 images cannot be used"):
        scan(folder, tmp_path / "journal", limit=0)


def test_jpegs_with_faulty_markers_are_used_and_counted(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder({"a": 20, "b": 20})
    sound = (folder / "a" / "a1.jpg").read_bytes()
    place = sound.index(b"\xff\xda") + 11
    (folder / "a" / "a1.jpg").write_bytes(sound[:place] + bytes(3) + sound[place + 3 :])
    manifest = make_shards(Job(folder, tmp_path / "set"), workers=2)
    assert not manifest.left_out
    assert (
        "1 JPEG(s) have faulty markers and are used, since all their pixels decode: a/a1.jpg" in capsys.readouterr().out
    )


def test_too_many_unusable_images_stop_with_the_first_and_the_counts(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder({"a": 5, "b": 5})
    for number in range(3):
        (folder / "a" / f"zero{number}.jpg").write_bytes(b"")
    assert len(scan(folder, tmp_path / "1")[0].details) == 3
    with pytest.raises(
        SourceError, match=r"3 of 13 images cannot be used \(3 empty\), more than the 2 allowed.*:\n    a/zero0"
    ):
        scan(folder, tmp_path / "2", limit=2)
    with pytest.raises(SourceError, match="more than the 1 allowed"):
        scan(folder, tmp_path / "3", limit=0.1)


def test_the_default_limit_is_a_tenth_but_at_least_ten() -> None:
    assert [intake.max_unusable(n, None) for n in (1, 100, 101, 1000)] == [10, 10, 10, 100]
    assert [intake.max_unusable(1000, limit) for limit in (0, 0.5, 1, 7)] == [0, 500, 1, 7]


def test_a_second_start_reads_only_what_the_journal_does_not_know(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, journal = image_folder({"a": 6, "b": 6}), tmp_path / "journal"
    (folder / "a" / "empty.jpg").write_bytes(b"")
    whole, _ = scan(folder, journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:5]) + lines[5][:40])  # killed in the middle of a line
    (folder / "a" / "a1.jpg").write_bytes(jpeg(99))
    read: list[str] = []
    original = FolderSource.read

    def noted(self: FolderSource, path: str) -> bytes:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(FolderSource, "read", noted)
    again, _ = scan(folder, journal)
    assert len(read) == 13 - 5 + 1
    assert "a/a1.jpg" in read
    assert (whole.records[1:] == again.records[1:]).all()
    assert whole.details == again.details
    read.clear()
    scan(folder, journal)
    assert read == []


def test_an_image_is_read_again_when_its_decoder_has_been_installed(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder({"a": 2, "b": 2})
    phone = folder / "a" / "phone.heic"
    phone.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heic")
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(formats, "_FORMATS", [name for name in formats._FORMATS if name != "HEIF"])
    result, images = scan(folder, tmp_path / "journal")
    (left,) = result.left_out(images)
    assert left.detail == "HEIC has no decoder here: pip install 'wasteddp[phone]'"
    stat = phone.stat()
    phone.write_bytes(b"\0\0\0\x18____heic\0\0\0\0heic")  # seen only if it is read again
    os.utime(phone, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scan(folder, tmp_path / "journal")[0].details == result.details
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    (detail,) = scan(folder, tmp_path / "journal")[0].details.values()
    assert detail == "cannot identify image file"


def test_a_scan_is_the_same_with_any_number_of_workers(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = FolderSource(folder := image_folder({"a": 20, "b": 17}))
    images = read_folders(source, folder).images
    one, many = (intake.scan(source, images, workers=w, journal=tmp_path / str(w)) for w in (1, 5))
    assert one.records.tobytes() == many.records.tobytes()
    hashes = list(intake.fingerprints(source, images, workers=3))
    assert hashes == [row.tobytes() for row in one.records["sha256"]]


@pytest.mark.parametrize("failures", [1, 2])
def test_an_image_is_left_out_only_if_a_second_read_fails_too(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    real, left = FolderSource.read, [failures]

    def read(self: FolderSource, path: str) -> bytes:
        if path.endswith("a1.jpg") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, path)

    monkeypatch.setattr(FolderSource, "read", read)
    folder = image_folder({"a": 2, "b": 2})
    source = FolderSource(folder)
    images = read_folders(source, folder).images
    result = intake.scan(source, images, workers=1, journal=tmp_path / "journal")
    assert [one.detail for one in result.left_out(images)] == ["Input/output error"] * (failures - 1)
