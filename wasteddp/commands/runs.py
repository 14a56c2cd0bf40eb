"""The commands for runs: average, review, report, sync, dashboard."""

from __future__ import annotations

import argparse
from typing import Any

from wasteddp.commands.arguments import (
    Commands,
    add_compute,
    add_decoders,
    add_run,
    keywords,
    positive,
    share,
    to_path,
    words,
)  # fmt: skip
from wasteddp.errors import SettingsError
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
    _add_average(commands)
    _add_review(commands)
    _add_report(commands)
    _add_sync(commands)
    _add_dashboard(commands)


def _add_average(commands: Commands) -> None:
    command = commands.add_parser(
        "average",
        help="average a run's newest checkpoints into a model",
        description="Averages the weights of the newest checkpoints, recomputes BatchNorm's statistics on training "
        "images, compares the result with the run's model on data.eval_split, and writes it to RUN/average/, which "
        "`evaluate` and `predict` accept like a run.",
    )
    add_run(command)
    command.add_argument(
        "--last",
        type=positive,
        default=5,
        metavar="N",
        help="checkpoints to average, or as many as the run has, at least 2 (default: %(default)s)",
    )
    command.add_argument(
        "--images", type=positive, default=2048, metavar="N", help="images for the statistics (default: %(default)s)"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--out", type=to_path, metavar="FOLDER", help="default: RUN/average")
    where.add_argument("--replace", action="store_true", help="replace RUN/model")
    add_compute(command)
    command.set_defaults(run=_average)


def _average(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.average import AverageOptions, run

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
        help="write one HTML page of a run, or of several",
        description="Writes one HTML file that needs no server and no network: decisions, curves, confusion matrix, "
        "classes with intervals, reliability, mistakes, settings and lineage. A training writes RUN/report.html at its "
        "end, and `evaluate --bins` writes it again.",
    )
    command.add_argument("runs", metavar="RUN", nargs="+", type=to_path, help="folder of a run; several are compared")
    command.add_argument(
        "--out", type=to_path, metavar="FILE", help="default: report.html (several: comparison.html) in the first run"
    )
    command.add_argument(
        "--bins",
        type=to_path,
        metavar="FILE",
        help="decide by these bins instead of those of `evaluate --bins`, from the predictions that `evaluate` saved",
    )
    command.add_argument("--max-error", type=share, metavar="E", help="with --bins: as in `evaluate`")
    command.add_argument(
        "--confidence", type=share, metavar="P", help="of the guarantee of --max-error (default: 0.95)"
    )
    command.add_argument(
        "--choose-on", metavar="SPLIT", help="with --bins: as in `evaluate` (default: the evaluation split)"
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    refuse_confidence_alone(arguments)
    save_report(**{name: value for name, value in keywords(arguments).items() if value is not None})


def refuse_confidence_alone(arguments: argparse.Namespace) -> None:
    if arguments.confidence is not None and arguments.max_error is None:
        raise SettingsError(
            "--confidence was given without --max-error",
            "it would have no effect: a hazard has a confidence of its own in the file of bins",
            "give --max-error E too, or leave it out",
        )


def save_report(*arguments: Any, **named: Any) -> None:
    from wasteddp.report.page import write_report

    out = write_report(*arguments, **named)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, opens in any browser, needs no network")


def _add_sync(commands: Commands) -> None:
    command = commands.add_parser(
        "sync",
        help="send the missing rows of a run to W&B",
        description="Sends the rows, images and artifacts that W&B does not have, in order and none twice, from the "
        "run's folder: after training offline, after an outage or a kill, and while a run trains offline.",
    )
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    command.add_argument("--no-model", action="store_true", help="do not send the model")
    command.add_argument(
        "--timeout", type=positive, default=600, metavar="S", help="longest wait for W&B (default: %(default)s)"
    )
    command.set_defaults(run=_sync)


def _sync(arguments: argparse.Namespace) -> None:
    from wasteddp.training.tracking.wandb_sync import sync

    done = sync(arguments.run_folder, timeout_s=arguments.timeout, model=not arguments.no_model)
    print(f"W&B run {done.run_id}: sent {done.num_sent} of {done.num_rows} rows, the others were there; {done.url}")


def _add_dashboard(commands: Commands) -> None:
    command = commands.add_parser(
        "dashboard",
        help="check the W&B dashboard, or create it",
        description="Checks that every panel of the dashboard shows a metric that runs have; --save creates it on W&B.",
    )
    command.add_argument("config", nargs="?", type=to_path, metavar="YAML", help="default: configs/dashboard.yaml")
    command.add_argument("--save", action="store_true", help="create the workspace on W&B (needs a key)")
    command.add_argument("--project", default="wasteddp", help="default: %(default)s")
    command.add_argument("--entity", default="", help="user or team (default: the key's own)")
    command.set_defaults(run=_dashboard)


def _dashboard(arguments: argparse.Namespace) -> None:
    from wasteddp.tools import dashboard

    path = arguments.config or dashboard.DEFAULT_PATH
    loaded = dashboard.load(path)
    for section in loaded.sections:
        print(
            f"{section.name}\n  " + "\n  ".join(f"{panel.title}: {', '.join(panel.names)}" for panel in section.panels)
        )
    print(f"{path}: {loaded.num_panels} panels, runs have every metric in it")
    if arguments.save:
        print(f"saved: {dashboard.save(loaded, entity=arguments.entity, project=arguments.project)}")


def _add_review(commands: Commands) -> None:
    command = commands.add_parser(
        "review",
        help="find labels that are probably wrong, and write a page to correct them",
        description="Writes one HTML page with the images whose label is probably wrong, near-duplicates with "
        "different labels, and the images without a label that are most worth one. It works with the keyboard and on a "
        "phone, and saves a CSV for `wasteddp shard --corrections`.",
    )
    add_run(command)
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--split",
        type=words,
        default=(),
        metavar="NAMES",
        help="splits to review, such as test or val,test (default: val,test). The model was trained on train, so its "
        "probabilities there are not held out",
    )
    which.add_argument(
        "--predictions",
        type=to_path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="held-out predictions.csv files of `evaluate`, such as those of all folds, used instead of --split",
    )
    command.add_argument(
        "--unlabelled",
        type=expand_home,
        default="",
        metavar="FOLDER-OR-CSV",
        help="images without labels, or a CSV of `predict` with them",
    )
    command.add_argument("--out", type=to_path, metavar="FILE", help="default: RUN/review.html")
    command.add_argument(
        "--limit", type=positive, default=400, metavar="N", help="most pictures on the page (default: %(default)s)"
    )
    command.add_argument(
        "--no-pairs",
        dest="pairs",
        action="store_false",
        help="do not look for near-duplicates, which decodes every image of the set",
    )
    add_compute(command)
    add_decoders(command)
    command.set_defaults(run=_review)


def _review(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.review import review_run

    review_run(**keywords(arguments))
