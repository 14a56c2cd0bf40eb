"""Every Python of a job runs this first. Its trainings have a narrow network and wait in each step instead of
computing, for what Slurm does to a job takes a moment. They leave their report out.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _narrow(_: ModuleType) -> None:
    import narrow

    narrow.install()


def _slow(metrics: ModuleType) -> None:
    real = metrics.Meter.step_done

    def step_done(*arguments: Any) -> None:
        time.sleep(0.3)
        real(*arguments)

    metrics.Meter.step_done = step_done


def _without_report(background: ModuleType) -> None:
    background.write_within = lambda limit_s, run: "report: left out in tests"


class _Finder:
    """Changes these modules when they have been imported, which most programs never do."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        change = self.changes.pop(name, None)
        spec = importlib.util.find_spec(name) if change else None
        if not change or not spec or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_CHANGES = {
    "torchvision.models.resnet": _narrow,
    "wasteddp.training.meter": _slow,
    "wasteddp.report.background": _without_report,
}
sys.meta_path.insert(0, _Finder(_CHANGES))  # type: ignore[arg-type]
