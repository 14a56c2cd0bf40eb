"""What the program reads: intact files, and for each the command or function that reads it."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pictures import jpeg
from PIL import Image
from small_run import write_run
from trainings import config_of

from wasteddp import cli, settings, train
from wasteddp.model import networks, pretrained
from wasteddp.sharding.index import index_folder
from wasteddp.training.checkpoint import reader


@dataclass(frozen=True)
class Target:
    """A file to damage, and what reads it.

    Args:
        folder: what the reader needs; each input gets a copy of links to it.
        file: the path in `folder` of the file to damage.
        read: called in a process of its own, in the copy of the folder; the exit code of a command, or None.
    """

    name: str
    folder: Path
    file: str
    read: Callable[[Path], int | None]

    @property
    def kind(self) -> str:
        return Path(self.file).suffix.lstrip(".")


def _command(*words: str) -> Callable[[Path], int]:
    """`{}`: the folder."""
    return lambda folder: cli.main([word.replace("{}", str(folder)) for word in words])


def _shard(file: str, *options: str) -> Callable[[Path], int]:
    return _command("shard", "{}/" + file, "--out", "{}/out", *options)


def make_targets(folder: Path) -> list[Target]:
    """Write intact files below `folder`, some of them by a short training, and return all targets."""
    targets = [*_archives(folder / "archives"), *_lists(folder / "lists"), *_images(folder / "photos")]
    targets += _run(folder / "run")
    return targets


def _photos() -> dict[str, bytes]:
    return {f"{name}/{number}.jpg": jpeg(10 * seed + number, size=(24, 20))
            for seed, name in enumerate(("glass", "metal")) for number in range(3)}  # fmt: skip


def _archives(folder: Path) -> list[Target]:
    folder.mkdir(parents=True)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in {**_photos(), f"glass/{'long' * 30}.jpg": jpeg(90, size=(24, 20))}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("metal/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        archive.addfile(link)
    pax = io.BytesIO()
    with tarfile.open(fileobj=pax, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in _photos().items():
            info = tarfile.TarInfo(f"ä/{name}")
            info.size, info.pax_headers = len(data), {"comment": "x"}
            archive.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(folder / "a.zip", "w") as zipped:
        for number, (name, data) in enumerate(_photos().items()):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[number % 3]
            zipped.writestr(name, data, compress_type=method)
    (folder / "gnu.tar").write_bytes(plain.getvalue())
    (folder / "pax.tar").write_bytes(pax.getvalue())
    (folder / "a.tgz").write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    (folder / "a.txz").write_bytes(lzma.compress(plain.getvalue()))
    foreign = io.BytesIO()
    with tarfile.open(fileobj=foreign, mode="w") as archive:
        for number in range(4):
            for suffix, data in (
                ("jpg", jpeg(number, size=(24, 20))),
                ("cls", b"%d" % (number % 2)),
                ("json", b'{"a": 1}'),
            ):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "train-0.tar").write_bytes(foreign.getvalue())

    def index(copy: Path) -> None:
        index_folder(copy / "foreign", workers=1)

    names = ("a.zip", "gnu.tar", "pax.tar", "a.tgz", "a.txz")
    return [*(Target(name, folder, name, _shard(name)) for name in names),
            Target("foreign tar", folder, "foreign/train-0.tar", index)]  # fmt: skip


def _lists(folder: Path) -> list[Target]:
    for name, data in _photos().items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(data)
    rows = [f"images/{name},{name.split('/')[0]},{'val' if '2.' in name else 'train'}\n" for name in _photos()]
    (folder / "table.csv").write_text("path,label,split\n" + "".join(rows))
    (folder / "train.txt").write_text("".join(f"{name} {int(name < 'h')}\n" for name in _photos()))
    (folder / "bins.yaml").write_text("glass: green bin\nmetal: 'yellow bin'\n")
    (folder / "classes.yaml").write_text("glass: bottle glass\nmetal: metal\n")
    (folder / "recipe.yaml").write_text(
        "name: small\ntitle: Small\nsynthetic: true\ndraw: {classes: 2, images_per_class: 6, size_px: 32}\n"
        "source: {homepage: 'https://example.org', authors: [A B], year: 2016, licence: MIT}\n"
        "split: {fractions: [0.6, 0.2, 0.2], rule: hash}\n"
    )
    config = Path(config_of(folder, folder / "images")[1])
    shutil.move(config, folder / "settings.yaml")

    def load(copy: Path) -> None:
        settings.load(copy / "settings.yaml", ["run.seed=3"])

    images = "images"
    return [
        Target("table.csv", folder, "table.csv", _shard("table.csv")),
        Target("split list", folder, "train.txt", _shard(images, "--split-files", "train={}/train.txt")),
        Target("bins.yaml", folder, "bins.yaml", _shard(images, "--bins", "{}/bins.yaml")),
        Target("classes.yaml", folder, "classes.yaml", _shard(images, "--classes", "{}/classes.yaml")),
        Target("recipe.yaml", folder, "recipe.yaml", _shard("recipe.yaml")),
        Target("settings.yaml", folder, "settings.yaml", load),
    ]


def _images(folder: Path) -> list[Target]:
    for name in ("glass", "metal"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.jpg").write_bytes(jpeg(100 + ord(name[0]), size=(24, 20)))
    pixels = Image.open(io.BytesIO(jpeg(7, size=(24, 20))))
    deep = pixels.convert("I;16") if hasattr(pixels, "convert") else pixels
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "rgb.jpg": (pixels, "JPEG", {"exif": _exif()}),
        "progressive.jpg": (pixels, "JPEG", {"progressive": True}),
        "grey.jpg": (pixels.convert("L"), "JPEG", {}),
        "cmyk.jpg": (pixels.convert("CMYK"), "JPEG", {}),
        "rgb.png": (pixels, "PNG", {}),
        "palette.png": (pixels.convert("P"), "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "rgb.tif": (pixels, "TIFF", {"compression": "tiff_lzw"}),
        "deep.tif": (deep, "TIFF", {}),
        "a.webp": (pixels, "WEBP", {}),
        "a.bmp": (pixels, "BMP", {}),
        "a.gif": (pixels.convert("P"), "GIF", {}),
        "a.avif": (pixels, "AVIF", {}),
    }
    targets = []
    for name, (image, kind, options) in kinds.items():
        try:
            image.save(folder / "metal" / name, kind, **options)
        except (KeyError, OSError):  # this Pillow has no encoder of the kind
            continue
        targets.append(Target(name, folder, f"metal/{name}", _command("shard", "{}", "--out", "{}/../out")))
    return targets


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _run(folder: Path) -> list[Target]:
    """Targets of a run: its model, its checkpoints, its rows, its shard set, and initial weights."""
    run = write_run(folder)
    settings_of = [*config_of(folder, folder / "shards"), "--set", f"run.out={run}", "--set", "data.eval_split=test"]
    small = ["train.batch_size=3", "train.epochs=2", "data.image_size=16", "model.arch=resnet18", "data.lanes=1"]
    shutil.rmtree(run / "model")
    (run / "settings.yaml").unlink()
    assert train.main([*settings_of, *(word for one in small for word in ("--set", one))]) == 0
    assert cli.main(["evaluate", str(run), "--split", "test"]) == 0
    photo = next((folder / "images" / "test").rglob("*.jpg"))
    shutil.copyfile(photo, folder / "photo.jpg")
    torch.save(networks.build("resnet18", 3).state_dict(), folder / "weights.pth")
    checkpoint = max((run / "checkpoints").glob("step-*"))
    base = checkpoint.relative_to(folder)

    def newest(copy: Path) -> None:
        reader.newest(copy / "run" / "checkpoints", print)

    def start(copy: Path) -> None:
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", str(copy / "weights.pth"))

    predict = _command("predict", "{}/run", "{}/photo.jpg", "--csv", "{}/out.csv", "--json", "{}/out.json")
    shards = sorted(path.name for path in (folder / "shards").iterdir())
    tar, index = (next(name for name in shards if name.endswith(suffix)) for suffix in (".tar", ".idx"))
    targets = [Target(f"model {name}", folder, f"run/model/{name}", predict)
               for name in sorted(path.name for path in (run / "model").iterdir())]  # fmt: skip
    targets += [Target(f"checkpoint {path.name}", folder, str(base / path.name), newest)
                for path in sorted(checkpoint.iterdir()) if path.suffix != ".lock"]  # fmt: skip
    targets += [Target(f"report {path.name}", folder, str(path.relative_to(folder)), _command("report", "{}/run"))
                for path in sorted([*run.glob("*.json*"), *run.glob("settings.yaml"), *run.glob("evaluations/*/*.json"),
                                    *run.glob("evaluations/*/*.csv")])]  # fmt: skip
    targets += [Target(f"verify {name}", folder, f"shards/{name}", _command("verify", "{}/shards"))
                for name in ("manifest.json", index, tar)]  # fmt: skip
    targets += [
        Target("verify a run", folder, "run/metrics.jsonl", _command("verify", "{}/run")),
        Target(
            "evaluate",
            folder,
            "shards/manifest.json",
            _command("evaluate", "{}/run", "--shards", "{}/shards", "--split", "test"),
        ),
        Target("plan", folder, "shards/manifest.json", _command("plan", "{}/shards", "--set", "train.batch_size=3")),
        Target("weights", folder, "weights.pth", start),
    ]
    return targets
