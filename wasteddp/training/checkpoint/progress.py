"""The progress of a run: the one small value, next to the tensors, from which it resumes. `progress.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite

from wasteddp.training.checkpoint.compatibility import Lineage, changes_of_order


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a run. `step` alone is the position in the stream of samples: the epoch follows from the plan."""

    lineage: Lineage
    step: int = 0  # optimizer steps done
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    damaged: int = 0  # training samples replaced so far
    covered: list[int] = field(default_factory=list)  # of the epoch, see `coverage_proof.add`; empty: not counted
    attempt: int = 1  # starts of this run, this one included
    tracker_id: str = ""
    scaler: dict[str, float] | None = None  # of fp16's GradScaler
    skipped: int = 0  # diverged steps that were skipped so far
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that the run rolled back because it diverged
    lr_factor: float = 1.0  # of the learning rate, after these rollbacks
    unmeasured: dict[str, float] | None = None  # the step's metrics, if its evaluation was interrupted
    precision: str = ""  # of the run so far
    compiles: bool | None = None  # whether the network was compiled
    micro_batch: int = 0  # size that the run started with if train.max_micro_batch is 0; else 0
    best_in: str = ""  # the measure of `best_value`, see `compatibility.measure_of`
    changed: list[str] = field(
        default_factory=list
    )  # changes of the order within this epoch: its images are not checked

    def stopped_early(self, patience: int) -> bool:
        """Whether `patience` evaluations have passed without an improvement; never for 0."""
        return 0 < patience <= self.evaluations_since_best

    def with_evaluation(self, value: float) -> Progress:
        """Count an evaluation and update the best value. A value that is not finite is never the best."""
        if isfinite(value) and (self.best_value is None or value > self.best_value):
            return replace(self, best_value=value, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)

    @property
    def best_metric(self) -> dict[str, float]:
        """The best value as a row of metrics; empty before the first evaluation."""
        return {} if self.best_value is None else {"best/value": self.best_value}

    @property
    def counts(self) -> dict[str, float]:
        """The counts of events so far, as a row of metrics."""
        return {
            "train/damaged": self.damaged,
            "train/skipped": self.skipped,
            "train/rollbacks": self.rollbacks,
            "attempt": self.attempt,
        }

    def started_again(self, lineage: Lineage, measure: str) -> Progress:
        """Return the progress of the next attempt, with the lineage and the measure of the current settings.

        After a change of the order, the samples of the epoch are counted no further: its first steps followed another
        order. After a change of the measure, the best value starts again.

        Args:
            measure: `compatibility.measure_of` the current settings.
        """
        changed = changes_of_order(self.lineage, lineage)
        again = replace(self, lineage=lineage, attempt=self.attempt + 1, best_in=measure)
        if changed:
            again = replace(again, covered=[], changed=sorted({*self.changed, *changed}))
        if self.best_in != measure:
            again = replace(again, best_value=None, best_step=0, evaluations_since_best=0)
        return again
