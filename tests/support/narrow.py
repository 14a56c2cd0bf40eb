"""ResNets of an eighth of the width, for tests that do not depend on the width: 0.2 million weights instead of 11.

A step of 6 small images takes 30 ms instead of 300, and a checkpoint 2 MB instead of 90. All names, stages and blocks
are those of torchvision's networks. As a program, it runs another program with such a network:

    narrow.py --config ...               wasteddp/train.py, without the report: that takes 2 s of a new process
    narrow.py --report --config ...      the same with it
    narrow.py --slow --config ...        its steps wait, for a test that must catch it in the middle
    narrow.py -m wasteddp.cli predict    another module
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[2] / "wasteddp" / "train.py"
_DIVISOR = 8
_STEP_S = 0.3  # of a slow step


def install() -> Any:
    """Make torchvision build them in this process. Return the original class, for `restore`."""
    from torch import nn
    from torchvision.models import resnet

    class NarrowResNet(resnet.ResNet):
        def __init__(self, block: Any, layers: list[int], num_classes: int = 1000, **how: Any) -> None:
            super().__init__(block, layers, num_classes, **how)
            self.fc = nn.Linear(self.inplanes, num_classes)

        def _make_layer(self, block: Any, planes: int, *rest: Any, **how: Any) -> nn.Sequential:
            return super()._make_layer(block, planes // _DIVISOR, *rest, **how)

    before = resnet.ResNet
    resnet.ResNet = NarrowResNet  # type: ignore[misc]
    return before


def slow_steps() -> None:
    """Make each step of a training in this process wait, which takes no computing."""
    from wasteddp.training.meter import Meter

    real = Meter.step_done

    def step_done(*arguments: Any) -> None:
        time.sleep(_STEP_S)
        real(*arguments)

    Meter.step_done = step_done  # type: ignore[method-assign]


def restore(before: Any) -> None:
    from torchvision.models import resnet

    resnet.ResNet = before  # type: ignore[misc]


if __name__ == "__main__":
    sys.path[0] = str(PROGRAM.parents[1])
    if sys.argv[1:2] == ["-m"]:
        install()
        module = sys.argv[2]
        del sys.argv[1:3]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        from wasteddp.training.watchdog import exits

        exits.install_handlers()  # as the program does: a signal may come while torch is imported
        install()
        if "--slow" in sys.argv:
            sys.argv.remove("--slow")
            slow_steps()
        if "--report" in sys.argv:
            sys.argv.remove("--report")
        else:
            from wasteddp.training import run_folder

            run_folder.write_report_within = lambda limit_s, run: "report: left out in tests"
        runpy.run_path(str(PROGRAM), run_name="__main__")
