"""A hash of a set of samples that does not depend on their order: ranks and checkpoints add theirs.

The hash of a sample is 64 bits drawn with the key (COVERAGE, seed, sample), that of a set their sum modulo 2^64. A set
that lost one sample and has another twice has the right number and, but for a chance of about 2^-64, the wrong sum. A
sample that is m times in the set is m times in the sum. Sums are signed 64-bit integers, as collectives carry them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wasteddp.order.balance import Balance
from wasteddp.order.keyed_random import COVERAGE, I64, bits
from wasteddp.order.plan import TrainPlan

_CHUNK = 1 << 15  # samples hashed at once: their arrays stay in a core's cache


def digest(seed: int, samples: I64) -> int:
    """The hash of some samples; of none it is 0."""
    return signed(int(bits(COVERAGE, seed, samples).sum(dtype=np.uint64)))


def digest_of_range(seed: int, begin: int, end: int) -> int:
    """The hash of the samples begin .. end - 1, in memory that does not grow with their number; about 10 ns each."""
    return signed(sum(digest(seed, chunk) for chunk in _chunks(range(begin, end))))


def digest_of_epoch(plan: TrainPlan, epoch: int, *, part: int = 0, parts: int = 1) -> int:
    """The hash of what an epoch should see, or one of several parts of it, which add up.

    It is that of whole sets less what the epoch does not take of them: of the split less the samples that are left out;
    balanced, of the passes through each class less what other epochs take of them. What the epoch takes is not asked
    for: the order is to be judged by it, so an order that is no permutation does not confirm itself.
    """
    if plan.balance:
        return _digest_of_draws(plan.balance, epoch, part, parts)
    own = _part(range(plan.num_samples), part, parts)
    left_out = 0 if part else digest(plan.seed, plan.left_out_samples(epoch))
    return signed(digest_of_range(plan.seed, own.start, own.stop) - left_out)


def _digest_of_draws(balance: Balance, epoch: int, part: int, parts: int) -> int:
    total = 0
    begin_of_class = 0
    for label, (size, quota) in enumerate(zip(balance.sizes.tolist(), balance.quotas.tolist(), strict=True)):
        if quota:
            taken = range(epoch * quota, (epoch + 1) * quota)
            begin, end = taken.start // size * size, -(-taken.stop // size) * size  # of the passes that it is part of
            for chunk in _chunks(_part(range(begin_of_class, begin_of_class + size), part, parts)):
                total += (end - begin) // size * digest(balance.seed, balance.members[chunk])
            for others in (range(begin, taken.start), range(taken.stop, end)):
                for chunk in _chunks(_part(others, part, parts)):
                    total -= digest(balance.seed, balance.walk(label, chunk))
        begin_of_class += size
    return signed(total)


def _part(whole: range, part: int, parts: int) -> range:
    return range(*(whole.start + len(whole) * n // parts for n in (part, part + 1)))


def _chunks(numbers: range) -> Iterator[I64]:
    for at in range(numbers.start, numbers.stop, _CHUNK):
        yield np.arange(at, min(at + _CHUNK, numbers.stop), dtype=np.int64)


def signed(number: int) -> int:
    """The signed 64-bit integer that is `number` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
