"""Results of a run: records of clients and metrics rows.

`Progress.scores` is the only place that computes Delta; metrics rows, deployed figures and the summary read from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fedekd.data import Samples
from fedekd.do_no_harm.rule import Comparison
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.federation.engines.base import ClientResult
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.references import ReferenceScores
from fedekd.federation.stored_rows import pack_rows, unpack_rows
from fedekd.metrics import (
    MetricSpec,
    column_names,
    is_undefined,
    metric_keys,
    missing_classes,
    negative_transfer,
    select_metrics,
)
from fedekd.reporting.rows import REFERENCES, client_prefix
from fedekd.tasks import Task

#: Quantities whose mean over clients is in the row, in addition to those that begin with `exit` or `serving/`.
GATE_NAMES = ("gate/weight_mean", "gate/weight_std", "gate/energy_mean")


@dataclass
class ClientRecord:
    """Latest result of a client.

    Attributes:
        round: Round of that result.
        score: Test score after it last received.
        supervised_rounds: Rounds of supervised training up to that score.
        logs: Scalars of the method.
        tradeoff: Accuracy against cost of a network with exits, after the last round.
        comparison: Latest do-no-harm comparison.
        metrics: All metrics of that scoring by key; an engine may leave it empty.
        deployed_metrics: Those of the candidate of `comparison`; empty without one.
    """

    score: float
    supervised_rounds: int
    logs: dict[str, float]
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    round: int = 0
    deployed_metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record of `asdict` values that were stored as JSON."""
        types: dict[str, Any] = {"tradeoff": ExitTradeoff, "comparison": Comparison}
        parts = {name: kind(**values[name]) for name, kind in types.items() if values.get(name) is not None}
        return cls(**{**values, **parts})


class ReportedMetrics:
    """Metrics that a run reports.

    Args:
        names: Option `metrics`; None for all of the task.
        samples: Task, and names of the classes.

    Attributes:
        are_chosen: True if they are not the default.
        rows: The metrics, the primary one first.
        others: For each value of the other metrics, by key: the name of its columns, and the metric.

    Raises:
        UserError: If a name is not a metric of these samples.
    """

    def __init__(self, names: Sequence[str] | None, samples: Samples) -> None:
        self.are_chosen = names is not None
        self.rows = select_metrics(names, samples.task, samples.num_classes)
        columns = column_names(self.rows[1:], samples.class_names)
        keys = metric_keys(self.rows[1:], samples.num_classes)
        self.others = {key: (columns[key], row) for key, row in keys.items()}

    @property
    def primary(self) -> MetricSpec:
        """Metric of the score, by which Delta is computed."""
        return self.rows[0]


@dataclass
class Traffic:
    """Bytes and accepted updates since the last row."""

    bytes_up: int = 0
    bytes_down: int = 0
    updates: int = 0


@dataclass(frozen=True)
class ScoreSummary:
    """One metric of all clients that have a score, and its Delta.

    The figures over clients leave out clients whose test split has no value of the metric, for example because it lacks
    a class. They are NaN if another client has non-finite outputs, or if no client has a value.

    Attributes:
        clients: Score, local baseline's score and Delta, by client number.
        counted: Number of clients in the figures below.
        mean: Mean score.
        local_mean: Mean score of the local baselines.
        worst: Worst score.
        delta: `avg`, `worst` and the tail of Delta.
    """

    clients: dict[int, tuple[float, float, float]]
    counted: int
    mean: float
    local_mean: float
    worst: float
    delta: dict[str, float]


@dataclass
class Progress:
    """State of a run without models, saved as JSON in the manifest.

    Attributes:
        round: Next round.
        history: Metrics row of each finished round.
        records: Latest result by client number.
        traffic: Since the last row.
        bytes_up: Total.
        bytes_down: Total.
        seconds: Time of the rounds without the baselines, over stops and resumes.
        local: Scores of the local baseline per round, by client; empty if the method is Local itself.
        local_metrics: All metrics of the local baseline per round, by client; empty if the method is Local itself. An
            engine may leave it empty.
        names: Names of the sites that are the clients, in the order of their numbers; empty without sites.
        references: Scores of further references of each client, by kind: `control`, `tuned`.
    """

    round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    records: dict[int, ClientRecord] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    local: dict[int, list[float]] = field(default_factory=dict)
    local_metrics: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    references: dict[str, dict[int, ReferenceScores]] = field(default_factory=dict)

    def add_result(self, result: ClientResult, round_idx: int) -> None:
        """Replace the record of a client, except a comparison that the round lacks."""
        before = self.records.get(result.client)
        comparison, deployed = result.comparison, result.deployed_metrics
        if comparison is None and before is not None:
            comparison, deployed = before.comparison, before.deployed_metrics
        values = result.score, result.supervised_rounds, result.logs, result.tradeoff, comparison, result.metrics
        self.records[result.client] = ClientRecord(*values, round_idx, deployed)

    def add_bytes_down(self, size: int) -> None:
        """Count bytes sent to a client."""
        self.traffic.bytes_down += size
        self.bytes_down += size

    def add_bytes_up(self, size: int) -> None:
        """Count bytes received from a client."""
        self.traffic.bytes_up += size
        self.bytes_up += size

    def local_score(self, number: int) -> float:
        """Return the local baseline's score after the client's supervised rounds."""
        record = self.records[number]
        return LocalBaseline(self.local[number]).after(record.supervised_rounds) if self.local else record.score

    @property
    def has_metrics(self) -> bool:
        """True if clients and local baselines have all metrics.

        Engines of users may have scores only.
        """
        return bool(self.local_metrics or not self.local) and any(record.metrics for record in self.records.values())

    def local_values(self, number: int) -> dict[str, float]:
        """Return all metrics of the local baseline after the client's supervised rounds."""
        record = self.records[number]
        if not self.local:
            return record.metrics
        return LocalBaseline([], metrics=self.local_metrics.get(number, [])).metrics_after(record.supervised_rounds)

    def reference_values(self, number: int, reference: str) -> dict[str, float]:
        """Return all metrics of a reference after the round of the client's score."""
        return self.references[reference][number].after(self.records[number].round)

    def reference_delta(self, metric: MetricSpec, reference: str) -> dict[str, float]:
        """Compute Delta of a reference against the local baseline: `avg`, `worst`, tail."""
        numbers = [n for n in sorted(self.records) if not self._is_undefined(n, metric, metric.name)]
        parts = ("avg", "worst", metric.tail)
        if not numbers:
            return dict.fromkeys(parts, math.nan)
        scores = [self.reference_values(number, reference).get(metric.name, math.nan) for number in numbers]
        delta = negative_transfer(scores, [self.local_score(number) for number in numbers], metric=metric)
        return {name: float(delta[name]) for name in parts}

    def scores(
        self, metric: MetricSpec, key: str | None = None, deployed: bool = False, reference: str | None = None
    ) -> ScoreSummary:
        """Compute Delta of all clients that have a score.

        Args:
            metric: Metric, which decides the direction.
            key: Key of another value than the score, such as `recall/0`; None is the score of the primary metric.
            deployed: Count the local baseline's score for clients that deploy their local model. A client without a
                comparison deploys the federated one.
            reference: Compare with this reference in place of the local baseline.
        """
        numbers = sorted(self.records)
        if reference is not None:
            name = key or metric.name
            local = [self.reference_values(number, reference).get(name, math.nan) for number in numbers]
            scores = [self.records[number].metrics.get(name, math.nan) for number in numbers]
        elif key is None:
            local = [self.local_score(number) for number in numbers]
            scores = [self.records[number].score for number in numbers]
        else:
            local = [self.local_values(number).get(key, math.nan) for number in numbers]
            scores = [self.records[number].metrics.get(key, math.nan) for number in numbers]
        if deployed:
            scores = [
                self._deployed_score(number, key or metric.name, score, baseline)
                for number, baseline, score in zip(numbers, local, scores, strict=True)
            ]
        counted = [
            (score, baseline)
            for number, baseline, score in zip(numbers, local, scores, strict=True)
            if not self._is_undefined(number, metric, key or metric.name)
        ]
        own, others = [score for score, _ in counted], [baseline for _, baseline in counted]
        of_clients = negative_transfer(scores, local, metric=metric)["client"].tolist()
        nan = {name: math.nan for name in ("avg", "worst", metric.tail)}
        delta = negative_transfer(own, others, metric=metric) if counted else nan
        return ScoreSummary(
            clients=dict(zip(numbers, zip(scores, local, of_clients, strict=True), strict=True)),
            counted=len(counted),
            mean=sum(own) / len(own) if counted else math.nan,
            local_mean=sum(others) / len(others) if counted else math.nan,
            worst=metric.worst(own),
            delta={name: float(delta[name]) for name in nan},
        )

    def undefined_clients(self, metric: MetricSpec, key: str) -> list[int]:
        """Return the clients whose test split has no value of a metric."""
        return [number for number in sorted(self.records) if self._is_undefined(number, metric, key)]

    def missing_classes(self, number: int, task: Task) -> list[int]:
        """Return the classes that a client's test split lacks, as its metrics show."""
        return missing_classes(task, self.records[number].metrics, self.local_values(number))

    def _is_undefined(self, number: int, metric: MetricSpec, key: str) -> bool:
        return is_undefined(key, metric.task, self.records[number].metrics, self.local_values(number))

    def add_row(self, round_idx: int, reported: ReportedMetrics) -> None:
        """Append the metrics row of a finished round, and reset the traffic."""
        primary = reported.primary
        metric, scores = primary.name, self.scores(primary)
        others = self.other_scores(reported)
        row: dict[str, float] = {"round": round_idx, **_columns(metric, scores)}
        for name, summary in others.items():
            row |= _columns(name, summary, f"delta/{name}")
        row |= self._log_means(primary)
        references = {name: self.scores(primary, reference=name) for name in self.references}
        for name, summary in references.items():
            score_column, difference, *_ = REFERENCES[name]
            row[f"{difference}/{score_column}_mean"] = summary.local_mean
            row |= {f"{difference}/{part}": value for part, value in summary.delta.items()}
        row |= {f"comm/{name}": value for name, value in asdict(self.traffic).items()}
        for number, (score, local, delta) in scores.clients.items():
            record = self.records[number]
            columns = {metric: score, "local": local, "delta": delta, **record.logs}
            if record.comparison is not None:
                columns |= {f"deployed/{name}": value for name, value in record.comparison.scalars().items()}
            for name, summary in others.items():
                columns |= dict(zip((name, f"local/{name}", f"delta/{name}"), summary.clients[number], strict=True))
            for name, summary in references.items():
                columns |= dict(zip(REFERENCES[name][:2], summary.clients[number][1:], strict=True))
            prefix = client_prefix(number, self.names[number] if self.names else None)
            row |= {f"{prefix}{name}": value for name, value in columns.items()}
        if any(record.comparison is not None for record in self.records.values()):
            columns = {"federated": self.share_federated(), **_columns(metric, self.scores(primary, deployed=True))}
            row |= {f"deployed/{name}": value for name, value in columns.items()}
        self.history.append(row)
        self.traffic = Traffic()

    def _log_means(self, primary: MetricSpec) -> dict[str, float]:
        """Return the means of logged scalars over the clients that have them.

        The scores of the exits leave out the clients whose test split has no value of the primary metric.
        """
        logs = {number: record.logs for number, record in sorted(self.records.items())}
        undefined = self.undefined_clients(primary, primary.name)
        averaged = dict.fromkeys(name for log in logs.values() for name in log if name.startswith(("exit", "serving/")))
        means = {}
        for name in (*GATE_NAMES, *averaged):
            left_out = undefined if name.endswith(f"/{primary.name}") else []
            values = [log[name] for number, log in logs.items() if name in log and number not in left_out]
            if values:
                means[name] = sum(values) / len(values)
            elif any(name in log for log in logs.values()):
                means[name] = math.nan
        return means

    def other_scores(self, reported: ReportedMetrics) -> dict[str, ScoreSummary]:
        """Return the scores of all reported metrics but the primary one, by column."""
        if not self.has_metrics:
            return {}
        return {name: self.scores(metric, key) for key, (name, metric) in reported.others.items()}

    def share_federated(self) -> float:
        """Return the share of clients that deploy the federated model, or a candidate."""
        return sum(map(self._deploys_federated, self.records)) / len(self.records)

    def _deploys_federated(self, number: int) -> bool:
        comparison = self.records[number].comparison
        return comparison is None or not comparison.is_local

    def _deployed_score(self, number: int, key: str, score: float, baseline: float) -> float:
        """Return the score of the deployed model of a client."""
        if not self._deploys_federated(number):
            return baseline
        metrics = self.records[number].deployed_metrics
        return metrics.get(key, math.nan) if metrics else score

    def to_json(self) -> dict[str, Any]:
        """Return plain values, exact."""
        metrics = {number: pack_rows(rows) for number, rows in self.local_metrics.items()}
        values = asdict(replace(self, history=[], local_metrics={}, references={}))
        references = {
            kind: {
                number: {**asdict(scores), "metrics": pack_rows(scores.metrics)} for number, scores in clients.items()
            }
            for kind, clients in self.references.items()
        }
        return values | {"history": pack_rows(self.history), "local_metrics": metrics, "references": references}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the progress of `to_json` values that were stored as JSON."""
        records = {int(number): ClientRecord.from_json(record) for number, record in values["records"].items()}
        parts = {
            "history": unpack_rows(values["history"]),
            "records": records,
            "local": {int(number): scores for number, scores in values["local"].items()},
            "local_metrics": {int(number): unpack_rows(rows) for number, rows in values["local_metrics"].items()},
            "references": {
                kind: {int(number): _reference_scores(scores) for number, scores in clients.items()}
                for kind, clients in values["references"].items()
            },
            "traffic": Traffic(**values["traffic"]),
        }
        return cls(**{**values, **parts})


def _reference_scores(values: Mapping[str, Any]) -> ReferenceScores:
    return ReferenceScores(tuple(values["rounds"]), unpack_rows(values["metrics"]), values["choice"])


def _columns(metric: str, scores: ScoreSummary, delta: str = "delta") -> dict[str, float]:
    means = {f"{metric}/mean": scores.mean, f"{metric}/worst": scores.worst}
    return means | {f"{delta}/{name}": value for name, value in scores.delta.items()}
