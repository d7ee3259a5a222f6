"""What is checked of values: of numbers that callers give, and of configurations' fields.

Each `require_…` raises ValueError that names the field and what it may be.
"""

import math
import numbers
from typing import Any

from adastate_jax.errors import shown

# Of weights, and of what is computed with them.
DTYPES = ("float32", "bfloat16", "float16")


# Of a video, and of when prompts change: thirty years. What is longer is a mistake, and does not fit everywhere.
MOST_SECONDS = 10**9


def is_number(value: Any) -> bool:
    """Whether a value is a real number, numpy's among them, and not True or False."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, numpy's among them, and not True or False."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_positive(config: Any, *fields: str) -> None:
    """Refuses the first of these fields that is not a finite number above zero."""
    for field in fields:
        value = getattr(config, field)
        if value <= 0 or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{field} must be positive, got {shown(value)}")


def require_at_least_one(config: Any, *fields: str) -> None:
    """Refuses the first of these fields, numbers or tuples of them, that is or holds a number below one."""
    for field in fields:
        value = getattr(config, field)
        if not all(number >= 1 for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} must be at least 1, got {shown(value)}")


def require_dtypes(config: Any) -> None:
    """Refuses a network's `param_dtype` or `dtype` that is none of `DTYPES`."""
    for field in ("param_dtype", "dtype"):
        if getattr(config, field) not in DTYPES:
            raise ValueError(f"{field} must be one of {', '.join(DTYPES)}, got {shown(getattr(config, field))}")
