"""The one table of metrics: what a run writes, charts and dashboards show. No torch."""

from __future__ import annotations

from fnmatch import fnmatchcase

# Every metric that a run writes: (unit, meaning). Nothing else may be logged. A * stands for a rank or a class.
METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "epochs done, with the fraction of the present one"),
    "lr": ("1", "learning rate of the step"),
    "train/loss": ("nats", "mean over the global batches since the last row"),
    "train/grad_norm": ("1", "norm of the gradient before clipping, at the step"),
    "train/images_per_s": ("images/s", "of all ranks, since the last row"),
    "train/step_ms": ("ms", "mean time of a step since the last row, whatever it waited for"),
    "train/step_ms_p50": ("ms", "median of the steps since the last row, of all ranks"),
    "train/step_ms_p95": ("ms", "95th percentile of the steps since the last row, of the slowest rank"),
    "train/wait_fraction": (
        "1",
        "part of the time spent waiting for data, not for the GIL or a core; mean of the ranks",
    ),
    "train/wait_fraction_max": ("1", "the same of the rank that waited most"),
    "train/starved_fraction": (
        "1",
        "part of the forward passes' time in which the loop's thread was not on a core: others held the GIL or the "
        "cores (or it waited for a compiler, SyncBatchNorm's messages, or the other threads of an operation on a CPU); "
        "nothing of the rest of a step; of the rank that starved most",
    ),
    "train/damaged": ("samples", "training samples replaced since the run began"),
    "coverage/samples": ("samples", "trained on in the epoch that ended, by all ranks"),
    "coverage/expected": ("samples", "of that epoch, by the manifest and the plan"),
    "coverage/replaced": ("samples", "of these: damaged, another stood in"),
    "coverage/ok": ("1", "1: each sample exactly as often as planned, by count and hash; 0: the run stops"),
    "val/loss": ("nats", "mean cross-entropy over the split, without smoothing or weights"),
    "val/accuracy": ("1", "part of the split that is right"),
    "val/macro_recall": ("1", "mean of the classes' recalls"),
    "val/macro_f1": ("1", "mean of the classes' F1"),
    "val/recall/*": ("1", "recall of one class"),
    "val/samples": ("samples", "counted, equal to the manifest's"),
    "val/seconds": ("s", "time of the evaluation"),
    "best/value": ("1", "best value of evaluate.metric so far"),
    "checkpoint/stall_ms": ("ms", "time that the loop waited to hand over the last checkpoint"),
    "checkpoint/seconds": ("s", "that the last checkpoint took in the background, from being handed over to the disk"),
    "rank/*/images_per_s": ("images/s", "that one rank trained on while it did not wait for data, since the last row"),
    "rank/*/wait_fraction": ("1", "part of the time that one rank waited for data"),
    "memory/peak_mb": ("MB", "most that a process held since its start, of all ranks: on the GPU, else of main memory"),
    "checkpoint/failed": ("saves", "that could not be written since this start, for want of space or permission"),
    "train/skipped": ("steps", "steps skipped because they diverged, since the run began"),
    "train/rollbacks": ("times", "times that the run went back because it diverged"),
    "attempt": ("starts", "starts of this run, this one included"),
}


def is_known(name: str) -> bool:
    """Whether METRICS has it."""
    return name in METRICS or any("*" in known and fnmatchcase(name, known) for known in METRICS)
