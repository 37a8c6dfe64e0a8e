"""The arithmetic of fusing: short pure functions on named arrays, float64 in between, one rounding at the end."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 15  # elements converted and added at a time: what stays in the core's own cache


def mean(parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """The unweighted mean (1/N) Σᵢ xᵢ of equally long arrays of any floating dtype: ColD Fusion's fuse step.

    The sum runs in float64 in the order given and is divided once by N, so that copies of one float32 (or
    narrower) array give it back exactly. Paper: arXiv 2212.01378, section 2.
    """
    total = np.empty(parts[0].size, np.float64)
    scratch = np.empty(_PIECE, np.float64)
    for start in range(0, total.size, _PIECE):
        piece = total[start : start + _PIECE]
        wide = scratch[: piece.size]
        piece[:] = parts[0][start : start + _PIECE]
        for part in parts[1:]:
            wide[:] = part[start : start + _PIECE]
            np.add(piece, wide, out=piece)
        np.divide(piece, len(parts), out=piece)
    return total


def mean_of_doubles(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The same mean for float64 inputs, summed in the machine's extended precision, where it has one.

    In float64 alone the sum of three copies may already be rounded, and the mean would not be the copy.
    """
    total = parts[0].astype(np.longdouble)
    for part in parts[1:]:
        total += part
    return np.asarray(total / len(parts), np.float64)


def rounded(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round float64 values to `dtype`, once, to nearest with ties to even.

    The conversions of ml_dtypes go through float32 and would round twice, so for them the float32 in between
    is rounded to odd, which keeps what the second rounding needs to know (Boldo and Melquiond 2008).
    """
    if dtype in (np.float64, np.float32, np.float16):
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    too_far = np.abs(single.astype(np.float64)) > np.abs(values)
    bits[too_far] -= 1  # towards zero
    bits[single.astype(np.float64) != values] |= 1
    return single.astype(dtype)


def is_double(dtype: np.dtype[Any]) -> bool:
    """Whether values of `dtype` need more than float64 to be summed exactly."""
    return bool(dtype == np.float64)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
