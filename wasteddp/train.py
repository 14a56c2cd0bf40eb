"""Train a classifier on a shard set.

    wasteddp train --config configs/resnet50.yaml                                    the GPUs of a machine, or its CPU
    accelerate launch wasteddp/train.py --config configs/resnet50.yaml               a CPU or one GPU
    accelerate launch --multi_gpu wasteddp/train.py --config configs/resnet50.yaml   the GPUs of a machine
    sbatch slurm/train.sh --config configs/resnet50.yaml                             a cluster

    --set section.key=value    override a setting; may be repeated
    --resume auto|never|PATH   auto (default): the newest intact checkpoint in run.out, or step 0 if there is none
    --accept-changes A,B       resume although these differ from the checkpoint, such as seed or manifest
    --check                    run one step, one evaluation and one checkpoint in a temporary folder next to run.out

`touch RUN/SAVE_NOW` requests a checkpoint during a run; the file is removed once the checkpoint is on disk.

Files in run.out: settings.yaml, environment.json, tracking.json, metrics.jsonl, log.txt, checkpoints/, model/ (the
bundle), evaluations/ (the best model's evaluation), report.html (a summary page), media/ (images for W&B), failures/
(stack traces of a process that hung), profile/ (with profile.steps).

Exit codes: 0 finished; 2 an error that the user can fix, see the message; 75 stopped by a signal after saving, run the
same command again; 70 a rank failed, hung or vanished and all ranks were stopped, run the same command again to resume
from the newest checkpoint. A launcher may replace 75 by 1, so a resumable run also has the file RESUMABLE in run.out.

A comment or docstring "all ranks" marks a collective: every rank must make these calls in the same order.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Python puts the folder of a script first on the module path: replace it by the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from wasteddp.training.distributed import launcher
from wasteddp.training.watchdog import exits

if __name__ == "__main__":
    exits.install_handlers()  # before the import of torch, which takes seconds: a signal would kill the process
    launcher.parser(__doc__).parse_args()  # also before torch: a wrong argument is reported at once

import contextlib
from collections.abc import Sequence

from wasteddp import environment
from wasteddp import settings as settings_file
from wasteddp.errors import EXIT_FINISHED, StoppedError
from wasteddp.training import build_model, dataloaders, divergence, run_folder, session
from wasteddp.training.checkpoint.reader import kept_choices
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    environment.prepare()
    arguments = launcher.parser(__doc__).parse_args(argv)
    watch = Watchdog.from_environment()
    try:
        settings = settings_file.load(arguments.config, arguments.set)
        with (
            slurm.mistake_marked(Path(settings.run.out)),
            run_folder.rehearse(settings) if arguments.check else contextlib.nullcontext(settings) as settings,
            contextlib.ExitStack() as stack,
        ):
            watch.start(settings)
            server = stack.enter_context(dataloaders.start_early(settings.data))
            kept = kept_choices(Path(settings.run.out), arguments.resume)
            runtime = startup.start_runtime(settings, watch, kept)  # all ranks
            with contextlib.closing(runtime), dataloaders.open_inputs(settings, runtime, server) as data:
                start = session.Start(arguments.resume, tuple(filter(None, arguments.accept_changes.split(","))))
                steps = 1 if arguments.check else None
                code = divergence.train_with_rollbacks(
                    lambda rollback: train(settings, runtime, data, start, rollback, max_steps=steps),
                    Path(settings.run.out),
                    settings.train,
                    runtime,
                )
                if arguments.check and code == EXIT_FINISHED:  # not after a signal
                    runtime.say(
                        "checked: one step, one evaluation and one checkpoint succeeded; their files are removed"
                    )
                return code
    except StoppedError:  # all ranks, before the first step; later the loop handles a stop
        return run_folder.stopped_before_it_began(Path(settings.run.out), is_check=arguments.check)
    except Exception as error:
        return watch.failed(error)
    finally:
        watch.close()


def train(
    settings: settings_file.Settings,
    runtime: Runtime,
    data: dataloaders.Inputs,
    start: session.Start,
    rollback: divergence.Rollback,
    *,
    max_steps: int | None = None,
) -> int:
    """Train from the current step to the last one, or for `max_steps`, and return the exit code. All ranks.

    Args:
        rollback: the number of rollbacks in this process and the learning-rate factor that they led to.
    """
    built = build_model.build(settings, runtime, data)  # all ranks
    run, progress = session.begin(settings, built, data, start, rollback, max_steps=max_steps)  # all ranks
    ddp, objective, optimizer = built.ddp, built.objective, built.optimizer
    with (
        run,
        run_folder.report_at_the_end(Path(settings.run.out), run.tracker.say, is_main=run.writes_report),
        runtime.watch,
    ):
        progress = run.open(progress)  # all ranks
        for batch, agreement in run.batches(progress):  # all ranks
            if agreement.stops:
                progress = run.stop(progress, batch)  # all ranks
                break
            progress, due = run.before_step(progress, batch, agreement)  # all ranks
            lr = optimizer.begin_step(progress)
            for number, micro in enumerate(run.micro_batches(batch)):
                with run.meter.forward():
                    images_BCHW, targets = objective.inputs(micro, batch.epoch)
                    loss = objective.loss(ddp(images_BCHW), targets)
                if number == 0:
                    optimizer.zero_grad()  # here instead of after the step: a sixth faster on a CPU (docs/notes.md)
                run.backward(loss)  # all ranks
            update = run.step(optimizer, due)  # all ranks; skips a diverged step, if train.on_divergence is skip
            progress = run.after_step(progress, batch, agreement, due, lr, update)  # all ranks
            if run.ends(progress, due):
                break
        return run.finish(progress)  # all ranks


if __name__ == "__main__":
    exits.leave(main())
