"""Warnings on the scores of a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedekd.do_no_harm.power import fewest_samples
from fedekd.errors import LONGEST_ERROR, listed, shorten
from fedekd.metrics import BALANCED, predicts_like_one_class

if TYPE_CHECKING:
    from fedekd.federation.orchestrator import Orchestrator

#: Classes are uneven if the largest has this many times the samples of the smallest.
_UNEVEN = 1.5

#: Characters of a class or client, and classes of a client, that a warning names.
_LONGEST_NAME, _MOST_CLASSES = 24, 4


def result_warnings(run: Orchestrator) -> list[str]:
    """Return warnings of results that mislead, such as undefined metrics.

    Args:
        run: A run whose last round is finished. Undefined metrics are named only if the run's metrics were chosen.
    """
    lines = _undefined_metrics(run) if run.metrics.are_chosen else []
    return [*lines, *_one_class(run), *_without_difference(run), *_of_clients(run)]


def _of_clients(run: Orchestrator) -> list[str]:
    """Return lines that name clients whose result misleads."""
    records, rule = sorted(run.progress.records.items()), run.do_no_harm
    lines = [
        (
            [number for number, record in records if run.progress.local and not record.supervised_rounds],
            "never drawn to train. Delta compares them with one round of local training. Raise --participation"
            " or --rounds",
        ),
        (
            [number for number, record in records if math.isnan(record.logs.get("selected/score", 0.0))],
            f"the last round is deployed. --select_round best needs {run.metrics.primary.name}, which is undefined on"
            " their tuning split",
        ),
    ]
    if rule is not None and rule.rule == "certified" and run.task == "regression":
        compared = [(number, record.comparison) for number, record in records if record.comparison is not None]
        lines.append(
            (
                [number for number, result in compared if not result.is_local and result.gain <= -rule.margin],
                "the deployed model has a larger mean squared error on the compared samples. Their differences are"
                f" clipped to ±{rule.clip:g}. Raise --do_no_harm.clip",
            )
        )
    clients = run.data.clients
    return [f"clients ({listed(clients[k].title for k in numbers)}): {text}" for numbers, text in lines if numbers]


def _without_difference(run: Orchestrator) -> list[str]:
    """Return a line that names the clients whose two models never differ."""
    rule = run.do_no_harm
    if rule is None or run.task != "classification" or rule.rule != "certified" or rule.margin > 0:
        return []
    if not rule.compares_samples:  # as the numbers below
        return []
    parts, fewest = [], fewest_samples(rule)
    for number, record in sorted(run.progress.records.items()):
        result = record.comparison
        if result is None or not result.is_local or result.worse + result.better or result.samples < fewest:
            continue
        # Upper bound of the rate at confidence 0.95 where none of n samples differs.
        needed = math.ceil(fewest / (1 - 0.05 ** (1 / result.samples)))
        parts.append(f"{shorten(run.data.clients[number].label, _LONGEST_NAME)}: more than {needed:,}")
    if not parts:
        return []
    start = (
        f"do_no_harm: no compared sample differs between the models, and margin 0 needs at least {fewest} samples that"
        " only the federated model classifies correctly. Set do_no_harm.margin above 0, or compare on more samples"
    )
    return [_joined(start, parts)]


def _undefined_metrics(run: Orchestrator) -> list[str]:
    """Return a line that names the metrics, the clients and the missing classes."""
    progress, names = run.progress, run.data.samples.class_names
    rows = [row for row in run.metrics.rows if not row.is_per_class]
    undefined = {row.name: progress.undefined_clients(row, row.name) for row in rows} if progress.has_metrics else {}
    if not any(undefined.values()):
        return []
    parts = []
    for number in sorted(set().union(*undefined.values())):
        missing = [shorten(names[label], _LONGEST_NAME) for label in progress.missing_classes(number, run.task)]
        rest = f" and {len(missing) - _MOST_CLASSES} more" if len(missing) > _MOST_CLASSES else ""
        reason = f"no {', '.join(missing[:_MOST_CLASSES])}{rest}" if missing else "equal targets"
        parts.append(f"{shorten(run.data.clients[number].title, _LONGEST_NAME)}: {reason}")
    metrics = ", ".join(name for name, clients in undefined.items() if clients)
    return [_joined(f"metrics: {metrics}: undefined in these test splits, which are left out of the means", parts)]


def _one_class(run: Orchestrator) -> list[str]:
    """Return a line that names the clients whose network seems to predict one class."""
    if run.task != "classification":
        return []
    clients, counts = run.data.clients, run.data.class_counts()
    found = [
        number
        for number, record in sorted(run.progress.records.items())
        if predicts_like_one_class(record.metrics, _test_counts(run, number))
    ]
    if not found:
        return []
    titles = listed(clients[number].title for number in found)
    line = f"scores of {len(found)} of {len(clients)} clients are not better than predicting one class ({titles})"
    if all(counts[number].max() < _UNEVEN * counts[number].min() for number in found):
        return [f"{line}. Their classes are balanced: raise --rounds, --client.local_epochs or --client.optimizer.lr"]
    advice = []
    is_defined = any(_test_counts(run, number).min() > 0 for number in found)  # balanced accuracy needs each class
    if is_defined and not (run.metrics.are_chosen and BALANCED in (row.name for row in run.metrics.rows)):
        advice.append(f"--metrics [{BALANCED}]")
    # Weights do not help a client that lacks a class.
    if run.spec.client.class_weights is None and any(counts[number].min() > 0 for number in found):
        advice.append("--client.class_weights balanced")
    return [f"{line}. Try {' and '.join(advice)}" if advice else line]


def _test_counts(run: Orchestrator, number: int) -> Tensor:
    """Return the test samples of a client by class, shape (C,).

    The server of a federation of sites has no labels: there, all samples of the site are counted.
    """
    samples = run.data.samples
    if not len(samples.targets):
        return torch.from_numpy(run.data.class_counts()[number])
    return torch.bincount(samples.targets[run.data.clients[number].test], minlength=samples.num_classes)


def _joined(start: str, parts: Sequence[str]) -> str:
    """Return a line of bounded length that ends with the parts, or the first."""
    for shown in range(len(parts), -1, -1):
        rest = [f"... {len(parts)} clients in all"] if shown < len(parts) else []
        line = f"{start} ({'; '.join([*parts[:shown], *rest])})"
        if len(line) <= LONGEST_ERROR:
            break
    return line
