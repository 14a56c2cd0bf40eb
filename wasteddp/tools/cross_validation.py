"""`wasteddp folds`: train one run for each fold of a shard set, and sum up their evaluations.

    RUN.OUT/fold-0 ... fold-K-1   the runs; of a Slurm array RUN.OUT/1 ... K
    RUN.OUT/folds.json            figures of each fold, their mean and standard deviation, the pooled confusion matrix

Every image of train and val is evaluated exactly once, by the model that was not trained on its fold.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from wasteddp import __version__
from wasteddp import settings as settings_file
from wasteddp.data.dataset import NO_FOLD, num_folds, open_dataset
from wasteddp.data.manifest import Manifest, fold_name
from wasteddp.errors import EXIT_FINISHED, RunError, SettingsError, inert, joined, storage
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.evaluation_files import print_metrics, read_record
from wasteddp.inference.metrics import I64, percent, summarise
from wasteddp.settings import plain_yaml
from wasteddp.training.distributed import launcher

FORMAT = "wasteddp-folds"
FORMAT_VERSION = 1
_FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "macro_recall": "macro recall"}
_SPLITS = ("data.train_split=train", "data.eval_split=val")


def cross_validate(
    config: str,
    sets: Sequence[str] = (),
    *,
    processes: int = 1,
    cpu: bool = False,
    slurm: bool = False,
    train: bool = True,
) -> int:
    """Train all folds and sum them up. Return the exit code: that of a training that did not finish.

    Args:
        config: path of the YAML file.
        sets: overrides, such as run.out=FOLDER.
        processes: of each training.
        cpu: do not use the GPUs.
        slurm: print the commands of an array instead of training.
        train: False: only sum up.

    Raises:
        SettingsError: the shard set has no folds.
        RunError: a fold was not evaluated, or on another set.
    """
    settings = settings_file.load(config, [*sets, *_SPLITS])
    with open_dataset(settings.data.model_copy(update={"fold": NO_FOLD})) as shards:
        manifest = shards.manifest
    total, out = num_folds(manifest), Path(settings.run.out)
    if total < 2:
        raise SettingsError(
            f"{manifest.where} has no folds",
            "there is nothing to validate across",
            "make a set with folds: wasteddp shard SOURCE --out FOLDER --folds 5",
        )
    if slurm:
        print("\n".join(_array(config, sets, out, total)))
        return EXIT_FINISHED
    for fold in range(total if train else 0):
        print(f"fold {fold} of 0 to {total - 1}: {out / fold_name(fold)}", flush=True)
        own = [*sets, *_SPLITS, f"data.fold={fold}", f"run.out={out / fold_name(fold)}"]
        code = launcher.launch(
            ["--config", config, *(part for value in own for part in ("--set", value))],
            processes,
            program=launcher.PROGRAM,
            more={"ACCELERATE_USE_CPU": "true"} if cpu else {},
            replaces=False,
        )
        if code != EXIT_FINISHED:
            print(f"fold {fold} did not finish: run the same command again to go on with it", flush=True)
            return code
    summary = sum_up(out, manifest)
    _print(Console(), summary, out)
    return EXIT_FINISHED


def _array(config: str, sets: Sequence[str], out: Path, total: int) -> list[str]:
    """Write the lines of a sweep. Return the commands that train all folds on a cluster and sum them up."""
    sweep = out / "folds.txt"
    with storage("writing the lines of the array", out):
        out.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep, "".join(f"--set data.fold={fold}\n" for fold in range(total)).encode())
    given = [value for value in sets if not value.startswith("run.out=")]
    overrides = "".join(f" --set {shlex.quote(value)}" for value in [*given, *_SPLITS])
    file, folder = shlex.quote(config), shlex.quote(str(out))
    variables = f"SWEEP={shlex.quote(str(sweep))} RUN_OUT={folder}"
    return [
        f"{variables} sbatch --array=1-{total} slurm/train.sh --config {file}{overrides}",
        f"wasteddp folds --config {file}{overrides} --set {shlex.quote(f'run.out={out}')} --sum-up   # after the array",
    ]


def sum_up(out: Path, manifest: Manifest) -> dict[str, Any]:
    """Write and return `folds.json` of the runs in a folder.

    Raises:
        RunError: a fold has no evaluation, or two, or one on other images.
    """
    total = num_folds(manifest)
    runs = _find_runs(out)
    records = []
    for fold in range(total):
        found = runs.get(fold, [])
        path = found[0] / "evaluations" / "val" / "metrics.json" if found else out / fold_name(fold)
        if len(found) != 1 or not path.exists():
            raise RunError(
                f"fold {fold} of {out} has {len(found)} runs and no evaluation: {path} is not there"
                if len(found) < 2
                else f"fold {fold} of {out} has {len(found)} runs: {', '.join(map(str, found))}",
                "the sum would not count each image once",
                "run the same command again without --sum-up, which goes on with unfinished runs"
                if len(found) < 2
                else "keep one of them in that folder",
            )
        try:
            with storage("reading an evaluation", path):
                record = read_record(path)
        except ValueError as error:
            raise RunError(
                f"{path} is not the record of an evaluation: {error}",
                "the sum would not count each image once",
                f"measure it again: wasteddp evaluate {found[0]} --split val",
            ) from error
        counts = manifest.splits[fold_name(fold)].samples_per_class
        if record["hashes"]["manifest"] != manifest.sha256 or tuple(np.sum(record["confusion"], axis=1)) != counts:
            raise RunError(
                f"{path} is of other images than fold {fold} of {manifest.where}",
                "the sum would not count each image once",
                "set run.out to a new folder",
            )
        records.append((found[0], record))
    confusion: I64 = np.sum([record["confusion"] for _, record in records], axis=0)
    values = {name: [float(record[name] or 0) for _, record in records] for name in _FIGURES}
    summary = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": f"wasteddp {__version__}",
        "manifest": manifest.sha256,
        "classes": list(manifest.classes),
        "groups": {name: manifest.groups[name] for name in ("rule", "num_groups")} if manifest.groups else None,
        "folds": [
            {"fold": fold, "run": path.name, "num_samples": record["num_samples"], "without_images": _absent(record)}
            | {name: record[name] for name in _FIGURES}
            for fold, (path, record) in enumerate(records)
        ],
        "mean": {name: mean(one) for name, one in values.items()},
        "standard_deviation": {name: stdev(one) for name, one in values.items()},
        "pooled": {**summarise(confusion).to_json(), "confusion": confusion.tolist()},
    }
    write_atomically(out / "folds.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return summary


def _absent(record: Mapping[str, Any]) -> list[str]:
    classes = zip(record["classes"], record["per_class"], strict=True)
    return [name for name, one in classes if not one["support"]]


def _find_runs(out: Path) -> dict[int, list[Path]]:
    """Return the runs of each fold, from their settings."""
    runs = dict[int, list[Path]]()
    for path in sorted(out.glob("*/settings.yaml")):
        try:
            with storage("reading the settings of a run", path):
                fold = int(plain_yaml(read_regular(path).decode())["data"]["fold"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            continue
        runs.setdefault(fold, []).append(path.parent)
    return runs


def _print(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    table = Table("fold", title=f"{len(summary['folds'])} folds", title_justify="left")
    for name in _FIGURES.values():
        table.add_column(name, justify="right")
    table.add_column("images", justify="right")
    for one in summary["folds"]:
        table.add_row(str(one["fold"]), *(percent(one[name] or 0) for name in _FIGURES), str(one["num_samples"]))
    for title, key in (("mean", "mean"), ("standard deviation", "standard_deviation")):
        table.add_row(title, *(percent(summary[key][name]) for name in _FIGURES))
    console.print(table)
    for one in summary["folds"]:
        if absent := one["without_images"]:
            line = f"fold {one['fold']} has no images of {joined(absent)}: its macro figures are of the other classes"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    confusion = np.array(summary["pooled"]["confusion"])
    print_metrics(console, summarise(confusion), summary["classes"], confusion, title="all folds together")
    if groups := summary["groups"]:
        line = (
            f"the images are of {groups['num_groups']:,} groups ({groups['rule']}); the accuracy's interval is over "
            "images, so it is too narrow; the standard deviation is over folds, which divide no group"
        )
        console.print(inert(line), markup=False, highlight=False, soft_wrap=True)
    console.print(
        "each model is the best of its run on the images of its fold, so these figures are a little too high",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"saved in {out / 'folds.json'}", markup=False, highlight=False, soft_wrap=True)
