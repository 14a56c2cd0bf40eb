"""A hash of a set of samples that does not depend on their order: ranks and checkpoints add theirs.

The hash of a sample is 64 bits drawn with the key (COVERAGE, seed, sample), that of a set their sum modulo 2^64. A set
that lost one sample and has another twice has the right number and, but for a chance of about 2^-64, the wrong sum.
Sums are signed 64-bit integers, as collectives carry them.
"""

from __future__ import annotations

import numpy as np

from wasteddp.data.draws import COVERAGE, I64, bits

_CHUNK = 1 << 15  # samples hashed at once: their arrays stay in a core's cache


def digest(seed: int, samples: I64) -> int:
    """The hash of some samples; of none it is 0."""
    return signed(int(bits(COVERAGE, seed, samples).sum(dtype=np.uint64)))


def digest_of_range(seed: int, begin: int, end: int) -> int:
    """The hash of the samples begin .. end - 1, in memory that does not grow with their number; about 10 ns each."""
    chunks = (np.arange(at, min(at + _CHUNK, end), dtype=np.int64) for at in range(begin, end, _CHUNK))
    return signed(sum(digest(seed, chunk) for chunk in chunks))


def signed(number: int) -> int:
    """The signed 64-bit integer that is `number` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
