"""The commands that show runs: report, sync, dashboard."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, positive, to_path


def add(commands: Commands) -> None:
    _add_report(commands)
    _add_sync(commands)
    _add_dashboard(commands)


def _add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write one HTML page of a run, or of several",
        description="Writes one HTML file that needs no server and no network: curves, confusion matrix, classes with "
        "intervals, reliability, mistakes, settings and lineage. A training writes RUN/report.html at its end.",
    )
    command.add_argument("runs", metavar="RUN", nargs="+", type=to_path, help="folder of a run; several are compared")
    command.add_argument(
        "--out", type=to_path, metavar="FILE", help="default: report.html (several: comparison.html) in the first run"
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from wasteddp.report.page import ReportOptions, run

    run(ReportOptions(tuple(arguments.runs), arguments.out))


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
