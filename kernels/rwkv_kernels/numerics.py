"""The error measure and the tolerance rule by which every backend is accepted."""

from typing import Any

import numpy as np

FLOAT32_TOLERANCE = 1e-5
"""Of the norm of the exact result."""
BFLOAT16_FLOOR = 1e-6
"""Added to twice the oracle's own error."""


def relative_error(actual: Any, exact: Any) -> float:
    """Returns the norm of the difference over the norm of `exact`, in float64; the difference's norm where exact is 0."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    scale = float(np.linalg.norm(exact))
    return float(np.linalg.norm(actual - exact)) / (scale or 1.0)


def tolerance(dtype: Any, oracle_error: float) -> float:
    """Returns how large a backend's `relative_error` may be.

    Args:
        dtype: Of inputs and outputs: float32, or bfloat16.
        oracle_error: What the scan oracle, given the same low-precision inputs and rounding its outputs alike, errs by. In
            bfloat16 a backend may err twice as much; in float32 the bound does not depend on it.
    """
    if np.dtype(dtype).name == "bfloat16":
        return 2 * oracle_error + BFLOAT16_FLOOR
    return FLOAT32_TOLERANCE
