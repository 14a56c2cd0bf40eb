"""The command `wasteddp`: everything but training itself, which is `accelerate launch wasteddp/train.py`.

Each command is a parser and a function; the function imports what it needs, so that help is instant and torch-free.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wasteddp import __version__, doctor
from wasteddp.errors import EXIT_FINISHED, SourceError, WastedError, exit_with, storage

if TYPE_CHECKING:
    from wasteddp.data.sharding import Job, Options

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# --- images to shards -------------------------------------------------------------------------------------------------


def _add_shard(commands: Commands) -> None:
    command = commands.add_parser(
        "shard",
        help="turn images into a shard set",
        description="Turns a folder of class folders, a zip or tar of it, a CSV (path,label[,split]) or a recipe "
        "(.yaml) into WebDataset tars with a manifest. Stopped and started again, it goes on where it was.",
    )
    command.add_argument("source", metavar="SOURCE", type=Path, help="folder, zip, tar, CSV or recipe")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="shard set to make (a recipe knows its own)")
    command.add_argument(
        "--from", dest="local", type=Path, metavar="PATH", help="local copy of a recipe's images, instead of a download"
    )
    split = command.add_argument_group("splits")
    split.add_argument("--fractions", type=_numbers, metavar="TRAIN,VAL,TEST", help="default: 0.7,0.15,0.15")
    split.add_argument("--split-seed", type=int, default=0, metavar="S", help="another seed, another split")
    split.add_argument(
        "--split-files", nargs="+", default=(), metavar="FILE", help="folder of list files, or train=F val=F test=F"
    )
    split.add_argument("--group-near-duplicates", action="store_true", help="keep near-duplicates in one split")
    split.add_argument("--near-duplicate-distance", type=int, metavar="BITS", help="of 64 (default: 8; 0 to 11)")
    split.add_argument("--keep-conflicts", action="store_true", help="keep one of equal images with different labels")
    images = command.add_argument_group("images")
    images.add_argument("--max-side", type=int, metavar="PX", help="shrink images with a longer side than this")
    images.add_argument("--quality", type=int, metavar="Q", help="of JPEGs that must be written anew (default: 95)")
    images.add_argument("--shard-mb", type=float, metavar="MB", help="size at which a tar ends (default: 256)")
    images.add_argument("--bins", type=Path, metavar="FILE", help="YAML of `class: bin`, the bin each class goes into")
    images.add_argument(
        "--max-left-out",
        type=float,
        metavar="LIMIT",
        help="stop if more images cannot be used: a fraction below 1 or a number (default: a tenth, but at least 10)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a set made of other images or options")
    several = command.add_argument_group("several machines (slurm/shard.sh does it)")
    several.add_argument("--part", metavar="I/N", help="do this part of the work; last, the same without it")
    several.add_argument("--stage", choices=("read", "write"), help="of a part: write only when all parts have read")
    _add_workers(command)
    command.set_defaults(run=_shard)


def _shard(arguments: argparse.Namespace) -> None:
    from wasteddp.data import parts, recipes, sharding
    from wasteddp.data.parallel import num_usable_cores
    from wasteddp.data.summary import summarise

    workers = arguments.workers or num_usable_cores()
    if arguments.part or arguments.stage:
        part = parts.Part.parse(arguments.part or "")
        if not arguments.stage or arguments.overwrite:
            raise SourceError(
                "--part was given without --stage, or with --overwrite",
                "the parts would not be of one set",
                "give --stage read, and when all parts have read --stage write; remove an old set yourself",
            )
        make_part = {"read": parts.read_part, "write": parts.write_part}[arguments.stage]
        make_part(_shard_job(arguments), part, workers=workers)
        return
    if _is_recipe(arguments.source):
        _refuse_own_split(arguments)
        options = _shard_options(arguments)
        local, out = arguments.local, arguments.out
        manifest = recipes.make_recipe(
            arguments.source, out=out, local=local, options=options, workers=workers, overwrite=arguments.overwrite
        )
    else:
        manifest = sharding.make_shards(_shard_job(arguments), workers=workers, overwrite=arguments.overwrite)
    print(summarise(manifest))


def _shard_options(arguments: argparse.Namespace) -> Options:
    from wasteddp.data import sharding

    names = {
        "fractions": arguments.fractions,
        "split_seed": arguments.split_seed,
        "max_side_px": arguments.max_side,
        "quality": arguments.quality,
        "shard_mb": arguments.shard_mb,
        "keep_conflicts": arguments.keep_conflicts,
        "group_near_duplicates": arguments.group_near_duplicates,
        "near_duplicate_distance": arguments.near_duplicate_distance,
        "max_left_out": arguments.max_left_out,
    }
    return sharding.Options(**{name: value for name, value in names.items() if value is not None})


def _shard_job(arguments: argparse.Namespace) -> Job:
    """What is to be sharded, where its images are at hand."""
    from wasteddp.data import recipes, sharding, splits

    options = _shard_options(arguments)
    if _is_recipe(arguments.source):
        _refuse_own_split(arguments)
        return recipes.local_job(arguments.source, out=arguments.out, local=arguments.local, options=options)
    if arguments.out is None or arguments.local is not None:
        raise SourceError(
            "--out is missing, or --from was given without a recipe",
            "where the set goes is not known",
            f"wasteddp shard {arguments.source} --out shards/NAME",
        )
    return sharding.Job(
        source=arguments.source,
        out=arguments.out,
        options=options,
        bins=recipes.load_bins(arguments.bins) if arguments.bins else {},
        split_files=splits.parse_split_files(arguments.split_files) if arguments.split_files else {},
    )


def _is_recipe(source: Path) -> bool:
    return source.suffix.lower() in (".yaml", ".yml")


def _refuse_own_split(arguments: argparse.Namespace) -> None:
    if arguments.split_files or arguments.bins:
        raise SourceError(
            "--split-files and --bins were given with a recipe", "it has its own", "change them in a copy of the recipe"
        )


def _add_draw(commands: Commands) -> None:
    command = commands.add_parser(
        "draw",
        help="draw synthetic waste into a folder of class folders",
        description="Draws images such as those of shards/sample.yaml; another seed draws new ones.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("--images-per-class", type=int, default=10, metavar="N", help="default: %(default)s")
    command.add_argument("--size", type=int, default=144, metavar="PX", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=1, metavar="S", help="default: %(default)s; the sample set has 0")
    command.set_defaults(run=_draw)


def _draw(arguments: argparse.Namespace) -> None:
    from wasteddp.data import drawing

    count = drawing.draw_folder(
        arguments.folder,
        kinds=drawing.KINDS,
        images_per_class=arguments.images_per_class,
        size_px=arguments.size,
        seed=arguments.seed,
    )
    print(f"{count} images of {len(drawing.KINDS)} classes in {arguments.folder}")


def _add_verify(commands: Commands) -> None:
    command = commands.add_parser(
        "verify",
        help="re-read a shard set and name what is damaged",
        description="Re-reads every byte of a shard set against its manifest. Exit code 2 if anything is damaged.",
    )
    command.add_argument("set", metavar="FOLDER-OR-URL", help="a shard set")
    _add_workers(command)
    command.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    from wasteddp.data.parallel import num_usable_cores
    from wasteddp.data.remote import is_url
    from wasteddp.data.stores import shown
    from wasteddp.data.verifying import require_whole, verify, verify_remote

    workers = arguments.workers or num_usable_cores()
    remote = is_url(arguments.set)
    verified = verify_remote(arguments.set, workers=workers) if remote else verify(Path(arguments.set), workers=workers)
    where, counts = (shown(arguments.set), "") if remote else (arguments.set, ", and label counts")
    require_whole(where, verified)
    print(
        f"{where} is whole: {verified.num_samples:,} samples in {verified.num_shards} shard(s), "
        f"{verified.num_bytes:,} bytes re-read; sizes, sha256 of tars and indexes{counts} are the manifest's"
    )


def _add_index(commands: Commands) -> None:
    command = commands.add_parser(
        "index",
        help="make a manifest for tars that another tool wrote",
        description="Reads WebDataset or img2dataset tars once and writes an index beside each, and a manifest. The "
        "split is the start of a tar's name (train, val, test), otherwise train. Behind a URL each tar is fetched once "
        "and not kept; indexes and manifest go to --out, to be copied beside the tars.",
    )
    command.add_argument("folder", metavar="FOLDER-OR-URL", help="where the .tar files are")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where to write, if they are behind a URL")
    command.add_argument(
        "--tars", default="", metavar="NAMES", help="train-{000..146}.tar: needed if a web server lists no folders"
    )
    command.add_argument("--classes", type=_words, default=(), metavar="A,B,C", help="class names in their order")
    command.add_argument("--classes-from", type=Path, metavar="FILE", help="the same, one a line")
    command.add_argument("--label-key", metavar="KEY", help="field of the .json that is the label")
    command.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    _add_workers(command)
    command.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> None:
    from wasteddp.data import indexing
    from wasteddp.data.parallel import num_usable_cores
    from wasteddp.data.remote import is_url
    from wasteddp.data.stores import shown
    from wasteddp.data.summary import summarise

    classes: tuple[str, ...] = arguments.classes
    if arguments.classes_from:
        with storage("reading the class names", arguments.classes_from):
            lines = arguments.classes_from.read_text(encoding="utf-8").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
    remote = is_url(arguments.folder)
    if remote != bool(arguments.out) or (arguments.tars and not remote):
        raise SourceError(
            f"{arguments.folder} is a {'URL, without --out' if remote else 'folder, and --out or --tars was given'}",
            "tars in a folder have their indexes beside them; a store is only read, so its indexes need a place",
            "wasteddp index FOLDER, or wasteddp index URL --out FOLDER",
        )
    index = (
        partial(indexing.index_url, arguments.folder, arguments.out, tars=arguments.tars)
        if remote
        else partial(indexing.index_folder, Path(arguments.folder))
    )
    manifest = index(
        workers=arguments.workers or num_usable_cores(),
        classes=classes,
        label_keys=(arguments.label_key,) if arguments.label_key else indexing.DEFAULT_LABEL_KEYS,
        overwrite=arguments.overwrite,
    )
    print(summarise(manifest))
    if remote:
        print(f"now copy {arguments.out}/*.idx and then {arguments.out}/manifest.json to {shown(arguments.folder)}")


def _add_plan(commands: Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="show the order of samples: steps, shuffle quality, shards each node reads",
        description="Shows what a training would do with a shard set, without starting one: steps, samples left out, "
        "how well the order is shuffled, and how much of the set each node would fetch if it were remote.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="a shard set")
    command.add_argument("--config", metavar="YAML", help="defaults, if left out")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument(
        "--nodes", type=_integers, default=(1, 2, 4, 8), metavar="N,N", help="numbers of nodes (default: 1,2,4,8)"
    )
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from wasteddp import settings as settings_file
    from wasteddp.data.forecast import forecast
    from wasteddp.data.manifest import Manifest

    overrides = [*arguments.set, f"data.shards={arguments.folder}"]
    settings = (
        settings_file.load(arguments.config, overrides) if arguments.config else settings_file.parse("", overrides)
    )
    print(forecast(Manifest.load(arguments.folder), settings, nodes=arguments.nodes))


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=_positive, metavar="N", help="threads (default: one a core)")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


# --- after training ---------------------------------------------------------------------------------------------------


def _add_evaluate(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure a run's model on a split of its shards",
        description="Accuracy with its 95 % interval, per-class figures and the confusion matrix; all of it is also "
        "saved in RUN/evaluations/SPLIT/.",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, such as runs/resnet50")
    command.add_argument("--split", default="test", help="split to measure on (default: %(default)s)")
    command.add_argument("--shards", metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)")
    _add_compute(command)
    _add_tta(command)
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from wasteddp.inference.evaluate import EvaluateOptions, run

    run(
        EvaluateOptions(
            run=arguments.run_folder,
            split=arguments.split,
            shards=arguments.shards,
            batch_size=arguments.batch_size,
            device=arguments.device,
            tta=arguments.tta,
        )
    )


def _add_predict(commands: Commands) -> None:
    command = commands.add_parser(
        "predict",
        help="classify images with a trained model",
        description="Classifies images; files that cannot be read are listed at the end. The exit code is 0 if at "
        "least one image was classified, 2 if none.",
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of a run or of its model")
    command.add_argument("paths", metavar="PATH", nargs="+", help="image files, folders, or globs in quotes (** too)")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the probabilities of all classes as CSV")
    command.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    command.add_argument(
        "--top", type=_positive, default=3, metavar="N", help="classes to print (default: %(default)s)"
    )
    _add_compute(command)
    _add_tta(command)
    command.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    from wasteddp.inference.predict import PredictOptions, run

    run(
        PredictOptions(
            model=arguments.model,
            paths=tuple(arguments.paths),
            csv=arguments.csv,
            json=arguments.json,
            top=arguments.top,
            batch_size=arguments.batch_size,
            device=arguments.device,
            tta=arguments.tta,
        )
    )


def _add_average(commands: Commands) -> None:
    command = commands.add_parser(
        "average",
        help="make a model of the mean of a run's newest checkpoints",
        description="Averages the weights of the newest checkpoints, takes BatchNorm's statistics anew from training "
        "images, measures the result beside the run's model on data.eval_split, and writes it to RUN/average/, which "
        "`evaluate` and `predict` take like a run.",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, such as runs/resnet50")
    command.add_argument(
        "--last",
        type=_positive,
        default=5,
        metavar="N",
        help="checkpoints, or as many as there are, 2 at least: see checkpoint.keep_last (default: %(default)s)",
    )
    command.add_argument(
        "--images", type=_positive, default=2048, metavar="N", help="for the statistics (default: %(default)s)"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/average")
    where.add_argument("--replace", action="store_true", help="put it in the place of RUN/model")
    command.add_argument("--shards", metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)")
    _add_compute(command)
    command.set_defaults(run=_average)


def _average(arguments: argparse.Namespace) -> None:
    from wasteddp.training.averaging import AverageOptions, run

    run(
        AverageOptions(
            run=arguments.run_folder,
            last=arguments.last,
            images=arguments.images,
            out=arguments.out,
            replace=arguments.replace,
            shards=arguments.shards,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
    )


def _add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write a run, or a comparison of several, as one HTML page",
        description="Writes one HTML file that needs no server and no network: curves, confusion matrix, classes with "
        "intervals, reliability, mistakes, settings and lineage. Training writes RUN/report.html itself at its end.",
    )
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run; several are compared")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html (several: comparison.html) in the first run"
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from wasteddp.report.page import ReportOptions, run

    run(ReportOptions(tuple(arguments.runs), arguments.out))


def _add_compute(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="images computed at once (default: 8 on a CPU, 64 on a GPU; another number may change the last digits "
        "of a probability)",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")


def _add_tta(command: argparse.ArgumentParser) -> None:
    from wasteddp.inference.views import VIEWS

    command.add_argument(
        "--tta",
        choices=tuple(VIEWS),
        default="none",
        help="test-time augmentation: the mean over the image and its mirror image (flip, twice the time) or all four "
        "flips (flips, four times)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


# --- before a run -----------------------------------------------------------------------------------------------------


def _add_doctor(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="look at machine, data and disk before a long run",
        description="Green, yellow, red, and what to do. Exit codes: 0 all green, 1 something yellow, 2 something red. "
        "Of several processes: accelerate launch ... -m wasteddp.doctor",
    )
    doctor.add_arguments(command)
    command.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    raise SystemExit(doctor.run(arguments))


def _add_lr_find(commands: Commands) -> None:
    command = commands.add_parser(
        "lr-find",
        help="try growing learning rates and suggest one",
        description="A range test: trains some steps of a configuration with a learning rate that grows until the loss "
        "bursts, and suggests one to set. One process; run.out is not touched.",
    )
    command.add_argument("--config", required=True, metavar="YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--steps", type=_positive, default=100, metavar="N", help="default: %(default)s")
    command.add_argument("--from", dest="lowest", type=float, default=1e-6, metavar="LR", help="default: %(default)s")
    command.add_argument("--to", dest="highest", type=float, default=10.0, metavar="LR", help="default: %(default)s")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="of the result (default: run.out with .lr-find)")
    command.set_defaults(run=_lr_find)


def _lr_find(arguments: argparse.Namespace) -> None:
    from wasteddp import settings as settings_file
    from wasteddp.training import lr_find

    settings = settings_file.load(arguments.config, arguments.set)
    options = lr_find.Options(arguments.steps, arguments.lowest, arguments.highest)
    lr_find.run(settings, options, arguments.out, lambda line: print(line, flush=True))


# --- dashboards -------------------------------------------------------------------------------------------------------


def _add_sync(commands: Commands) -> None:
    command = commands.add_parser(
        "sync",
        help="send W&B what it lacks of a run",
        description="Sends the rows, pictures and artifacts that W&B does not have, in order and none twice, from the "
        "run's folder: after training offline, an outage or a kill, also while a run trains offline.",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, such as runs/resnet50")
    command.add_argument("--no-model", action="store_true", help="leave out the model")
    command.add_argument(
        "--timeout", type=_positive, default=600, metavar="S", help="longest wait for W&B (default: %(default)s)"
    )
    command.set_defaults(run=_sync)


def _sync(arguments: argparse.Namespace) -> None:
    from wasteddp.training.sync import sync

    done = sync(arguments.run_folder, timeout_s=arguments.timeout, model=not arguments.no_model)
    print(f"W&B run {done.run_id}: sent {done.num_sent} of {done.num_rows} rows, it had the others; {done.url}")


def _add_dashboard(commands: Commands) -> None:
    command = commands.add_parser(
        "dashboard",
        help="check the W&B dashboard against the metrics, or make it",
        description="Checks that every panel of the dashboard shows something that runs have; --save makes it on W&B.",
    )
    command.add_argument("config", nargs="?", type=Path, metavar="YAML", help="default: configs/dashboard.yaml")
    command.add_argument("--save", action="store_true", help="make a workspace of it (needs a key)")
    command.add_argument("--project", default="wasteddp", help="default: %(default)s")
    command.add_argument("--entity", default="", help="user or team (default: the key's own)")
    command.set_defaults(run=_dashboard)


def _dashboard(arguments: argparse.Namespace) -> None:
    from wasteddp.training import dashboard

    path = arguments.config or dashboard.DEFAULT_PATH
    loaded = dashboard.load(path)
    for section in loaded.sections:
        print(
            f"{section.name}\n  " + "\n  ".join(f"{panel.title}: {', '.join(panel.names)}" for panel in section.panels)
        )
    print(f"{path}: {loaded.num_panels} panels, every metric in it is one that runs have")
    if arguments.save:
        print(f"saved: {dashboard.save(loaded, entity=arguments.entity, project=arguments.project)}")


def _add_verify_resume(commands: Commands) -> None:
    command = commands.add_parser(
        "verify-resume",
        help="prove that a training that is killed ends like one that is not",
        description="Trains some steps undisturbed, then once more with SIGKILL and SIGTERM at random moments, and "
        "prints both side by side. Exit code 0: the same samples, images and, at one number of processes, weights "
        "bit for bit; 2: not. Removes the two runs if they are the same; the receipt stays.",
    )
    command.add_argument("--config", required=True, metavar="YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--steps", type=_positive, default=20, metavar="N", help="to train (default: %(default)s)")
    command.add_argument("--kills", type=_positive, default=3, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--processes", default="1", metavar="N,...", help="of the attempts in turn, such as 1,2 (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, metavar="S", help="of the moments and signals (default: a new one)")
    command.add_argument(
        "--out", type=Path, default=Path("runs/verify-resume"), metavar="FOLDER", help="of the receipt"
    )
    command.set_defaults(run=_verify_resume)


def _verify_resume(arguments: argparse.Namespace) -> None:
    import secrets

    from wasteddp.training import resume_proof, resume_receipt

    proof = resume_proof.prove(
        arguments.config,
        arguments.set,
        steps=arguments.steps,
        kills=arguments.kills,
        processes=tuple(_positive(part) for part in _words(arguments.processes)),
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
        out=arguments.out,
        say=lambda line: print(line, flush=True),
    )
    resume_receipt.show(proof, arguments.out)
    resume_receipt.refuse(proof, arguments.out)


# --- settings ---------------------------------------------------------------------------------------------------------


def _add_settings(commands: Commands) -> None:
    add = commands.add_parser("settings", help="print all settings of a config, or their JSON Schema")
    add.add_argument("config", nargs="?", metavar="YAML", help="defaults alone, if left out")
    add.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    add.add_argument("--schema", action="store_true", help="print the JSON Schema, for editors")
    add.set_defaults(run=_settings)


def _settings(arguments: argparse.Namespace) -> None:
    import json

    from wasteddp import settings

    if arguments.schema:
        print(json.dumps(settings.json_schema(), indent=1))
    elif arguments.config:
        print(settings.load(arguments.config, arguments.set).to_yaml(), end="")
    else:
        print(settings.parse("", arguments.set).to_yaml(), end="")


# --- the program ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="wasteddp", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=f"wasteddp {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_shard,
        _add_verify,
        _add_index,
        _add_draw,
        _add_plan,
        _add_evaluate,
        _add_predict,
        _add_average,
        _add_report,
        _add_doctor,
        _add_lr_find,
        _add_verify_resume,
        _add_settings,
    ):
        add(commands)
    _add_sync(commands)
    _add_dashboard(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a `WastedError` becomes its message and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except WastedError as error:
        exit_with(error)
    except BrokenPipeError:  # `wasteddp ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its exit
        return 141  # 128 + SIGPIPE, what a shell expects
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
