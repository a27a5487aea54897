"""Decisions of do-no-harm rules from stored counts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.deployment.rules import RULES, DeploymentRule, decide, deployed, summary

RESULTS = Path(__file__).resolve().parents[2] / "results" / "do_no_harm" / "deployment"


def row(worse: int, better: int, accuracy: float = 0.8) -> dict[str, float]:
    counts = {"tuning": (0, 0, 50), "holdout": (worse, better, 50)}
    values = {f"{split}_{name}": value for split, of in counts.items() for name, value in zip(COUNTS, of, strict=True)}
    return {**values, "local": 0.7, "accuracy": accuracy}


COUNTS = ("worse", "better", "samples")


@pytest.mark.parametrize(
    ("first", "second", "model"),
    [
        (row(0, 10), row(0, 5), "a"),
        (row(0, 5), row(0, 10), "b"),
        (row(5, 5), row(0, 10), "local"),
        (row(0, 5), row(5, 5), "a"),
    ],
)
def test_decide_is_a_fixed_sequence(first: dict[str, float], second: dict[str, float], model: str) -> None:
    rule = DeploymentRule("", "unconditional", ("holdout",), ("a", "b"))
    assert decide(rule, 0.0, {"a": first, "b": second}) == model


def test_committed_summary_equals_its_counts() -> None:
    decisions = deployed(pd.read_csv(RESULTS / "counts.csv"), RULES[:1])
    expected = pd.read_csv(RESULTS / "summary.csv")
    assert list(expected["rule"].unique()) == [rule.title for rule in RULES]
    expected = expected[expected["rule"] == RULES[0].title].reset_index(drop=True)
    pd.testing.assert_frame_equal(summary(decisions), expected, rtol=1e-5, check_dtype=False)
