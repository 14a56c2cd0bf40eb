"""Files that are read cannot run code, leave their folder or exhaust the machine, and no token is written."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import random
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from pictures import jpeg
from PIL import Image
from safetensors.torch import load, save
from trainings import ROOT, config_of

from wasteddp import settings, train
from wasteddp.data.decoding.decode import UndecodableError, decode_rgb, size_px
from wasteddp.data.manifest import Manifest
from wasteddp.errors import (
    BundleError,
    CheckpointError,
    RecipeError,
    SettingsError,
    ShardError,
    SourceError,
    WastedError,
    WeightsError,
)
from wasteddp.inference.any_classifier import load_features
from wasteddp.inference.bundle import load_bundle, read_card
from wasteddp.model import networks, pretrained
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.index import index_folder
from wasteddp.sharding.recipe import load_pairs, load_recipe
from wasteddp.sharding.sources import archives
from wasteddp.training.checkpoint import reader

TOKENS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_this_is_no_real_token",
    "AWS_SECRET_ACCESS_KEY": "aws+this/is+no+real+secret",
}


class Bomb:
    """A pickle that runs code; here it only writes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._mark), "w")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A run with tokens in its environment, and with W&B offline."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, token in TOKENS.items():
            patch.setenv(name, token)
        arguments = config_of(folder, small_shards)
        assert train.main([*arguments, "--set", "track.wandb=offline", "--set", "checkpoint.every_steps=4"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


def test_every_file_of_a_run_is_read_by_safe_readers_alone(finished: Path) -> None:
    kinds = set()
    for path in sorted(finished.rglob("*")):
        if (
            not path.is_file() or "wandb" in path.relative_to(finished).parts[0]
        ):  # W&B's files, which wasteddp never reads
            continue
        kinds.add(path.suffix)
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in content.splitlines())
        elif path.suffix == ".yaml":
            yaml.safe_load(content)
        elif path.suffix == ".safetensors":
            assert all(isinstance(tensor, torch.Tensor) for tensor in load(content).values())
        elif path.suffix in (".png", ".jpg"):
            Image.open(io.BytesIO(content)).verify()
        elif path.suffix in (".txt", ".csv", ".html") or path.name in (".lock", "README.md"):  # none is read
            content.decode("utf-8")
        else:
            pytest.fail(f"{path} is of a kind that no safe reader is known for")
    assert kinds >= {".json", ".jsonl", ".yaml", ".safetensors", ".txt"}


def test_every_file_of_a_shard_set_is_plain(small_shards: Path) -> None:
    for path in small_shards.iterdir():
        if path.suffix == ".tar":
            with tarfile.open(path, "r:") as archive:
                members = archive.getmembers()
            assert members
            assert all(m.isreg() and m.name.endswith((".jpg", ".json")) and "/" not in m.name for m in members)
        else:
            assert path.suffix in (".idx", ".json")


def test_no_token_is_in_a_run_s_folder(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found = [name for name, token in TOKENS.items() if token.encode() in content]
            assert not found, f"{path} holds the value of {found}"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("wasteddp/**/*.py"), *ROOT.glob("launch/*.py")]), ids=str)
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    forbidden = {
        "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system",
        "os.popen", "joblib.load", "shelve.open", "marshal.loads", "marshal.load", "torch.hub.load",
    }  # fmt: skip
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        own_source = path.name == "weights.py" and ast.unparse(node).startswith("exec(compile(source, PREPROCESSING")
        assert name not in forbidden or own_source, f"{path}:{node.lineno}"
        assert keywords.get("shell", "False") == "False", f"{path}:{node.lineno}"
        assert keywords.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        assert not name.endswith((".extractall", ".extract")), f"{path}:{node.lineno}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"


# --- weights and checkpoints ------------------------------------------------------------------------------------------


def test_weights_that_would_run_code_are_refused_and_do_not(tmp_path: Path) -> None:
    mark, model = tmp_path / "mark", networks.build("resnet18", 3)
    torch.save({"fc.weight": Bomb(mark)}, tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    (tmp_path / "renamed.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (tmp_path / "long.safetensors").write_bytes(
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}  ' + b"\0" * 4
    )
    for name in ("bomb.pth", "plain.pth", "renamed.safetensors", "huge.safetensors", "long.safetensors"):
        with pytest.raises(WeightsError, match="does not hold weights that can be loaded safely"):
            pretrained.initialise(model, "resnet18", str(tmp_path / name))
    assert not mark.exists()


def test_weights_of_other_shapes_are_named(tmp_path: Path) -> None:
    state = {**networks.build("resnet18", 3).state_dict(), "conv1.weight": torch.zeros(1)}
    (tmp_path / "w.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))
    with pytest.raises(
        WeightsError, match=r"1 of \d+ tensors are missing, unknown or have a different shape.*'conv1.weight'"
    ):
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", str(tmp_path / "w.safetensors"))


def forged(finished: Path, out: Path, name: str, content: bytes) -> Path:
    """Replace one file of the newest checkpoint, and adapt the hashes."""
    import hashlib

    shutil.copytree(sorted((finished / "checkpoints").glob("step-*"))[-1], out)
    (out / name).write_bytes(content)
    complete = json.loads((out / "complete.json").read_text())
    complete["sha256"][name] = hashlib.sha256(content).hexdigest()
    (out / "complete.json").write_text(json.dumps(complete))
    return out


def test_a_forged_checkpoint_is_refused_and_runs_nothing(finished: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    forgeries = {
        "model.safetensors": [pickle.dumps(Bomb(mark)), struct.pack("<Q", 1 << 60), b""],
        "progress.json": [b"[]", b"{}", b'{"lineage": 3}', b"{" * 50],
    }
    for name, contents in forgeries.items():
        for number, content in enumerate(contents):
            path = forged(finished, tmp_path / f"{number}-{name}" / "step-00000004", name, content)
            with pytest.raises(CheckpointError, match="is not an intact checkpoint"):
                reader.read(path)
    outside = forged(finished, tmp_path / "outside" / "step-00000004", "progress.json", b"{}")
    listing = json.loads((outside / "complete.json").read_text())
    listing["sha256"]["../../secret"] = "0" * 64
    (outside / "complete.json").write_text(json.dumps(listing))
    with pytest.raises(CheckpointError):
        reader.read(outside)
    assert not mark.exists()


def test_a_forged_bundle_is_refused(finished: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    shutil.copytree(finished / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "model")
    with pytest.raises(BundleError):
        load_features(tmp_path / "model", read_card(tmp_path / "model"))
    assert not mark.exists()


# --- archives ---------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def good_images() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{name}/{n}.jpg", jpeg(10 * k + n)) for k, name in enumerate(("glass", "paper")) for n in range(9)]


def test_members_of_a_tar_that_point_elsewhere_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(99))
    evil = [
        member("../../glass/up.jpg", jpeg(50)),
        member("/glass/absolute.jpg", jpeg(51)),
        member("glass/link.jpg", type=tarfile.SYMTYPE, linkname=str(secret)),
        member("glass/hard.jpg", type=tarfile.LNKTYPE, linkname="../../secret.jpg"),
        member("glass/device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("glass/pipe.jpg", type=tarfile.FIFOTYPE),
    ]
    (tmp_path / "work").mkdir()
    source = archives.open_source(write_tar(tmp_path / "evil.tar", good_images() + evil), work_folder=tmp_path / "work")
    names = [file.path for file in source.files]
    assert "glass/up.jpg" in names
    assert "glass/absolute.jpg" in names
    before = set(tmp_path.rglob("*"))
    manifest = make_shards(Job(tmp_path / "evil.tar", tmp_path / "set", Options()), workers=1)
    assert [(left.source, left.detail) for left in manifest.left_out] == [
        ("glass/device.jpg", "it is a pipe or a device, not a file"),
        ("glass/hard.jpg", "it is a link to ../../secret.jpg, which is not a file in the archive"),
        ("glass/link.jpg", f"it is a link to {secret}, which is not a file in the archive"),
        ("glass/pipe.jpg", "it is a pipe or a device, not a file"),
    ]
    written = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "set" not in (path, *path.parents)}
    assert not written


def raw_header(name: bytes, kind: bytes, size: int) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157], block[257:265] = (
        b"0000644\0",
        b"%011o\0" % size,
        kind,
        b"ustar\x0000",
    )
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_tar_whose_headers_are_bombs_is_refused_unread(kind: bytes, tmp_path: Path) -> None:
    size = 1 << 32
    path = tmp_path / "train-000000.tar"
    with path.open("wb") as file:
        file.write(raw_header(b"bomb", kind, size))
        file.truncate(size + 4096)  # a sparse file: no space on the disk, but 4 GB of memory
    said = r"a header claims 4,294,967,296 bytes, the limit is 1,048,576"
    with pytest.raises(SourceError, match=said):
        archives.open_source(path, work_folder=tmp_path)
    with pytest.raises(ShardError, match=said):
        index_folder(tmp_path, workers=1)


@pytest.mark.parametrize("is_pax", [False, True])
def test_a_tar_whose_header_points_back_at_itself_is_refused(is_pax: bool, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-000000.tar", good_images())
    bad = tarfile.TarInfo("glass/n.jpg")
    if is_pax:
        bad.pax_headers = {"size": "-1024"}
        header = bad.tobuf(tarfile.PAX_FORMAT)
    else:
        block = bytearray(bad.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        header = bytes(block)
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512) + header + bytes(2048))
    with pytest.raises(SourceError, match="claims -"):
        archives.open_source(path, work_folder=tmp_path)
    with pytest.raises(ShardError, match="claims -"):
        index_folder(tmp_path, workers=1)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_damaged_archives_end_in_a_message(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for info, data in good_images()[:4]:
                archive.writestr(info.name, data)
    else:
        write_tar(path, good_images()[:4], "w:gz" if suffix == "tar.gz" else "w")
    whole, draw = path.read_bytes(), random.Random(0)
    headers = [match.start() for match in re.finditer(rb"PK\x01\x02|glass/", whole)] or [0]
    for number in range(150):
        content = bytearray(whole)
        for _ in range(1 + number % 5):
            begin = draw.choice([*headers, draw.randrange(len(whole))])
            content[min(len(whole) - 1, begin + draw.randrange(200))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(whole))] if number % 10 == 0 else content)
        with contextlib.suppress(WastedError):
            source = archives.open_source(path, work_folder=tmp_path)
            for file in source.files:
                with contextlib.suppress(OSError):
                    source.read(file.path)
        for unpacked in tmp_path.glob("source-*"):
            unpacked.unlink()


def test_a_compressed_tar_that_swells_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "bomb.tar.gz", [member("glass/0.jpg", bytes(300 << 20))], "w:gz")
    assert path.stat().st_size < 1 << 20
    (tmp_path / "work").mkdir()
    with pytest.raises(SourceError, match="unpacks to over 100 times its"):
        archives.open_source(path, work_folder=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_zip_of_bombs_and_outside_names_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in good_images():
            archive.writestr(info.name, data)
        archive.writestr("../../glass/up.jpg", jpeg(60))
        archive.writestr("glass/bomb.jpg", bytes(300 << 20))
    manifest = make_shards(Job(path, tmp_path / "set", Options()), workers=1)
    left_out = {left.source: left.reason for left in manifest.left_out}
    assert left_out["glass/bomb.jpg"] == "too_large"
    assert not (tmp_path.parent / "glass").exists()


def test_an_archive_of_too_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    with pytest.raises(SourceError, match="has more than 10 members"):
        archives.open_source(write_tar(tmp_path / "many.tar", good_images()), work_folder=tmp_path)


def test_a_manifest_that_points_outside_its_folder_is_refused(small_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(text.replace('"train-000000.tar"', '"../secret.tar"'))
    with pytest.raises(ShardError, match=r"'\.\./secret\.tar' is not a plain file name"):
        Manifest.load(shards)


# --- YAML -------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.system ['touch MARK']",
        "run: !!python/name:os.system",
        f"run: {'9' * 5000}",
        "run: 2024-13-45",
        "!!python/object/new:os.system ['touch MARK']",
        LAUGHS,
        "[" * 100_000,
        "x: " + "y" * 10_000_001,
    ],
    ids=["apply", "name", "digits", "date", "new", "aliases", "nesting", "length"],
)
def test_yaml_that_is_more_than_values_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match="is not YAML"):
        settings.load(path)
    with pytest.raises(RecipeError, match=r"is not YAML|is not a recipe"):
        load_recipe(path)
    if text.startswith("run: ") and "!!" not in text:  # names and bins are text as it is written: no date, no number
        assert load_pairs(path, "bin") == {"run": text.removeprefix("run: ")}
    else:
        with pytest.raises(RecipeError, match="is not YAML"):
            load_pairs(path, "bin")
    assert not (tmp_path / "MARK").exists()


# --- images -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, chunks: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunks
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_images_that_are_bombs_are_refused_by_their_header() -> None:
    for data in (png(60_000, 60_000), png(2**31 - 1, 2**31 - 1)):
        with pytest.raises(UndecodableError, match=r"too_large|unreadable"):
            size_px(data)
        with pytest.raises(UndecodableError):
            decode_rgb(data)


def test_cut_images_and_wild_exif_are_refused_or_read_but_never_crash() -> None:
    whole = jpeg(1)
    for length in (0, 2, 20, len(whole) // 2, len(whole) - 10):
        with pytest.raises(UndecodableError):
            decode_rgb(whole[:length])
    # an EXIF block that points to itself, claims four billion entries, or is noise
    bodies = [
        b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60,
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff",
        random.Random(0).randbytes(200),
    ]
    for body in bodies:
        block = b"Exif\0\0" + body
        exif = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        assert decode_rgb(whole[:2] + exif + whole[2:]).shape == (40, 48, 3)


def test_formats_that_are_programs_are_no_images() -> None:
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"<svg/>",
        b"%PDF-1.7",
    ):
        with pytest.raises(UndecodableError):
            decode_rgb(data)
    eps = io.BytesIO()
    Image.new("RGB", (9, 9)).save(eps, "EPS")
    with pytest.raises(UndecodableError, match="unreadable"):
        size_px(eps.getvalue())
