"""What a user should know of the scores of a finished run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedekd.errors import listed
from fedekd.metrics import BALANCED, predicts_like_one_class

if TYPE_CHECKING:
    from fedekd.federation.orchestrator import Orchestrator


def result_warnings(run: Orchestrator) -> list[str]:
    """Return warnings of undefined metrics and of networks that predict one class.

    Args:
        run: A run whose last round is finished. Undefined metrics are named only if the run's metrics were chosen.
    """
    lines = _undefined_metrics(run) if run.metrics.are_chosen else []
    return [*lines, *_one_class(run)]


def _undefined_metrics(run: Orchestrator) -> list[str]:
    """Return a line that names the metrics, the clients and the missing classes."""
    progress, names = run.progress, run.data.samples.class_names
    rows = [row for row in run.metrics.rows if not row.is_per_class]
    undefined = {row.name: progress.undefined_clients(row, row.name) for row in rows} if progress.has_metrics else {}
    if not any(undefined.values()):
        return []
    parts = []
    for number in sorted(set().union(*undefined.values())):
        missing = [names[label] for label in progress.missing_classes(number, run.task)]
        reason = f"no {listed(missing)}" if missing else "equal targets"
        parts.append(f"{run.data.clients[number].title}: {reason}")
    metrics = ", ".join(name for name, clients in undefined.items() if clients)
    return [f"metrics: {metrics}: undefined in these test splits, which are left out of the means ({_joined(parts)})"]


def _one_class(run: Orchestrator) -> list[str]:
    """Return a line that names the clients whose network seems to predict one class."""
    if run.task != "classification":
        return []
    samples, clients = run.data.samples, run.data.clients
    # The server of a federation of sites has no labels.
    found = [
        clients[number].title
        for number, record in sorted(run.progress.records.items())
        if predicts_like_one_class(
            record.metrics,
            samples.targets[clients[number].test] if len(samples.targets) else samples.targets,
            samples.num_classes,
        )
    ]
    if not found:
        return []
    advice = []
    if not (run.metrics.are_chosen and BALANCED in (row.name for row in run.metrics.rows)):
        advice.append(f"--metrics [{BALANCED}]")
    if run.spec.client.class_weights is None:
        advice.append("--client.class_weights balanced")
    line = (
        f"scores of {len(found)} of {len(clients)} clients are not better than predicting one class ({listed(found)})"
    )
    return [f"{line}. Try {' and '.join(advice)}" if advice else line]


def _joined(parts: Iterable[str]) -> str:
    """Return the parts in one line, of many the first ones."""
    parts = list(parts)
    return "; ".join(parts[:8]) + (f"; ... {len(parts)} clients in all" if len(parts) > 8 else "")
