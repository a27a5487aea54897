"""What the orchestrator knows besides models: scores, history and traffic. It travels in the manifest as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from fedekd.do_no_harm.rule import Comparison
from fedekd.early_exit.client_tradeoff import ExitTradeoff
from fedekd.federation.engines.base import ClientResult
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.metrics import negative_transfer, primary_metric
from fedekd.tasks import Task

#: Quantities of which a row also holds the mean over clients, beside all that begin with `exit`.
GATE_NAMES = ("gate/weight_mean", "gate/weight_std", "gate/energy_mean")


def worst_score(scores: Sequence[float], task: Task) -> float:
    """The lowest accuracy or the highest error; NaN if a client has no score."""
    values = np.asarray(scores, dtype=np.float64)
    return float(values.min() if task == "classification" else values.max())


def _as_numbers(comparison: Comparison) -> dict[str, float]:
    """A comparison as a row holds it: `federated` is 1 where that model is deployed."""
    values = asdict(comparison)
    return {"federated": float(values.pop("deployed") == "federated"), **values}


@dataclass
class ClientRecord:
    """The newest that is known of a client.

    Attributes:
        score: Its score after it last absorbed.
        supervised_rounds: How many rounds of supervised training that took.
        logs: What absorbing recorded.
        tradeoff: Accuracy against cost of its network with exits, once the last round is over.
        comparison: Of its local model and the federated one, when it last looked.
    """

    score: float
    supervised_rounds: int
    logs: dict[str, float]
    tradeoff: ExitTradeoff | None = None
    comparison: Comparison | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`, after a journey through JSON."""
        parts: dict[str, Any] = {"tradeoff": ExitTradeoff, "comparison": Comparison}
        found = {name: part(**values[name]) for name, part in parts.items() if values.get(name) is not None}
        return cls(**{**values, **found})


@dataclass
class Traffic:
    """Bytes and updates since the last row."""

    bytes_up: int = 0
    bytes_down: int = 0
    updates: int = 0


@dataclass
class Progress:
    """Where a federation stands.

    Attributes:
        round_idx: The next round.
        history: A row for each finished round.
        records: By client number.
        traffic: Since the last row.
        bytes_up: In all.
        bytes_down: In all.
        seconds: Spent in all, over stops and resumes.
        local: Local's scores by client, as `LocalBaseline` has them; empty where the method is Local itself.
    """

    round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    records: dict[int, ClientRecord] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    local: dict[int, list[float]] = field(default_factory=dict)

    def add_result(self, visit: ClientResult) -> None:
        """Take in what a visit showed; what was found at the last look stays."""
        before = self.records.get(visit.client)
        comparison = visit.comparison or (before.comparison if before else None)
        self.records[visit.client] = ClientRecord(
            visit.score, visit.supervised_rounds, visit.logs, visit.tradeoff, comparison
        )

    def add_bytes_down(self, size: int) -> None:
        """Count bytes sent to a client."""
        self.traffic.bytes_down += size
        self.bytes_down += size

    def add_bytes_up(self, size: int) -> None:
        """Count bytes that arrived from a client."""
        self.traffic.bytes_up += size
        self.bytes_up += size

    def row(self, round_idx: int, task: Task) -> dict[str, float]:
        """The row of a finished round; closes the account of its traffic.

        Delta is against Local after the same number of supervised rounds. A client that has not taken part yet has
        no score, and is left out of the means.
        """
        name = primary_metric(task).name
        numbers = sorted(self.records)
        scores = [self.records[number].score for number in numbers]
        local = self.local_scores()
        delta = negative_transfer(scores, [local[number] for number in numbers], task)
        row: dict[str, float] = {
            "round": round_idx,
            f"{name}/mean": sum(scores) / len(scores),
            f"{name}/worst": worst_score(scores, task),
        }
        row |= {f"delta/{key}": float(value) for key, value in delta.items() if key != "client"}
        logs = [self.records[number].logs for number in numbers]
        recorded = dict.fromkeys(key for log in logs for key in log)
        for key in (*GATE_NAMES, *(key for key in recorded if key.startswith("exit"))):
            values = [log[key] for log in logs if key in log]
            if values:
                row[key] = sum(values) / len(values)
        row |= {f"comm/{key}": value for key, value in asdict(self.traffic).items()}
        for number, change in zip(numbers, delta["client"].tolist(), strict=True):
            record = self.records[number]
            row[f"client_{number}/{name}"] = record.score
            row[f"client_{number}/local"] = local[number]
            row[f"client_{number}/delta"] = change
            row |= {f"client_{number}/{key}": value for key, value in record.logs.items()}
            if record.comparison is not None:
                row |= {
                    f"client_{number}/deployed/{key}": value for key, value in _as_numbers(record.comparison).items()
                }
        if any(record.comparison is not None for record in self.records.values()):
            row |= {f"deployed/{key}": value for key, value in self.deployed(task).items()}
        self.history.append(row)
        self.traffic = Traffic()
        return row

    def deployed(self, task: Task) -> dict[str, float]:
        """Scores and Delta where every client uses what it keeps: the federated model, or the local one.

        A client that has not looked yet uses the federated one.
        """
        name, local, numbers = primary_metric(task).name, self.local_scores(), sorted(self.records)
        takes = [self._takes_federated(number) for number in numbers]
        scores = [self.records[n].score if taken else local[n] for n, taken in zip(numbers, takes, strict=True)]
        delta = negative_transfer(scores, [local[number] for number in numbers], task)
        return {
            "federated": sum(takes) / len(takes),
            f"{name}/mean": sum(scores) / len(scores),
            f"{name}/worst": worst_score(scores, task),
            **{f"delta/{key}": float(value) for key, value in delta.items() if key != "client"},
        }

    def _takes_federated(self, number: int) -> bool:
        comparison = self.records[number].comparison
        return comparison is None or comparison.deployed == "federated"

    def local_scores(self) -> dict[int, float]:
        """Local's score for each known client; its own where the method is Local itself."""
        if not self.local:
            return {number: record.score for number, record in self.records.items()}
        references = {number: LocalBaseline(scores) for number, scores in self.local.items()}
        return {number: references[number].after(record.supervised_rounds) for number, record in self.records.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values, exact."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`, after a journey through JSON."""
        records = {int(number): ClientRecord.from_json(record) for number, record in values["records"].items()}
        local = {int(number): scores for number, scores in values["local"].items()}
        return cls(**{**values, "records": records, "local": local, "traffic": Traffic(**values["traffic"])})
