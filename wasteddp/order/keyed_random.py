"""Every random choice about a sample or a batch: a counter-based generator, so nothing has a state to save.

A draw is a pure function of its key (integers), vectorised in numpy; no torch generator, no per-rank state.
Source: the mixer is splitmix64's finaliser (Steele, Lea, Flood 2014; constants of Stafford's variant 13), chained over
the key's integers; the Feistel network with cycle walking is Black and Rogaway 2002.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6

# What a draw is for: the first integer of its key, so that two uses never share numbers.
CROP, FLIP, COLOUR, ERASE, BLOCKS, WINDOW, COVERAGE, MIX, BALANCE, POLICY, DEPTH = range(11)


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(*key: int | npt.NDArray[np.integer]) -> U64:
    """64 random bits for a key of integers and integer arrays, broadcast together."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for part in key:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(part).astype(np.uint64) + _GOLDEN))
    return np.asarray(state)


def uniform(*key: int | npt.NDArray[np.integer], num: int) -> npt.NDArray[np.float64]:
    """`num` numbers in [0, 1) for each key: shape of the key's broadcast + (num,)."""
    word = bits(*(np.asarray(part)[..., None] for part in key), np.arange(num))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(position: I64, size: int | I64, *key: int | npt.NDArray[np.integer]) -> I64:
    """Where a keyed permutation of 0 .. size-1 sends each position, without storing the permutation.

    A Feistel network permutes 0 .. 4^h - 1, the power of four next above `size`; what falls outside is sent through
    again until it falls inside (at most 4 times on average). `size` and the key may be arrays, one a position.
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
