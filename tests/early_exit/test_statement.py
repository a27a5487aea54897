"""The guarantee of a policy in words: each field of the policy is in it, and limits are stated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.do_no_harm.statement import do_no_harm_guarantee
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.policy import GroupExits
from fedekd.early_exit.statement import closed_exits, exit_guarantee, percent, why_closed

INF = math.inf
POLICY = ExitPolicy(
    (0.9, INF, -INF), (0.8, INF, -INF), (True, False, False), 0.05, 0.9, "ltt", samples=400, tuning_samples=390
)


def grouped(by: str, shared: bool, *limits: float) -> ExitPolicy:
    groups = tuple(
        GroupExits(name, (limit, INF, -INF), (limit, INF, -INF), (limit < INF, False, False), 50)
        for name, limit in zip("ABC", limits, strict=False)
    )
    top = (limits[0] if shared else INF, INF, -INF)
    return replace(
        POLICY,
        thresholds=top,
        search_bounds=top,
        certified=(shared, False, False),
        group_by=by,
        groups=groups,
        shared_thresholds=shared,
    )


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (POLICY, ["at least 0.9 over the draw of 400", "exit 1 is at most 0.05", "Assumed:", "390 other", "Void:"]),
        (replace(POLICY, simultaneous_clients=6), ["of each of 6 clients at once"]),
        (replace(POLICY, unit="patient"), ["one per patient", "a random sample of a random patient"]),
        (grouped("scanner", False, 0.9, 0.8, INF), ["of each group, scanner A and B,", "in all groups at once"]),
        (grouped("scanner", False, 0.9, 0.8).for_group("B"), ["the samples with scanner B that take exit 1 is"]),
        (grouped("scanner", False, 0.9, 0.8), ["Void: for samples of other groups, for other devices"]),
        (grouped("true_class", True, 0.9, 0.9), ["of each true class (A and B)", "unknown at deployment"]),
        (grouped("predicted_class", False, 0.9, INF), ["that the exit predicts as a class, for each class (A)"]),
        (
            replace(POLICY, thresholds=(INF, INF, -INF), certified=(False,) * 3),
            ["exits before the last are closed"],
        ),
        (replace(POLICY, mode="crc", certified=(False,) * 3), ["No guarantee: mode crc has none"]),
    ],
)
def test_exit_guarantee_states_the_fields_of_the_policy(policy: ExitPolicy, parts: list[str]) -> None:
    text = exit_guarantee(policy)
    assert [part for part in parts if part.replace(" and ", ", ") not in text.replace(" and ", ", ")] == []
    assert "\n" not in text


def test_exit_guarantee_of_one_covered_group_is_not_of_all_at_once() -> None:
    assert "at once" not in exit_guarantee(grouped("scanner", False, 0.9, INF))
    assert "of other" not in exit_guarantee(POLICY)


def test_exit_guarantee_lists_the_groups_of_each_exit_where_they_differ() -> None:
    policy = grouped("scanner", False, 0.9, 0.8)
    first, second = policy.groups
    second = replace(second, thresholds=(0.8, 0.7, -INF), search_bounds=(0.8, 0.7, -INF), certified=(True, True, False))
    assert "take each of the exits 1 (A, B) and 2 (B) is at most" in exit_guarantee(
        replace(policy, groups=(first, second))
    )


def test_exit_guarantee_without_unit_of_grouped_data_claims_no_independent_draws() -> None:
    text = exit_guarantee(POLICY, is_grouped=True)
    assert "Not valid: samples of one group, such as a patient, were counted as independent" in text
    assert "independent draws" not in text
    by_patient = replace(POLICY, unit="patient")
    assert exit_guarantee(by_patient, is_grouped=True) == exit_guarantee(by_patient)


@pytest.mark.parametrize(
    ("bound", "estimate", "words"),
    [
        (INF, 90, "at least about 90 calibration samples of group A are needed, there are 70"),
        (INF, 60, "no threshold was expected to pass, by the tuning samples of group A"),
        (0.8, None, "the first test failed"),
        (INF, None, "no threshold reaches error rate"),
    ],
)
def test_why_closed_compares_the_samples_of_the_group_at_the_exit(
    bound: float, estimate: int | None, words: str
) -> None:
    policy = replace(
        POLICY,
        thresholds=(INF, INF, -INF),
        search_bounds=(bound, INF, -INF),
        certified=(False,) * 3,
        samples=50,  # of a predicted class those that exit as it
        required_samples=(estimate, None, None),
        tested_samples=(70, 60, 50),
    )
    assert words in why_closed(policy, 0, "A")


def test_exit_guarantee_names_only_covered_groups() -> None:
    text = exit_guarantee(grouped("scanner", False, 0.9, 0.8, INF))
    assert "C" not in text.partition("Population")[0].partition("scanner")[2].partition(" that take")[0]


def test_closed_exits_names_exits_groups_and_options() -> None:
    assert closed_exits(POLICY).startswith("closed: exit 2. To open: raise --target_risk")
    assert closed_exits(grouped("scanner", False, 0.9, INF)).startswith("closed: exit 1 for scanner B; exit 2. To open")
    assert closed_exits(replace(POLICY, thresholds=(0.9, 0.9, -INF), search_bounds=(0.9, 0.9, -INF))) == ""


def test_closed_exits_after_an_alarm_names_the_reason_and_no_option() -> None:
    closed = replace(POLICY, thresholds=(0.9, 0.9, -INF), search_bounds=(0.9, 0.9, -INF)).close(0, "monitor: alarm")
    assert closed_exits(closed) == "closed after the calibration: exit 1 (monitor: alarm)"


def test_percent_rounded_zero_has_no_sign() -> None:
    assert [percent(value) for value in (-0.0001, 0.0, -0.02, 0.5)] == ["0.0%", "0.0%", "-2.0%", "50.0%"]


def test_do_no_harm_guarantee_states_the_rule_and_the_unit() -> None:
    text = do_no_harm_guarantee(DoNoHarm(confidence=0.95, margin=0.01), "classification", 300, is_grouped=True)
    for part in (
        "at least 0.95 over the 300 compared samples, at most one of each group such as a patient:",
        "accuracy is lower by 0.01 or more",
    ):
        assert part in text
    counted = do_no_harm_guarantee(DoNoHarm(unit="sample"), "classification", 300, is_grouped=True)
    assert "Samples of one group, such as a patient, are counted as independent: this must be so." in counted
    assert "patient" not in do_no_harm_guarantee(DoNoHarm(), "regression")
    clipped = "mean squared error, each difference of squared errors clipped to ±1, is larger than"
    assert clipped in do_no_harm_guarantee(DoNoHarm(), "regression")


def test_do_no_harm_guarantee_names_candidates_and_asymptotic_metrics() -> None:
    rule = DoNoHarm(candidates=("ensemble", "tuned"), metric="auroc_delong", margin=0.02)
    text = do_no_harm_guarantee(rule, "classification", 40)
    assert "deploys none of the models ensemble, tuned whose AUROC is lower by 0.02 or more" in text
    assert "the 40 compared samples: a client" in text
    assert "asymptotic" in text
    assert "AUROC is the mean over the client's classes of one against the rest" in text
    exact = do_no_harm_guarantee(DoNoHarm(metric="auroc"), "classification", 7)
    assert "the 7 compared disjoint sets of samples with at least one of each class: a client" in exact
    assert "recall of a class is lower" in do_no_harm_guarantee(DoNoHarm(metric="recall"), "classification")
