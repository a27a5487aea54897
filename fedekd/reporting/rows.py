"""Types of a run's results, and functions of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from fedekd.metrics import MetricSpec

Row: TypeAlias = Mapping[str, float]
"""Metrics of one round: `round` (1, 2, ...) and names such as `delta/avg` or `client_3/delta`."""

Summary: TypeAlias = Mapping[str, Any]
"""Content of `summary.json`."""

_CLIENT = re.compile(r"client_(\d+)/(.+)")
_NUMBER = re.compile(r"(\d+)")


def client_series(history: Iterable[Row], name: str) -> dict[int, tuple[list[int], list[float]]]:
    """Collect the values of `client_K/NAME` over the rounds.

    Args:
        history: Rows of the rounds; a client may be missing from some.
        name: Quantity, such as `delta` or `gate/weight_mean`.

    Returns:
        By client, ascending: the rounds in which it has a value, and the values.

    Example:
        >>> client_series([{"round": 1, "client_3/delta": 0.5}, {"round": 2, "client_0/delta": 0.1}], "delta")
        {0: ([2], [0.1]), 3: ([1], [0.5])}
    """
    series: dict[int, tuple[list[int], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            match = _CLIENT.fullmatch(key)
            if match is not None and match[2] == name:
                rounds, values = series.setdefault(int(match[1]), ([], []))
                rounds.append(int(row["round"]))
                values.append(float(value))
    return dict(sorted(series.items()))


def column_order(names: Iterable[str]) -> list[str]:
    """Sort column names: `round`, those of the federation, those of the clients.

    Example:
        >>> column_order(["client_10/delta", "delta/avg", "round", "client_2/delta"])
        ['round', 'delta/avg', 'client_2/delta', 'client_10/delta']
    """

    def rank(name: str) -> tuple[bool, bool, list[tuple[int, str]], str]:
        # Splitting at digits gives text and numbers in turn, so that text is never compared with a number.
        parts = _NUMBER.split(name)
        natural = [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]
        return name != "round", _CLIENT.fullmatch(name) is not None, natural, name

    return sorted(set(names), key=rank)


def metric_spec(name: str) -> MetricSpec:
    """Return the registry row of a summary's metric."""
    from fedekd.metrics import METRICS  # not at the top: it loads torch, which reports of finished runs do not need

    return METRICS[name]


def is_harm(delta: float, metric: str) -> bool:
    """Return whether a client is worse than its local baseline.

    Args:
        delta: Delta of the client.
        metric: Name of the metric, which decides the direction.
    """
    return delta < 0 if metric_spec(metric).higher_is_better else delta > 0
