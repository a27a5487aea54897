"""Console output of `calibrate`: tables and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from torch import Tensor, cat

from fedekd.data import take_inputs
from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import count_shared_images, exit_network, image_costs
from fedekd.early_exit.client_report import ClientExitReport, exit_statistics, mean_saved
from fedekd.early_exit.policy import ExitPolicy
from fedekd.methods import Client
from fedekd.models import ExitCosts


def exit_table(policy: ExitPolicy, client: Client) -> Table:
    """Format a policy exit by exit."""
    title = (
        f"{client.splits.label}: target risk {policy.target_risk:g}, confidence {policy.confidence:g}, {policy.mode},"
        f" {policy.score}"
    )
    rows = []
    for line in exit_statistics(policy, _costs(client)):
        is_last = line.exit == policy.num_exits
        threshold = "all" if is_last else "closed" if line.threshold is None else f"{line.threshold:.4f}"
        counts = str(line.samples), str(line.errors)
        rows.append(
            (str(line.exit), threshold, *counts, _bound(line.certified_risk), f"{line.share:.1%}", f"{line.saved:.1%}")
        )
    headings = ("exit", "threshold", "samples", "errors", "guaranteed risk", "share", "FLOPs saved")
    return _table(title, headings, rows)


def client_table(
    reports: Sequence[ClientExitReport], calibrator: SelectiveRiskCalibrator, titles: Sequence[str]
) -> Table:
    """Format the results of all clients on their test splits.

    Args:
        reports: Results of clients.
        calibrator: How their exits were calibrated.
        titles: Name or number of every client.
    """
    scope = "for all clients at once" if calibrator.simultaneous_clients > 1 else "per client"
    title = (
        f"error rates of early exits: target risk {calibrator.target_risk:g}, confidence"
        f" {calibrator.confidence:g} {scope}"
    )
    headings = (
        *("client", "open exits", "early exits", "FLOPs saved", "guaranteed risk", "test risk"),
        *("accuracy", "change"),
    )
    rows = (
        (
            titles[report.client],
            f"{report.open_exits} of {report.exits - 1}",
            f"{report.early_share:.1%}",
            f"{report.saved:.1%}",
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
    lines = [f"exit {line.exit}: {line.note}" for line in exit_statistics(policy, costs) if line.note]
    lines.append(f"mean FLOPs saved per calibration image: {mean_saved(policy, costs):.1%}")
    if not MODES[policy.mode].has_guarantee:
        guaranteed = " and ".join(name for name, mode in MODES.items() if mode.has_guarantee)
        lines.append(f"warning: mode {policy.mode} has no guarantee; {guaranteed} have one")
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
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
