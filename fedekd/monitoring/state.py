"""State of a monitor between calls, and the exits that an alarm closes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, describe_error, shorten_path
from fedekd.monitoring.arrivals import Arrivals
from fedekd.monitoring.evidence import Followed


@dataclass(frozen=True)
class Consumed:
    """Part of the arrivals that was read.

    Attributes:
        rows: Number of rows.
        size: Bytes, with the header.
        sha256: Hash of these bytes.
    """

    rows: int = 0
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class MonitorState:
    """Result of the last call: a function of the settings and of the arrivals.

    One call over all arrivals and several calls over its parts give equal bytes. Evidence is computed from the file
    of arrivals in every call, and the state has its hash: a process that is killed loses nothing.

    Attributes:
        consumed: Part of the arrivals that was read.
        quantities: Name, samples, observed mean, evidence, largest evidence and line of the alarm of each quantity.
    """

    consumed: Consumed
    quantities: tuple[dict[str, float | int | str | None], ...] = ()

    @classmethod
    def of(cls, arrivals: Arrivals, followed: Sequence[Followed]) -> MonitorState:
        """Return the state after some arrivals."""
        rows = tuple(
            {
                "name": each.quantity.name,
                "samples": len(each.rows),
                "observed": None if math.isnan(each.observed) else each.observed,
                "evidence": each.last,
                "largest_evidence": each.largest,
                "alarm_line": None if each.alarm is None else each.alarm + 2,
            }
            for each in followed
        )
        return cls(Consumed(arrivals.rows, arrivals.size, arrivals.sha256), rows)

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        with atomic_file(path) as file:
            file.write(seal_json(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> MonitorState:
        """Read a state; without a file nothing was read.

        Raises:
            UserError: The file is damaged.
        """
        if not path.is_file():
            return cls(Consumed())
        try:
            values = unseal_json(path.read_bytes())
            return cls(Consumed(**values["consumed"]), tuple(values["quantities"]))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{shorten_path(path)}: expected the state of a monitor, got invalid content: {describe_error(error)}."
                " Restore it, or remove it: the next call computes it from the arrivals"
            ) from error


def open_alarms(followed: Sequence[Followed], policy: ExitPolicy | None) -> list[Followed]:
    """Return the alarms that the policy does not account for yet.

    An alarm of an exit is accounted for once the exit is closed, and an alarm of a drift test once all early exits are
    closed and the reason of one names it. Other alarms remain.
    """
    return [each for each in followed if each.alarm is not None and not _is_settled(each, policy)]


def _is_settled(alarm: Followed, policy: ExitPolicy | None) -> bool:
    # Without a reason no exit was closed for an alarm: none was open from the start.
    if policy is None or not any(policy.closed) or exits_to_close(alarm, policy):
        return False
    if alarm.quantity.kind == "exit":
        return bool(policy.closed[alarm.quantity.exit - 1])
    return alarm.quantity.kind == "drift" and _is_reason(alarm, policy)


def _is_reason(alarm: Followed, policy: ExitPolicy) -> bool:
    return any(_reason(alarm) in reason for reason in policy.closed)


def _reason(alarm: Followed) -> str:
    assert alarm.alarm is not None
    evidence = float(alarm.evidence[alarm.rows.tolist().index(alarm.alarm)])
    return f"monitor: alarm of {alarm.quantity.name} after {alarm.alarm + 1} arrivals, evidence {evidence:.4g}"


def exits_to_close(alarm: Followed, policy: ExitPolicy | None) -> list[int]:
    """Return the indices of the open exits that an alarm closes."""
    if policy is None:
        return []
    is_open = [e for e, value in enumerate(policy.open_exits) if value]
    kind = alarm.quantity.kind
    return [e for e in is_open if kind == "drift" or (kind == "exit" and e == alarm.quantity.exit - 1)]


def close_exits(policy: ExitPolicy, alarms: Sequence[Followed]) -> ExitPolicy:
    """Return the policy with the exits closed that alarms close, and the reasons.

    If an alarm of a drift test has no exit left to close, the closed ones have it as a further reason.
    """
    for alarm in alarms:
        reason = _reason(alarm)
        for exit_ in exits_to_close(alarm, policy):
            policy = policy.close(exit_, reason)
        if alarm.quantity.kind == "drift" and any(policy.closed) and not _is_reason(alarm, policy):
            closed = tuple(f"{earlier}; {reason}" if earlier else "" for earlier in policy.closed)
            policy = replace(policy, closed=closed)
    return policy
