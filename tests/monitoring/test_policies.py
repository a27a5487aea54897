"""Hashes of exit policies, and what a start requires of a policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.policy import GroupExits
from fedekd.errors import UserError
from fedekd.monitoring import MonitorStart, Quantity
from fedekd.monitoring.policies import exit_limits, policy_hash, policy_hashes, policy_settings

INF, FLAGS = math.inf, (True, True, False)
POLICY = ExitPolicy((0.7, 0.8, -INF), (0.6, 0.8, -INF), FLAGS, 0.1, 0.9, "ltt", samples=50, network="ab" * 16)
GROUPS = (
    GroupExits("A", (0.7, INF, -INF), (0.7, INF, -INF), (True, False, False)),
    GroupExits("B", (0.5, 0.9, -INF), (0.5, 0.9, -INF), FLAGS),
)
GROUPED = replace(
    POLICY, thresholds=(INF, INF, -INF), search_bounds=(INF, INF, -INF), group_by="scanner", groups=GROUPS
)


@pytest.mark.parametrize("policy", [POLICY, GROUPED])
def test_policy_hashes_are_those_of_all_closed_policies(policy: ExitPolicy) -> None:
    """Exits that are closed in any order, after the policy was written and read."""
    allowed = policy_hashes(policy_settings(policy), exit_limits(policy))
    first, second = policy.close(0, "reason"), policy.close(1, "reason")
    both = first.close(1, "later"), second.close(0, "later")
    assert {policy_hash(ExitPolicy.from_json(each.to_json())) for each in (policy, first, second, *both)} == allowed
    assert len(allowed) == 4
    assert policy_hashes(None, ()) == {policy_hash(None)} == {"none"}


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": (0.71, 0.8, -INF)},
        {"search_bounds": (0.61, 0.8, -INF)},
        {"score": "entropy"},
        {"gamma": 2.0},
        {"network": "cd" * 16},
    ],
)
def test_policy_hash_depends_on_all_that_decides_exits(changes: dict[str, object]) -> None:
    other = policy_hash(replace(POLICY, **changes))
    assert other not in policy_hashes(policy_settings(POLICY), exit_limits(POLICY))


def test_policy_hash_depends_on_groups_and_their_limits() -> None:
    renamed = replace(GROUPED, groups=(replace(GROUPS[0], name="C"), GROUPS[1]))
    moved = replace(GROUPED, groups=(GROUPS[0], replace(GROUPS[1], search_bounds=(0.4, 0.9, -INF))))
    assert len({policy_hash(each) for each in (GROUPED, renamed, moved)}) == 3


@pytest.mark.parametrize(
    "changes", [{"target_risk": 0.2}, {"confidence": 0.8}, {"mode": "naive"}, {"samples": 51}, {"unit": "patient"}]
)
def test_require_policy_of_another_guarantee_raises(changes: dict[str, object]) -> None:
    """Equal thresholds do not suffice."""
    settings = {"policy": policy_settings(POLICY), "limits": exit_limits(POLICY)}
    start = MonitorStart(
        "classification", 0, "", "ab" * 16, True, (Quantity("exit", "exit 1", 0.1, 1),), 0.9, **settings
    )
    start.require_policy(POLICY)
    start.require_policy(POLICY.close(0, "reason"))
    with pytest.raises(UserError, match=f"policy: expected {next(iter(changes))} "):
        start.require_policy(replace(POLICY, **changes))
    with pytest.raises(UserError, match="expected the thresholds"):
        start.require_policy(replace(POLICY, closed=("reason", "", "")))
