"""Results of a run: records of clients, metrics rows and the summary.

`Progress.scores` is the only place that computes Delta; metrics rows, deployed figures and the summary read from it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import fedekd
from fedekd.data import Samples
from fedekd.do_no_harm.rule import Comparison
from fedekd.early_exit.client_tradeoff import ExitTradeoff, mean_tradeoff
from fedekd.federation.engines.base import ClientResult
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.update_validation import is_log_name
from fedekd.metrics import negative_transfer, primary_metric
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
    """

    score: float
    supervised_rounds: int
    logs: dict[str, float]
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record of `asdict` values that were stored as JSON."""
        types: dict[str, Any] = {"tradeoff": ExitTradeoff, "comparison": Comparison}
        parts = {name: kind(**values[name]) for name, kind in types.items() if values.get(name) is not None}
        return cls(**{**values, **parts})


@dataclass
class Traffic:
    """Bytes and accepted updates since the last row."""

    bytes_up: int = 0
    bytes_down: int = 0
    updates: int = 0


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of all clients that have one, and Delta.

    Attributes:
        clients: Score, local baseline's score and Delta, by client number.
        mean: Mean score.
        worst: Worst score; NaN if a client has none.
        delta: `avg`, `worst` and the tail of Delta.
    """

    clients: dict[int, tuple[float, float, float]]
    mean: float
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
    names: list[str] = field(default_factory=list)

    def add_result(self, result: ClientResult) -> None:
        """Replace the record of a client, except a comparison that the round lacks."""
        before = self.records.get(result.client)
        comparison = result.comparison or (before.comparison if before else None)
        self.records[result.client] = ClientRecord(
            result.score, result.supervised_rounds, result.logs, result.tradeoff, comparison
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

    def scores(self, task: Task, deployed: bool = False) -> ScoreSummary:
        """Compute Delta of all clients that have a score.

        Args:
            task: Decides the metric and its direction.
            deployed: Count the local baseline's score for clients that deploy their local model. A client without a
                comparison deploys the federated one.
        """
        numbers = sorted(self.records)
        local = [self.local_score(number) for number in numbers]
        scores = [
            baseline if deployed and not self._deploys_federated(number) else self.records[number].score
            for number, baseline in zip(numbers, local, strict=True)
        ]
        delta = negative_transfer(scores, local, task)
        by_client = zip(scores, local, delta.pop("client").tolist(), strict=True)
        return ScoreSummary(
            clients=dict(zip(numbers, by_client, strict=True)),
            mean=sum(scores) / len(scores),
            worst=primary_metric(task).worst(scores),
            delta={name: float(value) for name, value in delta.items()},
        )

    def add_row(self, round_idx: int, task: Task) -> None:
        """Append the metrics row of a finished round, and reset the traffic."""
        metric, scores = primary_metric(task).name, self.scores(task)
        row: dict[str, float] = {"round": round_idx, **_columns(metric, scores)}
        logs = [self.records[number].logs for number in scores.clients]
        exit_names = dict.fromkeys(name for log in logs for name in log if name.startswith("exit"))
        for name in (*GATE_NAMES, *exit_names):
            values = [log[name] for log in logs if name in log]
            if values:
                row[name] = sum(values) / len(values)
        row |= {f"comm/{name}": value for name, value in asdict(self.traffic).items()}
        for number, (score, local, delta) in scores.clients.items():
            record = self.records[number]
            columns = {metric: score, "local": local, "delta": delta, **record.logs}
            if record.comparison is not None:
                comparison = asdict(record.comparison)
                columns["deployed/federated"] = float(comparison.pop("deployed") == "federated")
                columns |= {f"deployed/{name}": value for name, value in comparison.items()}
            prefix = client_prefix(number, self.names[number] if self.names else None)
            row |= {f"{prefix}{name}": value for name, value in columns.items()}
        if any(record.comparison is not None for record in self.records.values()):
            columns = {"federated": self.share_federated(), **_columns(metric, self.scores(task, deployed=True))}
            row |= {f"deployed/{name}": value for name, value in columns.items()}
        self.history.append(row)
        self.traffic = Traffic()

    def share_federated(self) -> float:
        """Return the share of clients that deploy the federated model."""
        return sum(map(self._deploys_federated, self.records)) / len(self.records)

    def _deploys_federated(self, number: int) -> bool:
        comparison = self.records[number].comparison
        return comparison is None or comparison.deployed == "federated"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, exact."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the progress of `to_json` values that were stored as JSON."""
        records = {int(number): ClientRecord.from_json(record) for number, record in values["records"].items()}
        local = {int(number): scores for number, scores in values["local"].items()}
        # Earlier versions stored any name that a site logged, also those that no file can hold.
        history = [{name: value for name, value in row.items() if _is_column(name)} for row in values["history"]]
        for record in records.values():
            record.logs = {name: value for name, value in record.logs.items() if is_log_name(name)}
        parts = {"history": history, "records": records, "local": local, "traffic": Traffic(**values["traffic"])}
        return cls(**{**values, **parts})


def _is_column(name: str) -> bool:
    """Return True for a log name, also with the client's prefix before it."""
    client, _, rest = name.partition("/")
    return is_log_name(rest if client.startswith("client_") else name)


def _columns(metric: str, scores: ScoreSummary) -> dict[str, float]:
    means = {f"{metric}/mean": scores.mean, f"{metric}/worst": scores.worst}
    return means | {f"delta/{name}": value for name, value in scores.delta.items()}


def summarize(run: Orchestrator) -> dict[str, Any]:
    """Return the summary of a finished run, the content of `summary.json`.

    All values except `seconds` and `versions` are repeatable.
    """
    scores, records = run.progress.scores(run.task), run.progress.records
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
            }
        )
        if run.do_no_harm is not None and comparison is not None:
            # NaN, where nothing was tested, is no JSON value.
            clients[-1] |= {name: None if value != value else value for name, value in asdict(comparison).items()}
    tradeoffs = [record.tradeoff for record in records.values() if record.tradeoff is not None]
    return {
        "dataset": run.data.samples.name,
        **({} if run.data.has_sites else {"alpha": run.data.alpha}),
        "seed": run.seed,
        "method": type(run.method).__name__,
        "task": run.task,
        "metric": primary_metric(run.task).name,
        "rounds": run.options.rounds,
        **_class_names(run.data.samples),
        "mean": scores.mean,
        "worst": scores.worst,
        "local_mean": sum(local for _, local, _ in scores.clients.values()) / len(clients),
        "delta": scores.delta,
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


def _class_names(samples: Samples) -> dict[str, list[str]]:
    """Return the names of the classes; empty if they are numbers."""
    names = list(samples.class_names)
    return {} if names == [str(label) for label in range(len(names))] else {"class_names": names}


def _deployed(run: Orchestrator) -> dict[str, Any]:
    """Return scores and Delta of the deployed models; empty without do-no-harm."""
    if run.do_no_harm is None:
        return {}
    scores = run.progress.scores(run.task, deployed=True)
    return {
        "deployed": {
            "rule": asdict(run.do_no_harm),
            "federated": run.progress.share_federated(),
            "mean": scores.mean,
            "worst": scores.worst,
            "delta": scores.delta,
        }
    }
