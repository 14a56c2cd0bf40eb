"""A hash of a multiset of samples that does not depend on their order, so the hashes of ranks and steps can be added.

The hash of a sample is 64 random bits with the key (COVERAGE, seed, sample); the hash of a set is the sum of its
samples' hashes modulo 2^64. A set that lacks one sample and has another twice has the right size but, except with a
probability of about 2^-64, the wrong hash. A sample that occurs m times counts m times in the sum. Sums are signed
64-bit integers, because collectives support those.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wasteddp.order.balance import Balance
from wasteddp.order.keyed_random import COVERAGE, I64, bits
from wasteddp.order.plan import TrainPlan

_CHUNK = 1 << 15  # samples hashed in one call: their arrays stay in a core's cache


def digest(seed: int, samples: I64) -> int:
    """Return the hash of some samples; 0 if there are none."""
    return to_signed(int(bits(COVERAGE, seed, samples).sum(dtype=np.uint64)))


def digest_of_range(seed: int, begin: int, end: int) -> int:
    """Return the hash of the samples begin .. end - 1, in constant memory; it takes about 10 ns a sample."""
    return to_signed(sum(digest(seed, chunk) for chunk in _chunks(range(begin, end))))


def digest_of_epoch(plan: TrainPlan, epoch: int, *, part: int = 0, parts: int = 1) -> int:
    """Return the hash of the samples that an epoch should see, or one of several parts of it, which add up to it.

    The hash is that of complete sets, minus the samples that the epoch does not use. Without balance, the set is the
    split, minus the samples that are left out. With balance, it is the passes through each class, minus the draws of
    other epochs. The order of the epoch itself is not evaluated: the hash must detect an order that is not a
    permutation.

    Args:
        part: number of the part, 0 .. parts - 1.
        parts: parts that the work is divided into, such as one for each rank.
    """
    if plan.balance:
        return _digest_of_draws(plan.balance, epoch, part, parts)
    own = _part(range(plan.num_samples), part, parts)
    left_out = 0 if part else digest(plan.seed, plan.left_out_samples(epoch))
    return to_signed(digest_of_range(plan.seed, own.start, own.stop) - left_out)


def _digest_of_draws(balance: Balance, epoch: int, part: int, parts: int) -> int:
    total = 0
    begin_of_class = 0
    for label, (size, quota) in enumerate(zip(balance.sizes.tolist(), balance.quotas.tolist(), strict=True)):
        if quota:
            taken = range(epoch * quota, (epoch + 1) * quota)
            begin, end = taken.start // size * size, -(-taken.stop // size) * size  # of the passes it overlaps
            for chunk in _chunks(_part(range(begin_of_class, begin_of_class + size), part, parts)):
                total += (end - begin) // size * digest(balance.seed, balance.members[chunk])
            for not_taken in (range(begin, taken.start), range(taken.stop, end)):
                for chunk in _chunks(_part(not_taken, part, parts)):
                    total -= digest(balance.seed, balance.walk(label, chunk))
        begin_of_class += size
    return to_signed(total)


def _part(whole: range, part: int, parts: int) -> range:
    return range(*(whole.start + len(whole) * n // parts for n in (part, part + 1)))


def _chunks(numbers: range) -> Iterator[I64]:
    for at in range(numbers.start, numbers.stop, _CHUNK):
        yield np.arange(at, min(at + _CHUNK, numbers.stop), dtype=np.int64)


def to_signed(number: int) -> int:
    """Return the signed 64-bit integer that equals `number` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
