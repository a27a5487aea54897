"""Results of a run: records of clients, metrics rows and the summary.

`Progress.scores` is the only place that computes Delta; metrics rows, deployed figures and the summary read from it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import fedekd
from fedekd.data import Samples
from fedekd.do_no_harm.rule import Comparison
from fedekd.early_exit.client_tradeoff import ExitTradeoff, mean_tradeoff
from fedekd.federation.engines.base import ClientResult
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.stored_rows import pack_rows, unpack_rows
from fedekd.federation.update_validation import is_log_name
from fedekd.metrics import (
    MetricSpec,
    column_names,
    is_undefined,
    metric_keys,
    missing_classes,
    negative_transfer,
    select_metrics,
)
from fedekd.reporting.rows import client_prefix
from fedekd.tasks import Task

if TYPE_CHECKING:
    from fedekd.federation.orchestrator import Orchestrator

#: Quantities whose mean over clients is in the row, in addition to those that begin with `exit`.
GATE_NAMES = ("gate/weight_mean", "gate/weight_std", "gate/energy_mean")


@dataclass
class ClientRecord:
    """Latest result of a client.

    Attributes:
        score: Test score after it last received.
        supervised_rounds: Rounds of supervised training up to that score.
        logs: Scalars of the method.
        tradeoff: Accuracy against cost of a network with exits, after the last round.
        comparison: Latest do-no-harm comparison.
        metrics: All metrics of that scoring by key; empty in records of earlier versions.
    """

    score: float
    supervised_rounds: int
    logs: dict[str, float]
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None
    metrics: dict[str, float] = field(default_factory=dict)

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
        others: By key of each value of the others: the name of its columns, and the metric.

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

    The figures over clients leave out those whose test split has no value of the metric, for example because it lacks
    a class. Outputs that are not finite make them NaN elsewhere, and so does a metric that no client has.

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
        seconds: Total, over stops and resumes.
        local: Scores of the local baseline per round, by client; empty if the method is Local itself.
        local_metrics: All metrics of the local baseline per round, by client; empty if the method is Local itself, and
            in runs of earlier versions.
        names: Names of the sites that are the clients, in the order of their numbers; empty without sites.
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

    def add_result(self, result: ClientResult) -> None:
        """Replace the record of a client, except a comparison that the round lacks."""
        before = self.records.get(result.client)
        comparison = result.comparison or (before.comparison if before else None)
        self.records[result.client] = ClientRecord(
            result.score, result.supervised_rounds, result.logs, result.tradeoff, comparison, result.metrics
        )

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

        Runs of earlier versions, and engines of users, may have scores only.
        """
        return bool(self.local_metrics or not self.local) and any(record.metrics for record in self.records.values())

    def local_values(self, number: int) -> dict[str, float]:
        """Return all metrics of the local baseline after the client's supervised rounds."""
        record = self.records[number]
        if not self.local:
            return record.metrics
        return LocalBaseline([], metrics=self.local_metrics.get(number, [])).metrics_after(record.supervised_rounds)

    def scores(self, metric: MetricSpec, key: str | None = None, deployed: bool = False) -> ScoreSummary:
        """Compute Delta of all clients that have a score.

        Args:
            metric: Metric, which decides the direction.
            key: Key of another value than the score, such as `recall/0`; None is the score of the primary metric.
            deployed: Count the local baseline's score for clients that deploy their local model. A client without a
                comparison deploys the federated one.
        """
        numbers = sorted(self.records)
        if key is None:
            local = [self.local_score(number) for number in numbers]
            scores = [self.records[number].score for number in numbers]
        else:
            local = [self.local_values(number).get(key, math.nan) for number in numbers]
            scores = [self.records[number].metrics.get(key, math.nan) for number in numbers]
        scores = [
            baseline if deployed and not self._deploys_federated(number) else score
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
        row |= {f"comm/{name}": value for name, value in asdict(self.traffic).items()}
        for number, (score, local, delta) in scores.clients.items():
            record = self.records[number]
            columns = {metric: score, "local": local, "delta": delta, **record.logs}
            if record.comparison is not None:
                comparison = asdict(record.comparison)
                columns["deployed/federated"] = float(comparison.pop("deployed") == "federated")
                columns |= {f"deployed/{name}": value for name, value in comparison.items()}
            for name, summary in others.items():
                columns |= dict(zip((name, f"local/{name}", f"delta/{name}"), summary.clients[number], strict=True))
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
        exit_names = dict.fromkeys(name for log in logs.values() for name in log if name.startswith("exit"))
        means = {}
        for name in (*GATE_NAMES, *exit_names):
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
        """Return the share of clients that deploy the federated model."""
        return sum(map(self._deploys_federated, self.records)) / len(self.records)

    def _deploys_federated(self, number: int) -> bool:
        comparison = self.records[number].comparison
        return comparison is None or comparison.deployed == "federated"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, exact."""
        metrics = {number: pack_rows(rows) for number, rows in self.local_metrics.items()}
        values = asdict(replace(self, history=[], local_metrics={}))
        return values | {"history": pack_rows(self.history), "local_metrics": metrics}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the progress of `to_json` values that were stored as JSON."""
        records = {int(number): ClientRecord.from_json(record) for number, record in values["records"].items()}
        local = {int(number): scores for number, scores in values.get("local", {}).items()}
        local_metrics = {int(number): unpack_rows(rows) for number, rows in values.get("local_metrics", {}).items()}
        rows = unpack_rows(values["history"])
        # Earlier versions stored any name that a site logged, also those that no file can hold.
        history = [{name: value for name, value in row.items() if _is_column(name)} for row in rows]
        for record in records.values():
            record.logs = {name: value for name, value in record.logs.items() if is_log_name(name)}
        parts = {
            "history": history,
            "records": records,
            "local": local,
            "local_metrics": local_metrics,
            "traffic": Traffic(**values["traffic"]),
        }
        return cls(**{**values, **parts})


def _is_column(name: str) -> bool:
    """Return True for a log name, also with the client's prefix before it."""
    client, _, rest = name.partition("/")
    return is_log_name(rest if client.startswith("client_") else name)


def _columns(metric: str, scores: ScoreSummary, delta: str = "delta") -> dict[str, float]:
    means = {f"{metric}/mean": scores.mean, f"{metric}/worst": scores.worst}
    return means | {f"{delta}/{name}": value for name, value in scores.delta.items()}


def summarize(run: Orchestrator) -> dict[str, Any]:
    """Return the summary of a finished run, the content of `summary.json`.

    All values except `seconds` and `versions` are repeatable; undefined ones are None.
    """
    return {name: _json_value(value) for name, value in _summary(run).items()}


def _summary(run: Orchestrator) -> dict[str, Any]:
    """Return the summary with NaN where a value is undefined."""
    primary, records = run.metrics.primary, run.progress.records
    scores, others = run.progress.scores(primary), run.progress.other_scores(run.metrics)
    counts = run.data.class_counts()
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
                **_missing(run, number),
            }
        )
        if run.do_no_harm is not None and comparison is not None:
            clients[-1] |= asdict(comparison)
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
        "clients": clients,
        **_deployed(run),
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


def _missing(run: Orchestrator, number: int) -> dict[str, list[str]]:
    """Return the names of the classes that a client's test split lacks."""
    labels = run.progress.missing_classes(number, run.task) if run.progress.has_metrics else []
    return {"missing_in_test": [run.data.samples.class_names[label] for label in labels]} if labels else {}


def _class_names(samples: Samples) -> dict[str, list[str]]:
    """Return the names of the classes; empty if they are numbers."""
    return {} if samples.has_numbered_classes else {"class_names": list(samples.class_names)}


def _deployed(run: Orchestrator) -> dict[str, Any]:
    """Return scores and Delta of the deployed models; empty without do-no-harm."""
    if run.do_no_harm is None:
        return {}
    scores = run.progress.scores(run.metrics.primary, deployed=True)
    return {
        "deployed": {
            "rule": asdict(run.do_no_harm),
            "federated": run.progress.share_federated(),
            "mean": scores.mean,
            "worst": scores.worst,
            "delta": scores.delta,
        }
    }
