"""Types of a run's results, and functions of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from fedekd.metrics import MetricSpec

Row: TypeAlias = Mapping[str, float]
"""Metrics of one round: `round` (1, 2, ...) and names such as `delta/avg`, `client_3/delta` or `client_NAME/delta`."""

Summary: TypeAlias = Mapping[str, Any]
"""Content of `summary.json`."""

#: References besides the local baseline, as a summary names them: key of the score, of the difference, and heads.
REFERENCES = {
    "control": ("control", "surplus", "control", "surplus"),
    "tuned": ("tuned", "delta_tuned", "tuned", "to tuned"),
}

_CLIENT = re.compile(r"client_([^/]+)/(.+)", re.DOTALL)
_NUMBER = re.compile(r"(\d+)")


def client_prefix(client: int, name: str | None = None) -> str:
    """Return what precedes the logged names of a client.

    Args:
        client: Number of the client.
        name: Name of the site that is the client, without `/`; None for a client of a partition.

    Example:
        >>> client_prefix(3), client_prefix(3, "Long Beach")
        ('client_3/', 'client_Long Beach/')
    """
    return f"client_{client if name is None else name}/"


def is_client_name(name: str) -> bool:
    """Return whether a logged name is of a single client.

    Example:
        >>> is_client_name("client_3/delta"), is_client_name("delta/avg")
        (True, False)
    """
    return _CLIENT.fullmatch(name) is not None


def client_title(client: Mapping[str, Any]) -> str:
    """Return the name of the site of a client in a summary, or else its number."""
    return str(client.get("name", client["client"]))


def client_titles(summary: Summary) -> list[str]:
    """Return the titles of all clients of a summary, in the order of their numbers."""
    return [client_title(client) for client in summary["clients"]]


def client_series(
    history: Iterable[Row], name: str, clients: Sequence[str] = ()
) -> dict[str, tuple[list[int], list[float]]]:
    """Collect the values of `client_K/NAME` over the rounds.

    Args:
        history: Rows of the rounds; a client may be missing from some.
        name: Quantity, such as `delta` or `gate/weight_mean`.
        clients: Titles of the clients in order. Default: numbers ascending.

    Returns:
        By title of the client, in order: the rounds in which it has a value, and the values.

    Example:
        >>> client_series([{"round": 1, "client_3/delta": 0.5}, {"round": 2, "client_0/delta": 0.1}], "delta")
        {'0': ([2], [0.1]), '3': ([1], [0.5])}
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            match = _CLIENT.fullmatch(key)
            if match is not None and match[2] == name:
                rounds, values = series.setdefault(match[1], ([], []))
                rounds.append(int(row["round"]))
                values.append(float(value))
    columns = {f"{client_prefix(0, title)}{name}": title for title in series}
    return {columns[column]: series[columns[column]] for column in column_order(columns, clients)}


def column_order(names: Iterable[str], clients: Sequence[str] = ()) -> list[str]:
    """Sort column names: `round`, those of the federation, those of the clients.

    Args:
        names: Names of columns.
        clients: Titles of the clients in order. Default: numbers ascending.

    Example:
        >>> column_order(["client_10/delta", "delta/avg", "round", "client_2/delta"])
        ['round', 'delta/avg', 'client_2/delta', 'client_10/delta']
        >>> column_order(["client_b/delta", "client_a/delta"], ["b", "a"])
        ['client_b/delta', 'client_a/delta']
    """
    number = {title: str(index) for index, title in enumerate(clients)}

    def rank(name: str) -> tuple[bool, bool, list[tuple[int, str]], str]:
        client = _CLIENT.fullmatch(name)
        ranked = name if client is None else f"client_{number.get(client[1], client[1])}/{client[2]}"
        # Splitting at digits gives text and numbers in turn, so that text is never compared with a number.
        parts = _NUMBER.split(ranked)
        natural = [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]
        return name != "round", client is not None, natural, name

    return sorted(set(names), key=rank)


def references_of(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return the rows of `REFERENCES` that a summary has."""
    return [row for row in REFERENCES.values() if row[1] in summary]


def metric_spec(name: str) -> MetricSpec:
    """Return the registry row of a summary's metric or value, such as `recall/3`."""
    from fedekd.metrics import METRICS  # not at the top: it loads torch, which reports of finished runs do not need

    return METRICS[name.partition("/")[0]]


def value_title(name: str, summary: Summary) -> str:
    """Return the title of a metric in tables, with the class of a value per class.

    Args:
        name: Name of a value in `metrics` of the summary, such as `recall/no_finding`.
        summary: Content of `summary.json`.
    """
    metric, _, label = name.partition("/")
    title = metric_spec(metric).title
    if not label:
        return title
    names = [value for value in summary["metrics"] if value.startswith(f"{metric}/")]  # in the order of the classes
    classes = summary.get("class_names") or [str(index) for index in range(len(names))]
    return f"{title} of {classes[names.index(name)]}"


def is_harm(delta: float | None, metric: str) -> bool:
    """Return whether a client is worse than its local baseline.

    Args:
        delta: Delta of the client; None or NaN, which is no harm, where it is undefined.
        metric: Name of the metric, which decides the direction.
    """
    if delta is None:
        return False
    return delta < 0 if metric_spec(metric).higher_is_better else delta > 0


def candidate_rows(summary: Summary) -> list[dict[str, str]]:
    """Return the p-values of each client's candidates in order, as text.

    Args:
        summary: Content of `summary.json`.
    """
    rows = []
    for client in summary["clients"]:
        row = {"site" if "name" in client else "client": client_title(client)}
        for name, result in client.get("candidates", {}).items():
            tested = isinstance(result, Mapping)
            p_value = result["p_value"] if isinstance(result, Mapping) else None
            row[name] = result if not tested else "" if p_value is None else f"{p_value:.3g}"
        if "candidates" in client:
            rows.append({**row, "deployed": client["deployed"]})
    return rows


def rule_note(rule: Mapping[str, Any]) -> str:
    """Return level, margin and metric of a do-no-harm rule as a part of a text.

    Args:
        rule: Fields of the rule, as in `summary.json`.

    Example:
        >>> rule_note({"rule": "certified", "confidence": 0.9, "margin": 0.0, "metric": "recall"})
        'confidence 0.9, margin 0, recall'
    """
    name = rule.get("metric", "accuracy")
    metric = "" if name == "accuracy" else f", {name}" + (" (asymptotic)" if name == "auroc_delong" else "")
    if rule["rule"] != "certified":
        return f"better on the tuning split{metric}, no guarantee"
    return f"confidence {rule['confidence']:.12g}, margin {rule['margin']:g}{metric}"
