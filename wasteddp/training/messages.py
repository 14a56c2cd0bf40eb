"""The messages of a run: the facts at its start, a line for each row of metrics, damaged samples, and the end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence

from wasteddp import environment
from wasteddp.data.batch import Damage
from wasteddp.data.manifest import Split
from wasteddp.errors import EXIT_RESUMABLE, DamagedSampleError, StorageError, joined
from wasteddp.order import plan_quality
from wasteddp.parallel import duration
from wasteddp.settings import Settings
from wasteddp.training import schedule
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime

_MOST_NAMED = 10
_STARVED = 0.2  # of the forward pass: reported from here on


def facts(settings: Settings, runtime: Runtime, data: Inputs, last_step: int, origin: str) -> str:
    """Describe the run in one line, which can be found in a log with grep."""
    manifest, plan = data.manifest, data.plan
    full_px, epochs = settings.data.image_size, settings.train.epochs
    sizes = schedule.describe_sizes(settings.schedule, full_px=full_px, epochs=epochs)
    val = manifest.splits[settings.data.eval_split]
    order = [plan_quality.describe(plan, data.train_labels)] if plan.block > 1 and runtime.is_main else []
    if plan.balance:
        order.append(plan.balance.describe(manifest.classes))
    size_px = settings.data.eval_size_px
    evaluated_at = f", evaluated at {size_px} px" if size_px != settings.data.image_size else ""
    parts = [
        f"wasteddp {environment.commit()}: {settings.model.arch} from {origin}",
        f"{runtime.world_size} x {runtime.device_name}, {runtime.threads} threads each",
        f"{runtime.precision} ({runtime.precision_reason})" + (", deterministic" if settings.run.deterministic else ""),
        f"{'compiled' if runtime.compiles else 'not compiled'} ({runtime.compile_reason})",
        f"global batch {settings.train.batch_size} = {runtime.world_size} processes x {runtime.micro_batch} images "
        f"x {runtime.accumulation} accumulated"
        + (f" ({runtime.micro_batch_reason})" if runtime.micro_batch_reason else ""),
        f"{last_step} steps, {plan.steps_per_epoch} per epoch"
        + ("" if plan.balance else f", each epoch leaves out {plan.left_out_per_epoch} different images"),
        f"{manifest.name}: {plan.num_samples} training and {val.num_samples} {val.name} images of "
        f"{len(manifest.classes)} classes, {sizes}{evaluated_at}",
        f"seed {settings.run.seed}",
    ]
    return "\n".join(["; ".join(parts), *order, *without_images(manifest.classes, val)])


def without_images(classes: Sequence[str], split: Split) -> list[str]:
    """Return a line if the macro figures of the evaluations are not those of all classes."""
    absent = [name for name, count in zip(classes, split.samples_per_class, strict=True) if not count]
    averaged = f"{len(classes) - len(absent)} of {len(classes)} classes"
    return [f"{split.name} has no images of {joined(absent)}: macro figures are of {averaged}"] * bool(absent)


def progress_line(step: int, last_step: int, row: Mapping[str, float], better: bool) -> str:
    """Return one row of metrics as a line, for the log and for output that is not a terminal."""
    parts = [f"step {step}/{last_step}"]
    if "train/step_ms" in row:
        parts.append(
            f"epoch {row['epoch']:.2f}  loss {_loss(row)}  lr {row['lr']:.3g}  "
            f"{row['train/images_per_s']:.1f} images/s  waiting for data {row['train/wait_fraction']:.1%}"
        )
        if row.get("train/starved_fraction", 0.0) >= _STARVED:
            parts.append(f"waiting for a core or the GIL {row['train/starved_fraction']:.0%} of the forward pass")
        if "memory/peak_mb" in row:
            parts.append(f"{row['memory/peak_mb']:.0f} MB")
        if step < last_step:
            parts.append(f"{duration(round(row['train/step_ms'] / 1000 * (last_step - step)))} left")
    if "val/loss" in row:
        parts.append(
            f"val: loss {row['val/loss']:.4f}  accuracy {row['val/accuracy']:.2%}  macro recall "
            f"{row['val/macro_recall']:.2%}  ({row['val/samples']:.0f} images, {row['val/seconds']:.1f} s)"
            + ("  best so far" if better else "")
        )
    if "coverage/ok" in row:
        parts.append(f"epoch checked: {row['coverage/samples']:.0f} images, each trained on as often as planned")
    return "  ".join(parts)


def _loss(row: Mapping[str, float]) -> str:
    return f"{row['train/loss']:.4f}" if "train/loss" in row else "none (all steps were skipped)"


def report_damage(
    runtime: Runtime, say: Callable[[str], None], damage: tuple[Damage, ...], total: int, limit: int
) -> None:
    """Report the samples that were replaced in this step. All ranks.

    Raises:
        DamagedSampleError: more samples than the limit were replaced since the run started.
    """
    found = [item for part in runtime.gather(damage) for item in part]
    names = [f"{item.where} ({item.reason}), replaced by sample {item.replaced_by}" for item in found[:_MOST_NAMED]]
    if total > limit:
        raise DamagedSampleError(
            f"{total} training samples could not be used, data.max_damaged is {limit}: {'; '.join(names)}",
            "the model would be trained on other images than those of the manifest",
            "find all damaged samples with `wasteddp verify`, then copy or create the shard set again; "
            "to continue without these samples, raise data.max_damaged",
        )
    for name in names:
        say(f"damaged: {name}")


def not_saved(error: StorageError) -> str:
    """Return the warning about a checkpoint or model that could not be written."""
    return (
        f"WARNING: not saved: {error.found}\n"
        "  so: if the run is killed now, the steps since the last complete checkpoint are lost\n"
        f"  do: {error.remedy}; training continues, and the next save tries again"
    )


def best_starts_again(before: Progress, now: Progress) -> list[str]:
    """Return a line if the best value of a checkpoint was measured on something else than this start measures."""
    if before.best_value is None or before.best_in == now.best_in:
        return []
    return [
        f"the best model starts again: it had {before.best_value:.2%} in {before.best_in}; this start measures "
        f"{now.best_in}, and the two cannot be compared"
    ]


def early_stop(metric: str, progress: Progress) -> str:
    return (
        f"stopped early: {progress.evaluations_since_best} evaluations without a better {metric} "
        f"than {progress.best_value or 0:.2%} (train.early_stop_epochs)"
    )


def stopped_before_it_began(signal_name: str) -> str:
    return (
        f"stopped by {signal_name or 'a signal to another process'} before the shard set answered; run the same "
        f"command again to resume (exit code {EXIT_RESUMABLE})"
    )


def closing(
    out: str,
    progress: Progress,
    exit_code: int,
    signal_name: str,
    *,
    metric: str,
    eval_split: str,
    splits: Collection[str],
) -> str:
    """Return how the run ended and what to do next, as commands to copy.

    Args:
        out: folder of the run.
        metric, eval_split: of the evaluations in the run.
        splits: of the shard set.
    """
    if exit_code == EXIT_RESUMABLE:
        return (
            f"stopped by {signal_name or 'a signal to another process'} at step {progress.step} and saved; run the "
            f"same command again to resume (exit code {EXIT_RESUMABLE})"
        )
    best = "none" if progress.best_value is None else f"{progress.best_value:.2%} at step {progress.best_step}"
    run, split = shlex.quote(out), "test" if "test" in splits else eval_split
    return "\n".join(
        [
            f"finished at step {progress.step}: best {metric} {best}; the model is in {out}/model",
            f"  evaluate:  wasteddp evaluate {run} --split {split}",
            f"  predict:   wasteddp predict {run} IMAGES...",
            f"  compare:   wasteddp report {run} OTHER_RUN",
        ]
    )
