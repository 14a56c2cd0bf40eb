"""Many logged rows -> few points that still show every extreme. Pure numpy.

Legend: N rows, M points kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def kept_rows(values: F64, num_buckets: int) -> I64:
    """Numbers of the rows to draw: all, or the first, the last, and each bucket's smallest and largest.

    A mean would hide a spike and every n-th row could miss it. Every point that is drawn is a row that was logged.

    Args:
        values: finite, [N].
        num_buckets: of equally many neighbouring rows; at most 2 * num_buckets + 2 rows are kept.
    """
    if len(values) <= 2 * num_buckets + 2:
        return np.arange(len(values))
    starts = bucket_starts(len(values), num_buckets)
    kept = {0, len(values) - 1}
    for begin, end in zip(starts, [*starts[1:], len(values)], strict=True):
        kept |= {int(begin + values[begin:end].argmin()), int(begin + values[begin:end].argmax())}
    return np.array(sorted(kept))


def bucket_means(values: F64, num_buckets: int) -> F64:
    """Mean of each bucket of neighbouring rows: [num_buckets], or [N] where there are fewer rows."""
    num_buckets = min(num_buckets, len(values))
    if num_buckets == 0:
        return np.zeros(0)
    starts = bucket_starts(len(values), num_buckets)
    sums: F64 = np.add.reduceat(values, starts)
    return sums / np.diff([*starts, len(values)])


def bucket_starts(num_rows: int, num_buckets: int) -> I64:
    """First row of each of `num_buckets` parts of `num_rows`, which differ by one row at most."""
    return np.arange(num_buckets) * num_rows // num_buckets


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten, `most` of them at most."""
    if not high > low:
        return [low]
    power = 10.0 ** np.floor(np.log10((high - low) / most))
    step = next(power * unit for unit in (1, 2, 5, 10, 20, 50) if (high - low) / (power * unit) < most)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") + 0.0 for number in np.arange(first, last + 1)]  # + 0.0: no "-0"


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], six at most; 2 and 5 times them, or any round numbers, where those are few."""
    exponents = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for units in ((1,), (1, 2, 5)):
        found = [float(f"{unit * 10.0**power:.12g}") for power in exponents for unit in units]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside[:: -(-len(inside) // 6)]
    return ticks(low, high, most=5)
