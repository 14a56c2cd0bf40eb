"""Every Python that has this folder in PYTHONPATH runs this first. TRAININGS names how its trainings are changed:

narrow       a narrow network
slow         each step waits, for a test that must catch a training in the middle
unreported   no report, which takes 2 s of a new process
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _narrow(_: ModuleType) -> None:
    import narrow

    narrow.install()


def _slow(_: ModuleType) -> None:
    import narrow

    narrow.slow_steps()


def _without_report(run_folder: ModuleType) -> None:
    run_folder.write_report_within = lambda limit_s, run: "report: left out in tests"


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
    "narrow": ("torchvision.models.resnet", _narrow),
    "slow": ("wasteddp.training.meter", _slow),
    "unreported": ("wasteddp.training.run_folder", _without_report),
}
sys.meta_path.insert(0, _Finder(dict(_CHANGES[name] for name in os.environ["TRAININGS"].split())))  # type: ignore[arg-type]
