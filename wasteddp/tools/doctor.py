"""Check machine, data and disk before a long run, and print what to do.

    wasteddp doctor --config configs/resnet50.yaml                                              one process
    accelerate launch --multi_gpu -m wasteddp.tools.doctor --config configs/resnet50.yaml             all GPUs of a node
    accelerate launch --config_file launch/accelerate/cpu2.yaml -m wasteddp.tools.doctor --config ... two CPU processes

If it is started with the run's launcher, it also tests the communication of the processes. Exit codes: 0 all green,
1 yellow, 2 red. It writes only one file in run.out, and removes it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wasteddp import environment
from wasteddp.errors import EXIT_USER_ERROR, LaunchError, SettingsError, WastedError
from wasteddp.files import expand_home

if TYPE_CHECKING:
    from wasteddp.settings import Settings
    from wasteddp.tools.machine_checks import Finding
    from wasteddp.training.distributed.runtime import Runtime
    from wasteddp.training.watchdog.watchdog import Watchdog

_LAUNCHER_LEAVES_S = 30.0  # torchrun and accelerate launch send SIGKILL this long after SIGTERM
_SLURM_LEAVES_S = 300.0  # slurm/train.sh: --signal=B:USR1@300
_ASSUMED_CLASSES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=expand_home, metavar="YAML", help="settings of the run (default: the default settings)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--signal-leaves-s", type=float, metavar="S",
        help="seconds between a stop signal and SIGKILL (default: 300 in a Slurm job, otherwise the launcher's 30)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """All ranks: run the checks. Rank 0 prints them. Return the exit code."""
    from wasteddp import settings as settings_file
    from wasteddp.tools import machine_checks
    from wasteddp.training.watchdog.watchdog import Watchdog

    config, overrides = arguments.config, arguments.set
    settings = settings_file.load(config, overrides) if config else settings_file.parse("", overrides)
    watch = Watchdog.from_environment()
    watch.start(settings)
    try:
        findings = examine(settings, watch, arguments.signal_leaves_s or _time_left_s())
    except Exception as error:
        return watch.failed(error)
    finally:
        watch.close()
    if environment.launched("RANK", 0) == 0:
        if arguments.json:
            print(machine_checks.findings_to_json(findings))
        else:
            machine_checks.print_table(findings)
    return machine_checks.EXIT_CODES[machine_checks.worst(findings)]


def examine(settings: Settings, watch: Watchdog, leaves_s: float) -> list[Finding]:
    """All ranks: run every check, in the order in which a run would meet the problems."""
    from wasteddp.tools import machine_checks
    from wasteddp.tools.machine_checks import Finding
    from wasteddp.training.distributed import startup

    load = machine_checks.check_load(*machine_checks.load_of_machine())  # before the checks add to it
    findings = [
        machine_checks.check_versions(machine_checks.versions_tested()),
        machine_checks.check_precision(settings.precision),
    ]
    try:
        runtime = startup.start_runtime(settings, watch)
    except (LaunchError, SettingsError) as error:  # the same on every rank
        return [*findings, Finding("processes", "red", error.found, error.remedy)]
    if settings.precision == "auto":  # measured by `startup.start_runtime`, on a GPU
        findings[-1] = replace(findings[-1], found=f"{runtime.precision}: {runtime.precision_reason}")
    with contextlib.closing(runtime):
        found = (
            f"{runtime.world_size} process(es) x {runtime.micro_batch} images x {runtime.accumulation} accumulated = "
            f"global batch {settings.train.batch_size}"
        )
        findings.append(Finding("processes", "green", found))
        findings += _examine_machines(runtime, load)
        return findings + _examine_run(settings, runtime, leaves_s)


def _examine_machines(runtime: Runtime, load: Finding) -> list[Finding]:
    """All ranks: run the checks of the machines."""
    from wasteddp.tools import machine_checks

    devices = runtime.gather(machine_checks.device_of(runtime))
    gpus = sum(device.host == devices[runtime.rank].host and device.identity != "cpu" for device in devices)
    shared_memory = _worst_of_ranks(runtime, machine_checks.check_shared_memory(gpus))
    runtime.totals(0)  # all ranks return from it at nearly the same moment
    times = runtime.gather(time.time())
    load = _worst_of_ranks(runtime, load)
    return [machine_checks.check_devices(devices), load, shared_memory, machine_checks.check_clocks(times)]


def _examine_run(settings: Settings, runtime: Runtime, leaves_s: float) -> list[Finding]:
    """All ranks: run the checks of the run; rank 0 alone checks the work of rank 0."""
    from wasteddp.tools import machine_checks, run_checks
    from wasteddp.training.checkpoint import state

    runtime.watch.at("reading the shards", slow=True)
    shards, opened = run_checks.check_shards(settings, runtime.rank)
    classes = opened.manifest.classes if opened else ("",) * _ASSUMED_CLASSES
    runtime.watch.at("loading the initial weights", slow=True)
    weights = run_checks.check_weights(settings, classes)
    # the same on all ranks, also where one cannot read the classes: sums of different sizes would hang
    num_bytes = max(runtime.gather(run_checks.model_bytes(settings.model.arch, len(classes))))
    findings = [_worst_of_ranks(runtime, one) for one in (shards, weights)]
    findings.append(machine_checks.check_all_reduce(runtime, num_bytes))
    runtime.watch.at("checking the disk and the dashboard", slow=True)
    out = Path(settings.run.out)
    if runtime.is_main:
        size = state.room_for_checkpoint(
            num_bytes, optimizer=settings.optimizer.name, ema_decay=settings.train.ema_decay
        )
        findings += [run_checks.check_folder(settings, opened)] if opened else []
        findings += [
            run_checks.check_file_system(out),
            run_checks.check_disk(out, state.room_for_run(num_bytes, size, keep_last=settings.checkpoint.keep_last)),
            run_checks.check_save(out, size, leaves_s),
            run_checks.check_wandb(settings.track.wandb),
        ]
    return list(runtime.gather(findings)[0])


def _worst_of_ranks(runtime: Runtime, finding: Finding) -> Finding:
    """All ranks: return the worst of their findings, with its rank if they differ."""
    from wasteddp.tools.machine_checks import worst

    findings: list[Finding] = runtime.gather(finding)
    colour = worst(findings)
    rank = next(rank for rank, one in enumerate(findings) if one.colour == colour)
    if colour == "green":
        return findings[0]
    where = f"rank {rank}: " if len(findings) > 1 else ""
    return replace(findings[rank], found=where + findings[rank].found)


def _time_left_s() -> float:
    if "SLURM_JOB_ID" in os.environ:
        return _SLURM_LEAVES_S
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _LAUNCHER_LEAVES_S))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="wasteddp.tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        environment.prepare()
        return run(parser.parse_args(argv))
    except WastedError as error:
        if environment.launched("RANK", 0) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    from wasteddp.training.watchdog.exits import leave

    leave(main())
