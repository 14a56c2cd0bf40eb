"""How far the order of block mode is from a uniform permutation, estimated from the plan; settings that improve it.

Legend: N samples, G global batch, C kinds of samples, n samples in one batch or in several consecutive ones.

Reading in blocks is harmless if neighbours in the shards have nothing in common, and harmful if they belong to one
class. The measure is the design effect of cluster sampling: the variance of a batch's composition, divided by that of a
uniform sample of the same size. With n_c of n samples of kind c, and the fraction p_c in the whole set,

    effect = E[ sum_c (n_c / n - p_c)^2 ]  /  ( 1/n * (N - n) / (N - 1) * (1 - sum_c p_c^2) )

where the denominator follows from the multivariate hypergeometric distribution. The share of a batch is 1 / effect, at
most 1: a batch of 256 with a share of 0.25 represents the set as well as 64 samples drawn uniformly. `recent` is the
share of ten consecutive batches, since momentum 0.9 averages over 1 / (1 - 0.9) steps: batches that are each a good
mixture, but are all similar, carry ten times less information than their number suggests.

Kinds are the classes, if the labels are known. Otherwise the worst case is assumed: the samples are cut into 64 equal
stretches, each of one kind, as in a set sorted by class.

Source: Kish, Survey Sampling (1965), chapter 5, for the design effect; the denominator is the variance of the
multivariate hypergeometric distribution, summed over its components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import TrainPlan

Labels = npt.NDArray[np.integer]

GOOD_SHARE = 0.5
_STRETCHES = 64
_RECENT_STEPS = 10
_EPOCHS = 4  # epochs that are sampled
_SAMPLES = 500_000  # approximate number of samples examined; at least four groups are
_ADVICE_GROUPS = 24


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares in (0, 1]; 1 is as good as a uniform order. Estimated from 64 batches, their error is about a tenth."""

    batch: float
    recent: float

    @property
    def is_good(self) -> bool:
        return min(self.batch, self.recent) >= GOOD_SHARE


def measure(plan: TrainPlan, labels: Labels | None = None, *, most_groups: int = 64) -> Quality:
    """Estimate the quality of a plan from some steps of some epochs.

    Args:
        plan: to examine.
        labels: of each sample, [N]; None assumes the worst case.
        most_groups: largest number of groups of consecutive batches to examine; large batches reduce it.
    """
    # at most a quarter of an epoch: ten steps of eleven always represent the epoch well
    recent = min(_RECENT_STEPS, max(1, plan.steps_per_epoch // 4))
    groups = max(4, min(most_groups, _SAMPLES // (recent * plan.global_batch)))
    fractions = _fractions(plan, labels)
    batch_errors, recent_errors = [], []
    for group in range(groups):
        first = group * (plan.steps_per_epoch - recent) // max(groups - 1, 1)
        samples = plan.steps_samples(group % _EPOCHS, range(first, first + recent))
        counts = np.stack(
            [np.bincount(_kinds(plan, labels, one), minlength=len(fractions)) for one in samples]
        )  # [steps, C]
        batch_errors += [((one / plan.global_batch - fractions) ** 2).sum() for one in counts]
        recent_errors.append(((counts.sum(0) / (recent * plan.global_batch) - fractions) ** 2).sum())
    return Quality(
        _share(plan.num_draws, plan.global_batch, fractions, float(np.mean(batch_errors))),
        _share(plan.num_draws, recent * plan.global_batch, fractions, float(np.mean(recent_errors))),
    )


def advise(plan: TrainPlan, labels: Labels | None = None) -> tuple[TrainPlan, Quality] | None:
    """Return the plan closest to this one that is good, and its quality: the smallest window, or a smaller block.

    Returns None if only a block of 1 is good.
    """
    block = min(plan.block, plan.num_samples)
    while block > 1:
        windows = [block * 2**power for power in range(1, 64) if block * 2**power < plan.lane_length]
        widest = replace(plan, block=block, window=plan.lane_length)
        if (best := measure(widest, labels, most_groups=_ADVICE_GROUPS)).is_good:  # if not, no smaller window is
            for window in windows:
                candidate = replace(plan, block=block, window=window)
                if (found := measure(candidate, labels, most_groups=_ADVICE_GROUPS)).is_good:
                    return candidate, found
            return widest, best
        block //= 2
    return None


def describe(plan: TrainPlan, labels: Labels | None = None) -> str:
    """Return a line about the quality of the shuffle, with a line of advice if it is poor."""
    found = measure(plan, labels)
    kinds = "if neighbours in the shards are alike" if labels is None else "judged by its classes"
    line = (
        f"order: blocks of {plan.block}, window {plan.window}, {plan.lanes} lanes; {kinds}, a batch of "
        f"{plan.global_batch} is worth {found.batch * plan.global_batch:.0f} uniform samples, and "
        f"{_RECENT_STEPS} batches are worth {found.recent * _RECENT_STEPS:.1f}"
    )
    if found.is_good:
        return line
    better = advise(plan, labels)
    if better is None:
        return f"{line}\n  poor: set data.block to 1, or shard the images again in a shuffled order"
    changes = [
        f"data.{name} {getattr(better[0], name)}"
        for name in ("block", "window")
        if getattr(better[0], name) != getattr(plan, name)
    ]
    return (
        f"{line}\n  poor: with {' and '.join(changes)} these would be {better[1].batch * plan.global_batch:.0f} and "
        f"{better[1].recent * _RECENT_STEPS:.1f}"
    )


def _fractions(plan: TrainPlan, labels: Labels | None) -> npt.NDArray[np.float64]:
    """Return p_c: float64 [C]."""
    if plan.balance:
        shares: npt.NDArray[np.float64] = plan.balance.quotas / plan.num_draws
        return shares
    if labels is not None:
        return np.bincount(labels) / plan.num_samples
    num = min(_STRETCHES, plan.num_samples)
    begins = -(-np.arange(num + 1) * plan.num_samples // num)  # first sample of each stretch, as in `_kinds`
    fractions: npt.NDArray[np.float64] = np.diff(begins) / plan.num_samples
    return fractions


def _kinds(plan: TrainPlan, labels: Labels | None, samples: I64) -> npt.NDArray[np.integer]:
    if labels is not None:
        return labels[samples % plan.num_samples]
    return samples * min(_STRETCHES, plan.num_samples) // plan.num_samples


def _share(population: int, size: int, fractions: npt.NDArray[np.float64], error: float) -> float:
    """Return 1 / effect, at most 1."""
    uniform = (population - size) / max(population - 1, 1) / size * (1 - float((fractions**2).sum()))
    return 1.0 if error <= uniform else uniform / error
