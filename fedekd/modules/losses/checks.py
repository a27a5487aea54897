"""Checks of the weights and temperatures of loss terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedekd.errors import require


def require_nonnegative(option: str, value: float) -> None:
    """Check that a weight is finite and at least 0.

    Raises:
        UserError: If it is not.
    """
    require(0 <= value < math.inf, option, "a finite number of at least 0", value)


def require_temperature(value: float, option: str = "temperature") -> None:
    """Check that a temperature is finite and above 0.

    Raises:
        UserError: If it is not.
    """
    require(0 < value < math.inf, option, "a finite number above 0", value)


def require_exit_weights(weights: Sequence[float], exits: int) -> None:
    """Check that there is one finite weight of at least 0 per exit, and one above 0.

    Raises:
        UserError: If not.
    """
    require(len(weights) == exits, "exit_weights", f"{exits} weights, one per exit", weights)
    allowed = all(0 <= weight < math.inf for weight in weights) and any(weights)
    require(allowed, "exit_weights", "finite numbers of at least 0, not all 0", list(weights))
