"""A counter-based random generator for every random choice about a sample or a batch; it has no state to save.

A random number is a pure function of its key, which consists of integers; vectorised in numpy. There is no torch
generator and no state of a rank.
Sources: the mixer is the finaliser of splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's variant 13), chained
over the key's integers; the Feistel network with cycle walking is that of Black and Rogaway 2002.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6

# The purpose of a random number is the first integer of its key, so that two purposes never share numbers.
CROP, FLIP, COLOUR, ERASE, BLOCKS, WINDOW, COVERAGE, MIX, BALANCE, POLICY, DEPTH = range(11)


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(*key: int | npt.NDArray[np.integer]) -> U64:
    """Return 64 random bits for a key of integers and integer arrays, which are broadcast together."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        for part in key:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(part).astype(np.uint64) + _GOLDEN))
    return np.asarray(state)


def uniform(*key: int | npt.NDArray[np.integer], num: int) -> npt.NDArray[np.float64]:
    """Return `num` random numbers in [0, 1) for each key: float64 [*broadcast shape of the key, num]."""
    word = bits(*(np.asarray(part)[..., None] for part in key), np.arange(num))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(position: I64, size: int | I64, *key: int | npt.NDArray[np.integer]) -> I64:
    """Return the image of each position under a keyed permutation of 0 .. size-1, without storing the permutation.

    A Feistel network permutes 0 .. 4^h - 1, where 4^h is the smallest power of four that is not below `size`. A result
    outside 0 .. size-1 goes through the network again until it is inside (at most 4 times on average).

    Args:
        position: in 0 .. size-1, any shape.
        size: one for all positions, or an array with one for each; so are the integers of `key`.
    """
    position = np.asarray(position, dtype=np.int64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), position.shape)
    round_keys = bits(*(np.asarray(part)[..., None] for part in key), np.arange(_FEISTEL_ROUNDS))
    keys = [np.broadcast_to(round_keys[..., number], position.shape) for number in range(_FEISTEL_ROUNDS)]
    # bits of half a word: 4^h >= size
    half = np.ceil(np.log2(np.maximum(sizes, 2).astype(np.float64)) / 2).astype(np.uint64)
    out = position.astype(np.uint64)
    walking = np.arange(out.size)
    flat, flat_sizes, flat_half = out.reshape(-1), sizes.reshape(-1), half.reshape(-1)
    flat_keys = [k.reshape(-1) for k in keys]
    while walking.size:
        h = flat_half[walking]
        mask = (np.uint64(1) << h) - np.uint64(1)
        left, right = flat[walking] >> h, flat[walking] & mask
        with np.errstate(over="ignore"):
            for k in flat_keys:
                left, right = right, left ^ (_mix(right + k[walking]) & mask)
        flat[walking] = (left << h) | right
        walking = walking[flat[walking] >= flat_sizes[walking].astype(np.uint64)]
    return flat.reshape(position.shape).astype(np.int64)
