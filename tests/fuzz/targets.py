"""What the program reads: intact files, and for each the command or function that reads it."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pictures import jpeg
from PIL import Image
from small_run import write_run
from trainings import config_of

from wasteddp import cli, settings, train
from wasteddp.inference.answered_files import AnsweredCsv, AnsweredFile, AnsweredJsonLines, Photo
from wasteddp.inference.bundle import find_bundle, read_card
from wasteddp.inference.prediction_files import Answer
from wasteddp.model import networks, pretrained
from wasteddp.report.page import write_report
from wasteddp.serve.server import read_token
from wasteddp.sharding.index import index_folder
from wasteddp.tools import dashboard
from wasteddp.training.checkpoint import reader

from .network_targets import network_targets
from .target import Target


def _command(*words: str) -> Callable[[Path], int]:
    """`{}`: the folder."""
    return lambda folder: cli.main([word.replace("{}", str(folder)) for word in words])


def _call(function: Callable[[Path], object]) -> Callable[[Path], None]:
    """`function` gets the folder."""

    def read(folder: Path) -> None:
        function(folder)

    return read


def _shard(file: str, *options: str) -> Callable[[Path], int]:
    return _command("shard", "{}/" + file, "--out", "{}/out", *options)


def make_targets(folder: Path) -> list[Target]:
    """Write intact files below `folder`, some of them by a short training, and return all targets."""
    targets = [*_archives(folder / "archives"), *_lists(folder / "lists"), *_images(folder / "photos")]
    targets += _run(folder / "run")
    targets += network_targets(folder / "network")
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

    (folder / "names.txt").write_text("glass\nmetal\n")
    (folder / "names.yaml").write_text("0: glass\n1: metal\n")

    def index(copy: Path) -> None:
        index_folder(copy / "foreign", workers=1)

    names = ("a.zip", "gnu.tar", "pax.tar", "a.tgz", "a.txz")
    return [*(Target(name, folder, name, _shard(name)) for name in names),
            Target("foreign tar", folder, "foreign/train-0.tar", index),
            Target("names of classes", folder, "names.txt",
                   _command("index", "{}/foreign", "--classes-from", "{}/names.txt")),
            Target("classes of tars", folder, "names.yaml",
                   _command("index", "{}/foreign", "--classes", "{}/names.yaml"))]  # fmt: skip


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
    (folder / "corrections.csv").write_text("path,class,action\nglass/0.jpg,metal,correct\nglass/1.jpg,,drop\n")
    (folder / "groups.csv").write_text(
        "path,label,group\n" + "".join(f"images/{name},{name.split('/')[0]},g{name[-5]}\n" for name in _photos())
    )
    (folder / "token.txt").write_text("0123456789abcdef\n")
    shutil.copyfile(dashboard.DEFAULT_PATH, folder / "dashboard.yaml")
    assert cli.main(["shard", str(folder / "groups.csv"), "--out", str(folder / "grouped"), "--group-column", "group",
                     "--fractions", "0.34,0.33,0.33"]) == 0  # fmt: skip
    assert cli.main(["shard", str(folder / "images"), "--out", str(folder / "begun"), "--part", "1/2",
                     "--stage", "read"]) == 0  # fmt: skip
    begun = max((folder / "begun").rglob("scan*.jsonl"), key=lambda path: path.stat().st_size).relative_to(folder)

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
        Target("settings printed", folder, "settings.yaml", _command("settings", "{}/settings.yaml")),
        Target("dashboard.yaml", folder, "dashboard.yaml", _call(lambda copy: dashboard.load(copy / "dashboard.yaml"))),
        Target("token", folder, "token.txt", _call(lambda copy: read_token(copy / "token.txt"))),
        Target("corrections.csv", folder, "corrections.csv", _shard(images, "--corrections", "{}/corrections.csv")),
        Target("groups.csv", folder, "groups.csv", _shard("groups.csv", "--group-column", "group")),
        Target("groups.bin", folder, "grouped/groups.bin", _command("verify", "{}/grouped")),
        Target(
            "begun shards",
            folder,
            str(begun),
            _command("shard", "{}/images", "--out", "{}/begun", "--part", "1/2", "--stage", "read"),
        ),
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
    (folder / "bins.yaml").write_text(
        "name: small\nclasses:\n  glass: {bin: green, grams: 250}\n  metal: {bin: yellow, grams: 20}\n"
        "  paper: {bin: yellow, grams: 12}\n"
        "costs:\n  person: 0.3\n  wrong: 1\n  paper: {green: 5}\n"
    )
    assert cli.main(["evaluate", str(run), "--split", "test", "--bins", str(folder / "bins.yaml")]) == 0
    write_report([run])  # the page's template is compiled here, not in each child
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
    saved = "run/evaluations/test"
    _watch(folder, run)
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
        Target("compare", folder, "shards/manifest.json", _command("compare", "{}/shards", "{}/shards")),
        Target("policy.json", folder, f"{saved}/policy.json",
               _command("predict", "{}/run", "{}/photo.jpg", "--policy", "{}/" + saved + "/policy.json")),
        Target("report --bins", folder, "bins.yaml",
               _command("report", "{}/run", "--bins", "{}/bins.yaml", "--out", "{}/out.html")),
        Target("review predictions.csv", folder, f"{saved}/predictions.csv",
               _command("review", "{}/run", "--shards", "{}/shards", "--no-pairs", "--predictions",
                        "{}/" + saved + "/predictions.csv", "--out", "{}/out.html")),
        Target("review --unlabelled", folder, "new.csv",
               _command("review", "{}/run", "--shards", "{}/shards", "--no-pairs", "--split", "test", "--unlabelled",
                        "{}/new.csv", "--out", "{}/out.html")),
        Target("watched csv", folder, "watched.csv", _call(lambda copy: _answered(copy, AnsweredCsv, "watched.csv"))),
        Target("watched jsonl", folder, "watched.jsonl",
               _call(lambda copy: _answered(copy, AnsweredJsonLines, "watched.jsonl"))),
    ]  # fmt: skip
    return targets


def _watch(folder: Path, run: Path) -> None:
    """Write what `predict --csv` and `predict --watch` write."""
    photo, model = str(folder / "photo.jpg"), str(run)
    assert cli.main(["predict", model, photo, "--csv", str(folder / "new.csv")]) == 0
    answer = Answer(photo, np.array([0.5, 0.3, 0.2], np.float32))
    for file in (_answered(folder, AnsweredCsv, "watched.csv"), _answered(folder, AnsweredJsonLines, "watched.jsonl")):
        for number in range(3):
            file.add(Photo(f"{photo}{number}", 100 + number, number, f"{number:064x}"), answer)
        file.save()
        file.close()


def _answered(folder: Path, kind: type[AnsweredFile], name: str) -> AnsweredFile:
    return kind(folder / name, read_card(find_bundle(folder / "run")), decides=False)
