"""Sample runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_summary() -> Callable[..., dict[str, Any]]:
    """Builds a summary from (local, method) scores, one pair per client."""

    def make(*scores: tuple[float, float], metric: str = "accuracy") -> dict[str, Any]:
        deltas = [method - local for local, method in scores]
        worst = min if metric == "accuracy" else max
        return {
            "dataset": "digits",
            "alpha": 0.1,
            "seed": 0,
            "method": "FedeKD",
            "task": "classification" if metric == "accuracy" else "regression",
            "metric": metric,
            "rounds": 2,
            "mean": sum(method for _, method in scores) / len(scores),
            "worst": worst(method for _, method in scores),
            "local_mean": sum(local for local, _ in scores) / len(scores),
            "delta": {
                "avg": sum(deltas) / len(deltas),
                "worst": worst(deltas),
                "p10" if metric == "accuracy" else "p90": worst(deltas) / 2,
            },
            "clients": [
                {
                    "client": client,
                    "train": 100 + client,
                    "test": 30 + client,
                    "classes": [0, 1, 2, client + 4],
                    "local": local,
                    "score": method,
                    "delta": method - local,
                }
                for client, (local, method) in enumerate(scores)
            ],
            "seconds": 1.5,
            "bytes_up": 1024,
            "bytes_down": 2048,
            "versions": {"torch": "2"},
        }

    return make


@pytest.fixture
def make_row() -> Callable[[int], dict[str, float]]:
    """Builds a row of a run with two clients; every value differs between rounds."""

    def make(round_idx: int) -> dict[str, float]:
        return {
            "round": round_idx,
            "accuracy/mean": 0.5 + round_idx / 30,
            "delta/avg": round_idx / 70,
            "delta/worst": -1 / (3 * round_idx),
            "client_0/accuracy": 0.4 + round_idx / 30,
            "client_1/accuracy": 0.6 + round_idx / 30,
            "client_0/gate/weight_mean": 0.5 - round_idx / 90,
            "client_1/gate/weight_mean": 0.5 + round_idx / 90,
            "gate/weight_mean": 0.5,
            "comm/bytes_up": 1000 * round_idx,
        }

    return make
