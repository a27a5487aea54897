"""The figures of a finished federation, as `summary.json` holds them."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import fedekd
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.early_exit.client_tradeoff import mean_tradeoff
from fedekd.federation.progress import worst_score
from fedekd.metrics import negative_transfer, primary_metric

if TYPE_CHECKING:
    from fedekd.federation.orchestrator import Orchestrator


def summarize(run: Orchestrator) -> dict[str, Any]:
    """All that is worth keeping of a finished run; everything but `seconds` and `versions` is repeatable."""
    local = run.progress.local_scores()
    numbers = sorted(run.progress.records)
    scores = [run.progress.records[number].score for number in numbers]
    delta = negative_transfer(scores, [local[number] for number in numbers], run.task)
    changes = delta.pop("client").tolist()
    counts = run.data.class_counts()
    clients = [
        {
            "client": number,
            "train": len(run.data.clients[number].train),
            "test": len(run.data.clients[number].test),
            "classes": [label for label, count in enumerate(counts[number]) if count],
            "local": local[number],
            "score": score,
            "delta": change,
        }
        for number, score, change in zip(numbers, scores, changes, strict=True)
    ]
    if run.do_no_harm is not None:
        for client in clients:
            client |= _comparison(run, client["client"])
    tradeoffs = [record.tradeoff for record in run.progress.records.values() if record.tradeoff is not None]
    return {
        "dataset": run.data.images.name,
        "alpha": run.data.alpha,
        "seed": run.seed,
        "method": type(run.method).__name__,
        "task": run.task,
        "metric": primary_metric(run.task).name,
        "rounds": run.options.rounds,
        "mean": sum(scores) / len(scores),
        "worst": worst_score(scores, run.task),
        "local_mean": sum(local[number] for number in numbers) / len(numbers),
        "delta": {name: float(value) for name, value in delta.items()},
        "clients": clients,
        **({"deployed": _deployed(run, run.do_no_harm)} if run.do_no_harm is not None else {}),
        **(mean_tradeoff(tradeoffs) if any(len(each.exits) > 1 for each in tradeoffs) else {}),
        "seconds": run.progress.seconds,
        "bytes_up": run.progress.bytes_up,
        "bytes_down": run.progress.bytes_down,
        "versions": {
            "fedekd": fedekd.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("lightning", "numpy", "torch")},
        },
    }


def _comparison(run: Orchestrator, number: int) -> dict[str, Any]:
    """What a client keeps, and the evidence; without a number of its own where nothing was tested."""
    comparison = run.progress.records[number].comparison
    if comparison is None:
        return {}
    return {name: None if value != value else value for name, value in asdict(comparison).items()}


def _deployed(run: Orchestrator, rule: DoNoHarm) -> dict[str, Any]:
    """Scores and Delta where every client uses the model that it keeps."""
    found = run.progress.deployed(run.task)
    name = primary_metric(run.task).name
    return {
        "rule": asdict(rule),
        "federated": found["federated"],
        "mean": found[f"{name}/mean"],
        "worst": found[f"{name}/worst"],
        "delta": {key.removeprefix("delta/"): value for key, value in found.items() if "delta/" in key},
    }
