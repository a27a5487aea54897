"""Console output of `calibrate`: tables and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from torch import Tensor, cat

from fedekd.data import take_inputs
from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import count_shared_images, exit_network, image_costs
from fedekd.early_exit.client_report import ClientExitReport, exit_statistics, group_policies, mean_saved
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.statement import closed_exits, exit_guarantee, percent
from fedekd.methods import Client
from fedekd.models import ExitCosts


def exit_table(policy: ExitPolicy, client: Client) -> Table:
    """Format a policy exit by exit."""
    title = (
        f"{client.splits.label}: target risk {policy.target_risk:g}, confidence {policy.confidence:g}, {policy.mode},"
        f" {policy.score}"
    )
    if policy.group_by:
        shared = "shared thresholds" if policy.shared_thresholds else "thresholds per group"
        title += f", {shared}, groups of {policy.group_by}"
    rows = []
    evaluated = None if policy.needs_group else policy.evaluated  # of all classes, which differ between samples
    for group, part in _parts(policy).items():
        for line in exit_statistics(part, _costs(client), group, evaluated):
            is_last = line.exit == policy.num_exits
            threshold = "all" if is_last else "closed" if line.threshold is None else f"{line.threshold:.4f}"
            counts = str(line.samples), str(line.errors)
            shares = percent(line.share), percent(line.saved)
            name = [group] if policy.group_by else []
            rows.append((*name, str(line.exit), threshold, *counts, _bound(line.certified_risk), *shares))
    headings = ("exit", "threshold", "samples", "errors", "guaranteed\nrisk", "share", "FLOPs\nsaved")
    return _table(title, ("group", *headings) if policy.group_by else headings, rows)


def _parts(policy: ExitPolicy) -> dict[str, ExitPolicy]:
    """Return the policy, or one with the counts of each group."""
    return group_policies(policy) if policy.group_by else {"": policy}


def client_table(
    reports: Sequence[ClientExitReport],
    calibrator: SelectiveRiskCalibrator,
    titles: Sequence[str],
    unit: str = "",
    has_names: bool = False,
) -> Table:
    """Format the results of all clients on their test splits.

    Args:
        reports: Results of clients.
        calibrator: How their exits were calibrated.
        titles: Name or number of every client.
        unit: Unit of the policies, such as the patient, if they have one.
        has_names: Whether the clients are sites with names.
    """
    scope = "for all clients at once" if calibrator.simultaneous_clients > 1 else "per client"
    title = (
        f"error rates of early exits: target risk {calibrator.target_risk:g}, confidence"
        f" {calibrator.confidence:g} {scope}"
    )
    if unit:
        title += f"; test risk counts all test images, not one per {unit}"
    headings = (
        "site" if has_names else "client",
        *("open\nexits", "early\nexits", "FLOPs\nsaved", "guaranteed\nrisk", "test\nrisk", "accuracy", "change"),
    )
    rows = (
        (
            titles[report.client],
            f"{report.open_exits} of {report.exits - 1}",
            percent(report.early_share),
            percent(report.saved),
            _bound(report.certified_risk),
            "" if report.test_risk is None else f"{report.test_risk:.4f}",
            f"{report.accuracy:.4f}",
            f"{report.accuracy - report.full_accuracy:+.4f}",
        )
        for report in reports
    )
    return _table(title, headings, rows)


def remarks(policy: ExitPolicy, client: Client, trained_on: Tensor | None) -> list[str]:
    """List what the table does not show.

    Args:
        policy: The client's policy.
        client: The client.
        trained_on: Indices of all images used for training, if the client's own splits were used for calibration.
    """
    costs = _costs(client)
    shown: dict[str, ExitPolicy] = {"": policy} if policy.shared_thresholds else _parts(policy)
    lines = [
        f"exit {line.exit}{f', group {group}' if group else ''}: {line.note}"
        for group, part in shown.items()
        for line in exit_statistics(part, costs, group)
        if line.note
    ]
    if hint := closed_exits(policy):
        lines.append(hint)
    lines.append(f"mean FLOPs saved per calibration image: {percent(mean_saved(policy, costs))}")
    if not MODES[policy.mode].has_guarantee:
        guaranteed = " and ".join(name for name, mode in MODES.items() if mode.has_guarantee)
        lines.append(f"warning: mode {policy.mode} has no guarantee; {guaranteed} have one")
    else:
        lines.append(exit_guarantee(policy))
    if policy.needs_group:
        lines.append(f"a sample without a value of {policy.group_by}, or with another one, takes the last exit")
    if trained_on is not None:
        pixels, splits = client.samples.inputs, client.splits
        # A tuning split that training uses is seen by design: it only orders the tests.
        names = [name for name in ("tuning", "calibration") if name not in client.training_splits]
        held_out = take_inputs(pixels, cat([getattr(splits, name) for name in names]))
        if shared := count_shared_images(held_out, take_inputs(pixels, trained_on)):
            lines.append(
                f"warning: {shared} of {len(held_out)} held-out images are, pixel by pixel, also training images."
                " The guarantee then covers only deployment data with the same fraction of repeated images"
            )
    return lines


def _bound(risk: float | None) -> str:
    return "" if risk is None else f"≤ {risk:g}"


def _costs(client: Client) -> ExitCosts:
    return image_costs(exit_network(client), client.samples, client.networks.get("proxy"))


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, collapse_padding=True, pad_edge=False)
    for heading in headings:  # folded where the console is narrow, not cut
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
