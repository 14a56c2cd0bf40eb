"""Trains a ResNet on a shard set: the program, to be read from top to bottom.

    accelerate launch wasteddp/train.py --config configs/resnet50.yaml                              a CPU or one GPU
    accelerate launch --multi_gpu wasteddp/train.py --config configs/resnet50.yaml                  the GPUs of a node
    accelerate launch --config_file launch/accelerate/cpu2.yaml wasteddp/train.py --config ...      two CPU processes
    sbatch slurm/train.sh --config configs/resnet50.yaml                                            a cluster

    --set section.key=value    any setting, as often as wanted
    --resume auto|never|PATH   auto, the default: the newest whole checkpoint of run.out, else from the beginning
    --accept-changes A,B       go on although these differ from the checkpoint's, such as seed or manifest
    --check                    one step, evaluation and checkpoint, in a folder beside run.out that is removed

While it runs, `touch RUN/SAVE_NOW` asks for a checkpoint; the file goes when that is on the disk.

Written to run.out: settings.yaml, environment.json, tracking.json, metrics.jsonl, log.txt, checkpoints/, model/ (the
bundle), evaluations/ (what it was measured at), report.html (all of it as one page), media/ (pictures for W&B).
Exit codes: 0 finished; 2 something to mend, the message says what; 75 stopped by a signal and saved: start it again;
70 a rank failed, hung or vanished and all were stopped: start it again, from the newest checkpoint.
A launcher may turn 75 into 1, so a run that can go on also has the file RESUMABLE in run.out.

"All ranks" marks what every rank must do in the same order; a rank that left it out would let the others wait.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Run as a file, Python looks for modules in this folder first: put the checkout in its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from wasteddp.training.watchdog import signals, slurm

if __name__ == "__main__":
    signals.install()  # before torch is imported: that takes seconds in which a signal would kill

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wasteddp import settings as settings_file
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE, StoppedError
from wasteddp.model import ema
from wasteddp.report.background import reported
from wasteddp.settings import Settings
from wasteddp.training import build_model, coverage_proof, dataloaders, divergence, messages, micro_batch, run_folder
from wasteddp.training.agreement import agreed
from wasteddp.training.checkpoint.compatibility import Lineage
from wasteddp.training.checkpoint.files import Progress, kept_choices
from wasteddp.training.checkpoint.manager import Keeper
from wasteddp.training.distributed import compilation, runtime
from wasteddp.training.divergence import Guard, Retreat
from wasteddp.training.metrics import Meter
from wasteddp.training.optimization import optimizers
from wasteddp.training.recipe import Recipe
from wasteddp.training.schedule import Intervals
from wasteddp.training.step_end import StepEnd
from wasteddp.training.step_hashes import StepRecord
from wasteddp.training.tracking.profiler import Profiler
from wasteddp.training.tracking.tracker import TrackerScope
from wasteddp.training.watchdog.hard_exit import leave
from wasteddp.training.watchdog.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    watch = Watchdog.from_environment()
    try:
        settings = settings_file.load(arguments.config, arguments.set)
        with (
            slurm.mistake_marked(Path(settings.run.out)),
            run_folder.rehearsal(settings) if arguments.check else contextlib.nullcontext(settings) as settings,
            contextlib.ExitStack() as stack,
        ):
            watch.start(settings)
            server = stack.enter_context(dataloaders.started_early(settings))
            kept = kept_choices(Path(settings.run.out), arguments.resume)
            world = runtime.start(settings, watch, kept)  # all ranks
            with contextlib.closing(world), dataloaders.opened(settings, world, server) as data:
                start = arguments.resume, tuple(filter(None, arguments.accept_changes.split(",")))
                steps = 1 if arguments.check else None
                code = divergence.rolling_back(
                    lambda retreat: train(settings, world, data, start, retreat, max_steps=steps), settings, world
                )
                if arguments.check and code == EXIT_FINISHED:  # a signal may have ended it before
                    world.say("checked: one step, one evaluation, one checkpoint; all of it removed again")
                return code
    except StoppedError:  # all ranks, before the first step: behind it, the loop saves
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
    """All ranks: the run, from wherever it stands to its end, or `max_steps` further. Returns the exit code.

    Args:
        start: --resume and --accept-changes.
        retreat: what a divergence before this beginning has changed.
    """
    plan, manifest, out = data.plan, data.manifest, Path(settings.run.out)

    # --- model, optimizer, loss -------------------------------------------------------------------------------------
    world = compilation.settled(settings, world, plan)  # all ranks
    model, origin = build_model.made(settings, world, len(manifest.classes))  # all ranks
    optimizer = optimizers.build(model, settings.optimizer)
    recipe = Recipe(settings, world, data, model)  # all ranks
    ddp, stepper = world.prepare(model, optimizer)  # all ranks
    average = ema.of(settings.train.ema_decay, model, ddp)

    # --- resume: from the checkpoint asked for, else the newest whole one, else the beginning -----------------------
    keeper = Keeper(settings, world, data, model, optimizer, further=average.states)  # all ranks
    progress = Progress(Lineage.of(settings, manifest, teacher=recipe.teacher.sha256))
    if checkpoint := keeper.starting_point(*start, lineage=progress.lineage):  # all ranks
        keeper.state.restore(checkpoint)  # all ranks
        progress = checkpoint.progress.started_again(progress.lineage)
        origin = f"{checkpoint.path}, attempt {progress.attempt}"
    progress = retreat.applied(progress)
    world, progress = micro_batch.settled(settings, world, recipe, model, progress)  # all ranks
    all_steps = plan.steps_per_epoch * settings.train.epochs
    last_step = progress.step + max_steps if max_steps else min(all_steps, settings.train.stop_at_step or all_steps)

    # --- the loop ---------------------------------------------------------------------------------------------------
    tracker = run_folder.begun(settings, world, data, progress, checkpoint, last_step=last_step)  # all ranks
    progress = replace(progress, tracker_id=tracker.id)
    intervals = Intervals.of(settings, plan, last_step)
    guard = Guard(settings, world, model, optimizer, num_classes=len(manifest.classes), progress=progress)
    profiler = Profiler(settings.profile, world, out / "profile", tracker.say)
    record, meter = StepRecord(settings, world, progress.step), Meter(world.device)
    end_step = StepEnd(settings, world, data, average.network, keeper, tracker, meter, last_step)
    with keeper, TrackerScope(tracker), reported(out, tracker.say, is_main=world.is_main), world.watch:
        world.watch.detail = data.at_work
        tracker.say(messages.facts(settings, world, data, last_step, origin + recipe.teacher.words))
        if progress.step == 0:
            tracker.show_augmented(data, recipe.augment)
        progress = end_step.pending(progress)  # all ranks
        stopped_early = progress.stopped_early(settings.train.early_stop_epochs) and not max_steps
        if stopped_early or progress.unmeasured is not None:
            last_step = progress.step
        is_stopped, failure = False, None
        batches = agreed(data.batches(progress.step, last_step, world), world, seed=plan.seed, asks=keeper.asks)
        for batch, agree in meter.waiting(world.watch.steps(profiler.watched(batches), progress.step)):
            agreement = agree()  # all ranks
            if agreement.stops:
                if meter.num_steps:
                    progress = guard.judge(progress, meter.read(world, settings.train.batch_size), saves=True)
                keeper.save(progress, epoch=batch.epoch, best=None)
                is_stopped, failure = True, batch.failure
                break
            if agreement.damaged:
                progress = replace(progress, damaged=progress.damaged + agreement.damaged)
                messages.report_damage(world, tracker.say, batch.damage, progress.damaged, settings.data.max_damaged)
            due = intervals.due(progress.step + 1, is_asked=agreement.saves or keeper.notice.wants_a_save())

            # update: all ranks
            guard.begin_step()
            rate = recipe.begin_step(optimizer, progress)
            for number, micro in enumerate(world.micro_batches(batch, ddp)):
                with meter.forward():
                    images_BCHW, targets = recipe.inputs(micro, batch.epoch)
                    loss = recipe.loss(ddp(images_BCHW), targets)
                if number == 0:
                    stepper.zero_grad()  # here, not behind the step: a sixth of a CPU's speed (docs/notes.md)
                world.accelerator.backward(loss)
                meter.add(loss)
            norm = recipe.clip(is_asked=due.logs or guard.skips)
            skipped = guard.step(stepper, meter.step_loss, norm)
            average.update(progress.step, skipped)
            covered = coverage_proof.added(progress.covered, agreement.sums, batch)
            progress = replace(progress, step=progress.step + 1, covered=covered)
            meter.step_done(skipped)
            profiler.step_done()  # all ranks
            record.add(progress.step, batch, model)  # all ranks

            # measure: all ranks
            row: dict[str, float] = {}
            if batch.step_in_epoch + 1 == plan.steps_per_epoch:
                row |= coverage_proof.prove(progress, plan, batch.epoch, world, tracker)
            if due.logs:
                row |= meter.read(world, settings.train.batch_size)
                row |= {"epoch": progress.step / plan.steps_per_epoch, "lr": rate, "train/grad_norm": float(norm or 0)}
                progress = guard.judge(progress, row, saves=due.saves)
            if due.evaluates:
                keeper.state.reconcile()  # before `end_step`: a step that is saved unmeasured has it behind it
            progress = end_step(progress, row, due)  # evaluates, reports, keeps
            if progress.unmeasured is not None:
                break
            if due.evaluates and progress.stopped_early(settings.train.early_stop_epochs):
                tracker.say(messages.early_stop(settings, progress))
                break
        keeper.close()  # all ranks
        exit_code = EXIT_FINISHED
        if is_stopped or progress.unmeasured is not None:
            exit_code = tracker.exit_code = EXIT_RESUMABLE
            world.raise_together(failure)  # all ranks: what one of them could not read, now that all is saved
            if world.is_main:
                run_folder.mark_resumable(out)
        tracker.say(messages.closing(settings, progress, exit_code, signals.STOP.signal_name, splits=manifest.splits))
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wasteddp/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH")
    parser.add_argument("--accept-changes", default="", metavar="NAME,...")
    parser.add_argument("--check", action="store_true")
    return parser


if __name__ == "__main__":
    leave(main())
