"""Trains a ResNet on a shard set: the program, to be read from top to bottom.

    wasteddp train --config configs/resnet50.yaml                                    the GPUs of a machine, or its CPU
    accelerate launch wasteddp/train.py --config configs/resnet50.yaml               a CPU or one GPU
    accelerate launch --multi_gpu wasteddp/train.py --config configs/resnet50.yaml   the GPUs of a machine
    sbatch slurm/train.sh --config configs/resnet50.yaml                             a cluster

    --set section.key=value    any setting, as often as wanted
    --resume auto|never|PATH   auto, the default: the newest whole checkpoint of run.out, else from the beginning
    --accept-changes A,B       go on although these differ from the checkpoint's, such as seed or manifest
    --check                    one step, evaluation and checkpoint, in a folder beside run.out that is removed

While it runs, `touch RUN/SAVE_NOW` asks for a checkpoint; the file goes when that is on the disk.

Written to run.out: settings.yaml, environment.json, tracking.json, metrics.jsonl, log.txt, checkpoints/, model/ (the
bundle), evaluations/ (what it was measured at), report.html (all of it as one page), media/ (pictures for W&B),
failures/ (stacks of a process that hung), profile/ (if asked for).
Exit codes: 0 finished; 2 something to fix, the message says what; 75 stopped by a signal and saved: start it again;
70 a rank failed, hung or vanished and all were stopped: start it again, from the newest checkpoint.
A launcher may turn 75 into 1, so a run that can go on also has the file RESUMABLE in run.out.

"All ranks" marks what every rank must do in the same order; a rank that left it out would leave the others waiting.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Run as a file, Python looks for modules in this folder first: put the checkout in its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from wasteddp.training import arguments as command_line
from wasteddp.training.watchdog import signals

if __name__ == "__main__":
    signals.install()  # before torch is imported: that takes seconds in which a signal would kill
    command_line.parser(__doc__).parse_args()  # as well: a wrong argument is reported at once

import contextlib
from collections.abc import Sequence

from wasteddp import settings as settings_file
from wasteddp.errors import EXIT_FINISHED, StoppedError
from wasteddp.report.background import write_at_the_end
from wasteddp.settings import Settings
from wasteddp.training import dataloaders, divergence, run_folder, session
from wasteddp.training.build_model import build
from wasteddp.training.checkpoint.reader import kept_choices
from wasteddp.training.distributed import runtime
from wasteddp.training.divergence import Retreat
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.hard_exit import leave
from wasteddp.training.watchdog.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command_line.parser(__doc__).parse_args(argv)
    watch = Watchdog.from_environment()
    try:
        settings = settings_file.load(arguments.config, arguments.set)
        with (
            slurm.mistake_marked(Path(settings.run.out)),
            run_folder.rehearse(settings) if arguments.check else contextlib.nullcontext(settings) as settings,
            contextlib.ExitStack() as stack,
        ):
            watch.start(settings)
            server = stack.enter_context(dataloaders.start_early(settings))
            kept = kept_choices(Path(settings.run.out), arguments.resume)
            world = runtime.start(settings, watch, kept)  # all ranks
            with contextlib.closing(world), dataloaders.open_inputs(settings, world, server) as data:
                start = arguments.resume, tuple(filter(None, arguments.accept_changes.split(",")))
                steps = 1 if arguments.check else None
                code = divergence.rolling_back(
                    lambda retreat: train(settings, world, data, start, retreat, max_steps=steps), settings, world
                )
                if arguments.check and code == EXIT_FINISHED:  # a signal may have ended it before
                    world.say("checked: one step, one evaluation, one checkpoint; all of it removed again")
                return code
    except StoppedError:  # all ranks, before the first step: after it, the loop saves
        return run_folder.stopped_before_it_began(settings, is_check=arguments.check)
    except Exception as error:
        return watch.failed(error)
    finally:
        watch.close()


def train(
    settings: Settings,
    world: runtime.Runtime,
    data: dataloaders.Inputs,
    start: tuple[str, Sequence[str]],
    retreat: Retreat,
    *,
    max_steps: int | None = None,
) -> int:
    """All ranks: the run, from where it stands to its end, or `max_steps` further. Returns the exit code.

    Args:
        start: --resume and --accept-changes.
        retreat: the learning rate's factor and the number of retreats, after a divergence in this process.
    """
    built = build(settings, world, data)  # all ranks
    run, progress = session.begin(settings, built, data, start, retreat, max_steps=max_steps)  # all ranks
    world, ddp, stepper, recipe, meter = run.world, built.ddp, built.stepper, built.recipe, run.meter
    writes_report = world.is_main and run.is_recorded
    with run, write_at_the_end(Path(settings.run.out), run.tracker.say, is_main=writes_report), world.watch:
        progress = run.open(progress)  # all ranks
        for batch, agreement in run.batches(progress):  # all ranks
            if agreement.stops:
                progress = run.stop(progress, batch)  # all ranks
                break
            progress, due = run.before_step(progress, batch, agreement)  # all ranks
            lr = recipe.begin_step(built.optimizer, progress)
            for number, micro in enumerate(world.micro_batches(batch, ddp)):
                with meter.forward():
                    images_BCHW, targets = recipe.inputs(micro, batch.epoch)
                    loss = recipe.loss(ddp(images_BCHW), targets)
                if number == 0:
                    stepper.zero_grad()  # here rather than after the step: a sixth faster on a CPU (docs/notes.md)
                world.accelerator.backward(loss)  # all ranks
                meter.add(loss)
            norm = recipe.clip(is_asked=due.logs or run.guard.skips)  # all ranks
            skipped = run.guard.step(stepper, meter.step_loss, norm)  # all ranks
            progress = run.after_step(progress, batch, agreement, due, lr=lr, norm=norm, skipped=skipped)  # all ranks
            if run.ends(progress, due):
                break
        return run.finish(progress)  # all ranks


if __name__ == "__main__":
    leave(main())
