"""The vocabulary of a run's numbers: rows, histories, summaries, and what their names say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, float]
"""The numbers of one round: `round_idx` (1, 2, ...) and names such as `delta/avg` or `client_3/accuracy`."""

Summary: TypeAlias = Mapping[str, Any]
"""What `summary.json` holds."""

_CLIENT = re.compile(r"client_(\d+)/(.+)")
_NUMBER = re.compile(r"(\d+)")


def client_series(history: Iterable[Row], name: str) -> dict[int, tuple[list[int], list[float]]]:
    """The course of one quantity, client by client, from the names `client_K/NAME`.

    Args:
        history: The rows of the rounds; a client may be missing from some.
        name: The quantity, such as `accuracy` or `gate/weight_mean`.

    Returns:
        For each client, in order, the rounds in which it has a value, and the values.

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
    """Names in the order of a table's columns: `round_idx`, the federation's, then each client's, by number.

    Example:
        >>> column_order(["client_10/delta", "delta/avg", "round", "client_2/delta"])
        ['round', 'delta/avg', 'client_2/delta', 'client_10/delta']
    """

    def rank(name: str) -> tuple[bool, bool, list[tuple[int, str]], str]:
        # Splitting by digits gives text and numbers in turn, so that equal places always compare alike.
        parts = _NUMBER.split(name)
        natural = [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
        return name != "round", _CLIENT.fullmatch(name) is not None, natural, name

    return sorted(set(names), key=rank)


def harmed(delta: float, metric: str) -> bool:
    """Whether a client is worse off than with Local: a lower accuracy, or a higher error.

    Example:
        >>> harmed(-0.01, "accuracy"), harmed(-0.01, "rmse")
        (True, False)
    """
    return delta < 0 if metric == "accuracy" else delta > 0


def tail_name(delta: Mapping[str, float]) -> str:
    """The name of the harmful tail's percentile in a summary's `delta`: `p10` (accuracy) or `p90` (an error).

    Example:
        >>> tail_name({"avg": 0.0, "worst": 0.1, "p90": 0.05})
        'p90'
    """
    return next(name for name in delta if name.startswith("p"))
