"""`wasteddp lr-find`: suggest a learning rate, by a range test on the code of a training.

The rate grows by the same factor from step to step while the network of the configuration trains on its own order of
samples, in one process, from its own initial weights. At first the loss changes little, then it falls, then it
explodes.

The suggestion is a tenth of the rate at the lowest loss. That rate itself is too high for more than a few steps, since
the loss explodes next. The lowest loss is easy to locate; the steepest descent, which is reported too, depends on
single batches. Losses are smoothed by a moving average without an initial bias, which lags by a twentieth of the test.

Only the rate differs from the settings: loss, augmentation, clipping, order and sizes are those of a run.

Sources: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3, for the range test, there with
a rate that grows linearly. The growth by a factor, the smoothing, the stop at four times the best loss and the tenth of
the minimum are fast.ai's (Howard 2018; Gugger 2018, "How Do You Find A Good Learning Rate").
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from wasteddp import environment
from wasteddp.errors import LaunchError, SettingsError, storage
from wasteddp.files import make_folder, write_atomically
from wasteddp.parallel import progress as progress_bar
from wasteddp.settings import Settings
from wasteddp.training import dataloaders, messages, micro_batch, optimizers
from wasteddp.training.build_model import build
from wasteddp.training.checkpoint.progress import Lineage, Progress
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.runtime import Runtime

_EXPLODED = 4.0  # times the best smoothed loss
_LAG = 1 / 20  # lag of the smoothed loss, as a part of the test
_CLEAR = 2.0  # a significant fall, in standard deviations of a step's loss from the smoothed loss
_FEWEST_STEPS = 10
_TABLE_ROWS = 12

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The range of a test: `steps` rates from `lowest` to `highest`."""

    steps: int = 100
    lowest: float = 1e-6
    highest: float = 10.0

    def rates(self) -> list[float]:
        """Return the rates.

        Raises:
            SettingsError: the values are not a range, or there are too few steps.
        """
        if not 0 < self.lowest < self.highest < float("inf") or self.steps < _FEWEST_STEPS:
            raise SettingsError(
                f"--from {self.lowest:g} --to {self.highest:g} --steps {self.steps}",
                "the test would not give a curve",
                f"give two positive rates, the smaller first, and at least {_FEWEST_STEPS} steps",
            )
        factor = self.highest / self.lowest
        return [self.lowest * factor ** (step / (self.steps - 1)) for step in range(self.steps)]


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a test. A rate is None if the curve does not show it."""

    suggested: float | None
    why: str
    lowest_loss_at: float
    steepest_at: float | None
    stopped: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]


def smoothed(losses: Sequence[float], lag_steps: float) -> list[float]:
    """Return the exponential moving average after each loss, b = lag / (1 + lag), divided by 1 - b^n.

    Source: Kingma and Ba 2015 (Adam), section 3, for the division: without it the average starts at zero.
    """
    decay, average, out = lag_steps / (1 + lag_steps), 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = decay * average + (1 - decay) * loss
        out.append(average / (1 - decay**number))
    return out


def has_exploded(smooth: Sequence[float]) -> bool:
    return not isfinite(smooth[-1]) or smooth[-1] > _EXPLODED * min(smooth)


def judged(rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], stopped: str) -> Found:
    """Return the suggestion of a curve. `stopped`: why the test ended before its last rate; '' if it did not."""
    at = int(np.argmin(smooth))
    lowest, steepest = rates[at], None
    if at:
        slopes = np.gradient(np.array(smooth[: at + 1]), np.log10(rates[: at + 1]))
        steepest = rates[int(np.argmin(slopes))]
    if steepest is None:
        suggested, why = None, "none: the loss never fell; start lower with --from, or give more --steps"
    elif at == len(smooth) - 1:
        suggested, why = (
            steepest,
            "the steepest descent: the loss still fell at the last rate; extend the test with --to",
        )
    else:
        suggested, why = lowest / 10, f"a tenth of {lowest:.2g}, where the loss is lowest; above it, the loss rises"
    fall, scatter = max(smooth[: at + 1]) - smooth[at], float(np.std(np.subtract(losses, smooth)[: at + 1]))
    if suggested and fall < _CLEAR * scatter:
        why += (
            f". Not reliable: the smoothed loss fell by {fall:.2g}, and the loss of single steps varies by "
            f"{scatter:.2g}; use a larger train.batch_size or more --steps"
        )
    return Found(suggested, why, lowest, steepest, stopped, tuple(rates), tuple(losses), tuple(smooth))


def run(settings: Settings, options: Options, out: Path | None, say: Say) -> Found:
    """Run the test, print its table, and write lr-find.json and lr-find.png.

    Args:
        out: folder of the files; by default run.out with the suffix .lr-find. run.out itself is unchanged.

    Raises:
        LaunchError: there are several processes.
        WastedError: any error of a training at its start.
    """
    if (num := environment.launched("WORLD_SIZE", 1)) > 1:
        raise LaunchError(
            f"lr-find was started as {num} processes",
            "each would run the same test and write the same files",
            "start it without a launcher: the global batch is that of the settings at any number of processes",
        )
    rates, folder = options.rates(), out or Path(f"{settings.run.out.rstrip('/')}.lr-find")
    with closing(startup.start_runtime(settings)) as runtime, dataloaders.open_inputs(settings, runtime) as data:
        found = _measured(settings, runtime, data, rates, say)
        record = asdict(found) | {
            "settings": settings.model_dump(mode="json"),
            "manifest": data.manifest.sha256,
            "precision": runtime.precision,
            "device": runtime.device.type,
            "micro_batch": runtime.micro_batch,
            "code": environment.commit(),
        }
    with storage("creating the folder", folder):
        make_folder(folder)
    write_atomically(folder / "lr-find.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(folder / "lr-find.png", _picture(found))
    say("\n".join([*_table(found), f"written: {folder}/lr-find.json, {folder}/lr-find.png"]))
    return found


def _measured(
    settings: Settings, runtime: Runtime, data: dataloaders.Inputs, rates: Sequence[float], say: Say
) -> Found:
    """Train with one rate after the other until the loss explodes. Waits for each loss, unlike a training."""
    built = build(settings, runtime, data)
    ddp, objective, optimizer = built.ddp, built.objective, built.optimizer
    progress = Progress(Lineage.of(settings, data.manifest))
    runtime, progress = micro_batch.choose_size(settings, built.runtime, objective, built.model, progress)
    say(messages.facts(settings, runtime, data, len(rates), built.origin))
    losses: list[float] = []
    smooth: list[float] = []
    stopped = ""
    batches = data.batches(0, len(rates), runtime)
    with progress_bar("range test", len(rates)) as advance:
        for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            runtime.raise_together(batch.failure)
            progress = replace(progress, step=step, damaged=progress.damaged + len(batch.damage))
            if batch.damage:
                messages.report_damage(runtime, say, batch.damage, progress.damaged, settings.data.max_damaged)
            optimizer.begin_step(progress)
            optimizers.set_learning_rate(optimizer.unwrapped, rate)
            total = torch.zeros((), device=runtime.device)
            for micro in runtime.micro_batches(batch, ddp):
                images_BCHW, targets = objective.inputs(micro, batch.epoch)
                loss = objective.loss(ddp(images_BCHW), targets)
                runtime.accelerator.backward(loss)
                total += loss.detach()
            optimizer.clip(is_asked=False)
            optimizer.step()
            optimizer.zero_grad()
            if not isfinite(found := float(total)):
                stopped = f"step {step + 1} of {len(rates)}, with the rate {rate:.2g}: the loss is {found}"
                break
            losses.append(found)
            smooth = smoothed(losses, _LAG * len(rates))
            advance()
            if has_exploded(smooth):
                stopped = f"step {step + 1} of {len(rates)}: {_EXPLODED:g} times the best smoothed loss"
                break
    if not losses:
        raise SettingsError(
            f"the loss of the first step is not a finite number, with the rate {rates[0]:g}",
            "the test gives no curve",
            "check the images with --check, or set precision to fp32",
        )
    return judged(rates[: len(losses)], losses, smooth, stopped)


def _table(found: Found) -> list[str]:
    every = max(1, -(-len(found.rates) // _TABLE_ROWS))
    rows = list(zip(found.rates, found.losses, found.smoothed, strict=True))
    lines = [f"{rate:8.1e}  {loss:8.4f}  {smooth:8.4f}" for rate, loss, smooth in (*rows[:-1:every], rows[-1])]
    steepest = "nowhere" if found.steepest_at is None else f"at {found.steepest_at:.2g}"
    return [
        "    rate      loss  smoothed",
        *lines,
        f"stopped at {found.stopped}" if found.stopped else "reached the last rate",
        f"lowest smoothed loss at {found.lowest_loss_at:.2g}, steepest descent {steepest}",
        *([f"suggested: optimizer.lr={found.suggested:.2g}"] if found.suggested else []),
        f"  why: {found.why}",
    ]


def _picture(found: Found) -> bytes:
    from matplotlib.figure import Figure  # takes 0.3 s

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1, label="loss of a step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", label="smoothed")
    marks = (("suggested", found.suggested, "tab:green"), ("steepest descent", found.steepest_at, "tab:orange"))
    for name, rate, colour in (*marks, ("lowest loss", found.lowest_loss_at, "tab:red")):
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle="--", linewidth=1, label=f"{name}: {rate:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    # the exploding loss would compress the rest of the curve
    top = 1.3 * max(found.smoothed[: found.smoothed.index(min(found.smoothed)) + 1])
    axes.set_ylim(bottom=min(found.losses) - 0.05 * (top - min(found.losses)), top=top)
    axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
