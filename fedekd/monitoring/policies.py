"""Identity of the exit policy under which a row was predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any

from fedekd.atomic import digest
from fedekd.early_exit.policy import ExitPolicy, GroupExits

#: Hexadecimal digits of the columns `model` and `policy`.
_DIGITS = 12

#: Value of the column `policy` without an exit policy.
NO_POLICY = "none"

#: Fields that decide, with the limits, which exit a sample takes.
_DECISIVE = ("network", "proxy", "score", "gamma", "group_by", "shared_thresholds")

#: Fields of the guarantee.
_GUARANTEE = ("target_risk", "confidence", "mode", "samples", "tuning_samples", "simultaneous_clients", "unit")

Rows = tuple[tuple[float, ...], ...]


def exit_limits(policy: ExitPolicy) -> Rows:
    """Return thresholds and search bounds, of the policy and of each group."""
    parts: tuple[ExitPolicy | GroupExits, ...] = (policy, *policy.groups)
    return tuple(row for part in parts for row in (part.thresholds, part.search_bounds))


def with_closed(limits: Rows, exits: tuple[int, ...]) -> Rows:
    """Return the limits with some exits closed, as `ExitPolicy.close` does."""
    return tuple(
        row if index % 2 else tuple(math.inf if e in exits else value for e, value in enumerate(row))
        for index, row in enumerate(limits)
    )


def policy_settings(policy: ExitPolicy) -> dict[str, Any]:
    """Return the fields, except limits, that closing an exit keeps, as JSON."""
    values = {name: getattr(policy, name) for name in (*_DECISIVE, *_GUARANTEE)}
    return values | {"groups": [group.name for group in policy.groups]}


def short_hash(sha256: str) -> str:
    """Return `h` and the first 12 digits of a hash.

    Without the letter a reader of CSV files takes hashes of digits, or of digits and one `e`, for numbers.
    """
    return f"h{sha256[:_DIGITS]}"


def policy_hash(policy: ExitPolicy | None) -> str:
    """Return the short hash of all that decides which exit a sample takes.

    `none` without a policy.
    """
    return NO_POLICY if policy is None else _hash(policy_settings(policy), exit_limits(policy))


def policy_hashes(settings: Mapping[str, Any] | None, limits: Rows) -> frozenset[str]:
    """Return the hashes of a policy, with any of its exits closed or none.

    A closed exit leaves the samples of all other early exits unchanged, so that rows of all these policies can be
    followed together.

    Args:
        settings: Those of `policy_settings`; None without a policy.
        limits: Those of `exit_limits`.
    """
    if settings is None:
        return frozenset([NO_POLICY])
    is_open = [min(column) < math.inf for column in zip(*limits[::2], strict=True)]
    exits = [e for e, value in enumerate(is_open[:-1]) if value]
    subsets = chain.from_iterable(combinations(exits, size) for size in range(len(exits) + 1))
    return frozenset(_hash(settings, with_closed(limits, closed)) for closed in subsets)


def _hash(settings: Mapping[str, Any], limits: Rows) -> str:
    decisive = {name: settings[name] for name in (*_DECISIVE, "groups")}
    rows = [[float(value) for value in row] for row in limits]
    return short_hash(digest(json.dumps([decisive, rows], sort_keys=True).encode()))
