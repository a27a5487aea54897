"""Summary of a finished run, the content of `summary.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import fedekd
from fedekd.atomic import digest
from fedekd.data import Samples
from fedekd.do_no_harm.evidence import METRICS
from fedekd.do_no_harm.power import deciding_samples
from fedekd.do_no_harm.rule import Comparison, DoNoHarm
from fedekd.early_exit.client_tradeoff import mean_tradeoff
from fedekd.federation.options import participants
from fedekd.federation.results import ScoreSummary
from fedekd.reporting.rows import REFERENCES

if TYPE_CHECKING:
    from fedekd.federation.orchestrator import Orchestrator


def summarize(run: Orchestrator) -> dict[str, Any]:
    """Return the summary of a finished run, the content of `summary.json`.

    All values except `seconds` and `versions` are repeatable; undefined ones are None.
    """
    return {name: _json_value(value) for name, value in _summary(run).items()}


def artifact_metadata(run: Orchestrator, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return method, scores, Delta, and the digest of the clients' data."""
    names = (
        "method",
        "dataset",
        "task",
        "metric",
        "rounds",
        "seed",
        "mean",
        "worst",
        "local_mean",
        "delta",
        "versions",
    )
    values = {name: summary[name] for name in names}
    data = digest("".join(run.data_digests).encode())
    return {**values, "clients": len(run.data.clients), "data_sha256": data}


def _summary(run: Orchestrator) -> dict[str, Any]:
    """Return the summary with NaN where a value is undefined."""
    primary, records = run.metrics.primary, run.progress.records
    scores, others = run.progress.scores(primary), run.progress.other_scores(run.metrics)
    counts, deployed = run.data.class_counts(), run.progress.scores(primary, deployed=True)
    references = {name: run.progress.scores(primary, reference=name) for name in run.progress.references}
    clients: list[dict[str, Any]] = []
    for number, (score, local, delta) in scores.clients.items():
        splits, comparison = run.data.clients[number], records[number].comparison
        clients.append(
            {
                "client": number,
                **({} if splits.name is None else {"name": splits.name}),
                "train": len(splits.train),
                "test": len(splits.test),
                "classes": [label for label, count in enumerate(counts[number]) if count],
                "local": local,
                "score": score,
                "delta": delta,
                **_other_values(number, others),
                **_reference_values(run, references, number),
                **_missing(run, number),
                **_selected(run, number),
            }
        )
        if run.do_no_harm is not None and comparison is not None:
            clients[-1] |= _compared(run, run.do_no_harm, comparison)
            if run.do_no_harm.candidates:
                score, _, delta = deployed.clients[number]
                clients[-1] |= {"deployed_score": score, "deployed_delta": delta}
    tradeoffs = [record.tradeoff for record in records.values() if record.tradeoff is not None]
    return {
        "dataset": run.data.samples.name,
        **({} if run.data.has_sites else {"alpha": run.data.alpha}),
        "seed": run.seed,
        "method": type(run.method).__name__,
        "task": run.task,
        "metric": primary.name,
        "rounds": run.options.rounds,
        **_class_names(run.data.samples),
        "mean": scores.mean,
        "worst": scores.worst,
        "local_mean": scores.local_mean,
        "delta": scores.delta,
        **_other_summaries(others),
        **_reference_summaries(run, references),
        **_serving(run),
        "clients": clients,
        **_deployed(run),
        **_privacy(run),
        **(mean_tradeoff(tradeoffs) if any(len(tradeoff.exits) > 1 for tradeoff in tradeoffs) else {}),
        "seconds": run.progress.seconds,
        "bytes_up": run.progress.bytes_up,
        "bytes_down": run.progress.bytes_down,
        "versions": {
            "fedekd": fedekd.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("lightning", "numpy", "torch")},
        },
    }


def _json_value(value: Any) -> Any:
    """Return a value with None for NaN, which is not valid JSON, at any depth."""
    if isinstance(value, Mapping):
        return {name: _json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    return None if value != value else value


def _other_summaries(others: Mapping[str, ScoreSummary]) -> dict[str, Any]:
    """Return the figures of the other metrics, over the `clients` with a value."""
    figures = {
        name: {
            "mean": scores.mean,
            "worst": scores.worst,
            "local_mean": scores.local_mean,
            "delta": scores.delta,
            "clients": scores.counted,
        }
        for name, scores in others.items()
    }
    return {"metrics": figures} if figures else {}


def _other_values(number: int, others: Mapping[str, ScoreSummary]) -> dict[str, Any]:
    """Return the values of the other metrics of a client."""
    values = {
        name: dict(zip(("score", "local", "delta"), scores.clients[number], strict=True))
        for name, scores in others.items()
    }
    return {"metrics": values} if values else {}


def _reference_summaries(run: Orchestrator, references: Mapping[str, ScoreSummary]) -> dict[str, Any]:
    """Return mean score, differences to the method and Delta of each reference."""
    figures: dict[str, Any] = {}
    for name, scores in references.items():
        score, difference = REFERENCES[name][:2]
        figures |= {f"{score}_mean": scores.local_mean, difference: scores.delta}
        figures[f"{score}_delta"] = run.progress.reference_delta(run.metrics.primary, name)
    return figures


def _reference_values(run: Orchestrator, references: Mapping[str, ScoreSummary], number: int) -> dict[str, Any]:
    """Return the scores of a client's references, the differences, and their choices."""
    values: dict[str, Any] = {}
    for name, scores in references.items():
        score, difference = REFERENCES[name][:2]
        _, values[score], values[difference] = scores.clients[number]
        choice = run.progress.references[name][number].choice
        values |= {f"{score}_{part}": value for part, value in choice.items()}
    return values


def _serving(run: Orchestrator) -> dict[str, Any]:
    """Return the mean weights of an ensemble's members and its FLOPs, if any."""
    last = run.progress.history[-1] if run.progress.history else {}
    values = {name.removeprefix("serving/"): value for name, value in last.items() if name.startswith("serving/")}
    return {"serving": values} if values else {}


def _missing(run: Orchestrator, number: int) -> dict[str, list[str]]:
    """Return the names of the classes that a client's test split lacks."""
    labels = run.progress.missing_classes(number, run.task) if run.progress.has_metrics else []
    return {"missing_in_test": [run.data.samples.class_names[label] for label in labels]} if labels else {}


def _selected(run: Orchestrator, number: int) -> dict[str, Any]:
    """Return the round that a client deploys and its tuning score."""
    logs = run.progress.records[number].logs
    if run.spec.select_round == "last" or "selected/round" not in logs:
        return {}
    return {"selected_round": int(logs["selected/round"]), "tuning_score": logs["selected/score"]}


def _class_names(samples: Samples) -> dict[str, list[str]]:
    """Return the names of the classes; empty if they are numbers."""
    return {} if samples.has_numbered_classes else {"class_names": list(samples.class_names)}


def _compared(run: Orchestrator, rule: DoNoHarm, comparison: Comparison) -> dict[str, Any]:
    """Return a comparison; of classifiers also the samples that would decide."""
    values = asdict(comparison)
    deciding = values.pop("deciding")
    if rows := {row.pop("name"): row for row in values.pop("candidates")}:
        # A row has no evidence after the first candidate that failed.
        values["candidates"] = {name: row if row.pop("tested") else "not tested" for name, row in rows.items()}
    if deciding is not None:
        values["deciding_samples"] = deciding or None
    elif run.task == "classification" and rule.compares_samples and _has_test(rule, comparison):
        counts = comparison.worse, comparison.better, comparison.samples
        values["deciding_samples"] = deciding_samples(rule, *counts) if comparison.is_local else comparison.samples
    return values


def _has_test(rule: DoNoHarm, comparison: Comparison) -> bool:
    return rule.rule == "certified" and comparison.samples > 0


def _deployed(run: Orchestrator) -> dict[str, Any]:
    """Return scores and Delta of the deployed models; empty without do-no-harm."""
    if run.do_no_harm is None:
        return {}
    scores = run.progress.scores(run.metrics.primary, deployed=True)
    return {
        "deployed": {
            "rule": asdict(run.do_no_harm),
            **({} if METRICS[run.do_no_harm.metric].is_exact else {"asymptotic": True}),
            **({"grouped": True} if run.data.samples.group is not None else {}),
            "federated": run.progress.share_federated(),
            "mean": scores.mean,
            "worst": scores.worst,
            "delta": scores.delta,
        }
    }


def _privacy(run: Orchestrator) -> dict[str, Any]:
    """Return the account of epsilon per client; empty without noise."""
    if run.privacy is None:
        return {}
    rounds = [
        participants(run.options, run.num_clients, run.seed, round_idx) for round_idx in range(run.options.rounds)
    ]
    # A server that leaves out single updates reveals more than their mean.
    is_complete = [row["comm/updates"] for row in run.progress.history] == [len(numbers) for numbers in rounds]
    is_mean = run.method.supports_secure_mean and is_complete
    return {"privacy": run.privacy.account(rounds, run.num_clients, is_mean, run.engine.has_seeded_noise)}
