"""Output of `monitor`: table, alarms and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedekd.data.client_splits import client_label
from fedekd.early_exit.policy import ExitPolicy
from fedekd.monitoring import Followed, MonitorStart
from fedekd.monitoring.state import exits_to_close
from fedekd.reporting import figures

#: What to do after an alarm that closes no exit.
_REMEDIES = {
    "do_no_harm": "Deploy the local model of this client",
    "coverage": "Calibrate the prediction sets again",
    "drift": "Calibrate again on current labelled samples: the assumption of every guarantee is violated",
}


def alarm_message(start: MonitorStart, alarm: Followed, policy: ExitPolicy | None) -> str:
    """Describe an alarm, and what to close, in one line."""
    quantity, exits = alarm.quantity, exits_to_close(alarm, policy)
    assert alarm.alarm is not None
    allowed = "" if quantity.kind == "drift" else f", at most {quantity.limit:g} allowed"
    close = f"Close exit {', '.join(str(e + 1) for e in exits)}: --apply true. " if exits else ""
    if not exits and quantity.kind in ("exit", "drift") and policy is not None:
        close = "The exit is closed now. " if quantity.kind == "exit" else "All early exits are closed now. "
    remedy = _REMEDIES.get(quantity.kind, "")
    text = (
        f"ALARM {quantity.name}: evidence {alarm.largest:.4g} (alarm at {1 / start.level:.4g}), first at line"
        f" {alarm.alarm + 2}; observed {alarm.observed:.4g} on {len(alarm.rows)} samples{allowed}. {close}{remedy}"
    )
    return text.strip()


def alarm_table(start: MonitorStart, followed: Sequence[Followed], policy: ExitPolicy | None) -> Table:
    """Format the quantities and their evidence."""
    table = Table(title=f"{_label(start)}: alarm at evidence {1 / start.level:.4g}, confidence {start.confidence:g}")
    table.add_column("quantity", justify="right", no_wrap=True)
    for heading in ("samples", "observed", "allowed", "evidence", "largest", "alarm at line"):
        table.add_column(heading, justify="right")
    for each in followed:
        kind = each.quantity.kind
        is_closed = kind == "exit" and policy is not None and not policy.open_exits[each.quantity.exit - 1]
        table.add_row(
            each.quantity.name + (" (closed)" if is_closed else ""),
            str(len(each.rows)),
            f"{each.observed:.4f}" if len(each.rows) else "",
            "no drift" if kind == "drift" else f"≤ {each.quantity.limit:g}",
            f"{each.last:.3g}",
            f"{each.largest:.3g}",
            "" if each.alarm is None else str(each.alarm + 2),
        )
    return table


def _label(start: MonitorStart) -> str:
    return client_label(start.client, start.name or None)


def draw_evidence(start: MonitorStart, followed: Sequence[Followed], path: Path) -> None:
    """Draw the evidence of all quantities, as PNG."""
    curves = {each.quantity.name: (each.rows + 1, each.evidence) for each in followed}
    alarms = {each.quantity.name: each.alarm + 1 for each in followed if each.alarm is not None}
    figure = figures.evidence(curves, 1 / start.level, alarms, f"Monitor of {_label(start)}")
    figures.save(figure, path)
