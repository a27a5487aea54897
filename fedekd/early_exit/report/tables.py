"""A report on exits as tables: what stands in each, in words and numbers. Page, Markdown and CSV are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.early_exit.policy_metrics import PolicyMetrics
from fedekd.early_exit.report.exit_report import ExitReport

#: A value as it is read: numbers of a column alike.
_FORMATS: dict[str, str] = {
    **dict.fromkeys(("accuracy", "area", "full accuracy", "ECE", "ECE of leavers", "recalibrated accuracy"), ".4f"),
    **dict.fromkeys(("cost", "saved", "leave early", "mean cost", "recalibrated saved"), ".1%"),
    **dict.fromkeys(("worst risk", "excess risk", "recalibrated worst risk", "share", "low", "high"), ".4f"),
    "accuracy change": "+.4f",
}


@dataclass(frozen=True)
class ReportTable:
    """One table.

    Attributes:
        name: Of its CSV file.
        title: Its heading.
        told: What it shows, in a sentence or two.
        columns: Names of the columns.
        lines: By column; what is missing is unknown or does not apply.
    """

    name: str
    title: str
    told: str
    columns: Sequence[str]
    lines: Sequence[Mapping[str, Any]]

    def cell(self, line: Mapping[str, Any], column: str) -> str:
        """A value as it is read."""
        value = line.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        style = _FORMATS.get(column, ".4g" if isinstance(value, float) else "")
        return format(value, style)


def report_tables(report: ExitReport) -> list[ReportTable]:
    """All tables of a report."""
    made = [_exits(report), _policies(report), _validity(report), _reliability(report)]
    if report.corrupted:
        made.append(_corrupted(report))
    return made


def _exits(report: ExitReport) -> ReportTable:
    lines = [
        {"network": run.name, "exit": place + 1, "cost": point.cost, "accuracy": point.accuracy, "area": area}
        for run, points, area in zip(report.runs, report.points, report.areas, strict=True)
        for place, point in enumerate(points)
    ]
    told = (
        "Every test image leaves at the same exit. The cost is in FLOPs over those of the plain network; the area is"
        " that under accuracy against cost when images leave at the first exit that is sure enough, divided by the"
        " range of costs: the mean accuracy over all budgets."
    )
    return ReportTable("exits", "The exits, one by one", told, ("network", "exit", "cost", "accuracy", "area"), lines)


def _policies(report: ExitReport) -> ReportTable:
    exits = report.runs[0].network.num_exits
    columns = ["alpha", "accuracy", "full accuracy", "accuracy change", "saved", "leave early", "worst risk"]
    columns += [f"{what} {place + 1}" for place in range(exits - 1) for what in ("threshold", "risk")]
    sizes = [latency.batch_size for latency in report.policies[0].latency] if report.policies else []
    columns += [f"{what}, batch {size}" for size in sizes for what in ("time ratio", "its standard error")]
    lines = []
    for line in report.policies:
        found = line.evaluate_policy
        values: dict[str, float | str] = {
            "alpha": line.policy.alpha,
            **_outcome(found),
            "full accuracy": found.full_accuracy,
        }
        values["accuracy change"] = found.point.accuracy - found.full_accuracy
        values["leave early"] = 1.0 - found.shares[-1]
        for place in range(exits - 1):
            closed = line.policy.thresholds[place] == math.inf
            values[f"threshold {place + 1}"] = "closed" if closed else line.policy.thresholds[place]
            values[f"risk {place + 1}"] = found.risks[place]
        for latency in line.latency:
            values[f"time ratio, batch {latency.batch_size}"] = latency.ratio
            values[f"its standard error, batch {latency.batch_size}"] = latency.error
        lines.append(values)
    told = (
        f"Calibrated by ltt on {report.policies[0].policy.samples if report.policies else 0} images, with probability"
        f" {1 - report.options.delta:g} that no exit's error rate exceeds alpha; judged on"
        f" {len(report.runs[0].test)} test images. Saved are FLOPs of the plain network; a time ratio is measured on"
        " one machine, leaving early over not."
    )
    return ReportTable("policies", "What leaving early saves, and costs", told, columns, lines)


def _outcome(found: PolicyMetrics) -> dict[str, float]:
    return {"accuracy": found.point.accuracy, "saved": 1.0 - found.point.cost, "worst risk": found.worst_risk}


def _validity(report: ExitReport) -> ReportTable:
    lines = [
        {
            "alpha": line.alpha,
            "rule": line.mode,
            "promises": "yes" if MODES[line.mode].promises else "no",
            "draws": line.draws,
            "violations": line.violations,
            "share": line.share,
            "low": line.interval[0],
            "high": line.interval[1],
            "verdict": "holds" if line.interval[1] <= line.delta else "agrees" if line.agrees else "broken",
            "mean cost": float(line.costs.mean()),
        }
        for line in report.validity
    ]
    columns = ("alpha", "rule", "promises", "draws", "violations", "share", "low", "high", "verdict", "mean cost")
    told = (
        f"Calibration and tuning sets are drawn with replacement from the {len(report.runs[0].held_out)} held-out"
        " images, which stand for the population, so that the true error rates are exact. A violation is a draw in"
        " which some exit's true error rate exceeds alpha; its share may be"
        f" {report.options.delta:g}, and low and high are its 95% interval (Clopper-Pearson): below delta the promise"
        " holds, around it the draws agree with it, above it the rule breaks it."
    )
    return ReportTable("validity", "Does the promise hold?", told, columns, lines)


def _reliability(report: ExitReport) -> ReportTable:
    lines = [
        {"exit": line.exit, "ECE": line.error, "ECE of leavers": line.leaving_error} for line in report.reliabilities
    ]
    told = (
        "Expected calibration error (15 bins): how far confidence is from accuracy, over all test images and over those"
        f" who leave there at alpha {report.options.alpha:g}."
    )
    return ReportTable(
        "reliability", "Is an exit as right as it is sure?", told, ("exit", "ECE", "ECE of leavers"), lines
    )


def _corrupted(report: ExitReport) -> ReportTable:
    alpha = report.options.alpha
    lines = []
    for line in report.corrupted:
        again = _outcome(line.recalibrated)
        lines.append(
            {
                "corruption": line.corruption,
                "level": line.level,
                "full accuracy": line.kept.full_accuracy,
                **_outcome(line.kept),
                "excess risk": line.kept.worst_risk - alpha,
                **{f"recalibrated {name}": value for name, value in again.items()},
            }
        )
    columns = (
        *("corruption", "level", "full accuracy", "accuracy", "saved", "worst risk", "excess risk"),
        *("recalibrated accuracy", "recalibrated saved", "recalibrated worst risk"),
    )
    told = (
        f"The promise is of images like those it was made from. Here the policy for alpha {alpha:g} meets corrupted"
        " ones: the worst risk is that of the worst exit, the excess what is beyond alpha. Recalibrated: a policy"
        f" made from images corrupted alike. {report.options.corrupted} images of each kind at most, so figures of"
        " single exits are rough."
    )
    return ReportTable("corruption", "Where the promise ends: corrupted images", told, columns, lines)
