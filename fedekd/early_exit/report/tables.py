"""Tables of an early-exit report as data frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.early_exit.calibration.validity import Validity
from fedekd.early_exit.policy_metrics import PolicyMetrics
from fedekd.early_exit.report.exit_report import ExitReport, PolicyResult

#: Number format by column; other numbers have 4 significant digits.
_FORMATS: dict[str, str] = {
    **dict.fromkeys(("accuracy", "area", "full accuracy", "recalibrated accuracy"), ".4f"),
    **dict.fromkeys(("ECE", "ECE of exiting images", "scaled ECE", "scaled ECE of exiting images"), ".4f"),
    **dict.fromkeys(("cost", "FLOPs saved", "early exits", "mean cost", "recalibrated FLOPs saved"), ".1%"),
    **dict.fromkeys(("worst risk", "excess risk", "recalibrated worst risk"), ".4f"),
    **dict.fromkeys(("violation rate", "CI low", "CI high"), ".4f"),
    "accuracy change": "+.4f",
}


@dataclass(frozen=True, eq=False)
class ReportTable:
    """One table with its title.

    Attributes:
        name: Name of the CSV file without suffix.
        title: Heading.
        description: What the table shows, in one to three sentences.
        frame: The values; None or NaN where a value is unknown or does not apply.
    """

    name: str
    title: str
    description: str
    frame: pd.DataFrame

    def printed(self) -> pd.DataFrame:
        """Return the values as text."""
        return pd.DataFrame(
            {name: [_text(name, value) for value in column] for name, column in self.frame.astype(object).items()}
        )


def _text(column: object, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, _FORMATS.get(str(column), ".4g" if isinstance(value, float) else ""))


def report_tables(report: ExitReport) -> list[ReportTable]:
    """Create all tables of a report."""
    tables = [_exits(report), _policies(report), _validity(report), _reliability(report)]
    return [*tables, _corruptions(report)] if report.corruptions else tables


def _exits(report: ExitReport) -> ReportTable:
    rows = [
        {"network": network.name, "exit": number, **point._asdict(), "area": network.area}
        for network in report.networks
        for number, point in enumerate(network.points, start=1)
    ]
    description = (
        "All test images take the same exit. Cost: FLOPs divided by those of the plain network. Area: area under"
        " accuracy against cost when images take the first exit whose score reaches one threshold, divided by the range"
        " of costs; it is the mean accuracy over all budgets, linear between points."
    )
    return ReportTable("exits", "Single exits", description, pd.DataFrame(rows))


def _policies(report: ExitReport) -> ReportTable:
    unit = report.policies[0].policy.unit if report.policies else ""
    per = f", one per {unit}" if unit else ""
    samples = report.policies[0].policy.samples if report.policies else 0
    description = (
        f"Calibrated with ltt on {samples} images{per}. Evaluated on {len(report.networks[0].test)} test images. FLOPs"
        " saved are relative to the plain network. A time ratio is the time with early exits divided by the time"
        " without, on one machine."
    )
    frame = pd.DataFrame([_policy_row(result) for result in report.policies])
    return ReportTable("policies", "Savings and accuracy of calibrated policies", description, frame)


def _policy_row(result: PolicyResult) -> dict[str, float | str]:
    policy, metrics = result.policy, result.metrics
    row: dict[str, float | str] = {
        "target risk": policy.target_risk,
        "accuracy": metrics.point.accuracy,
        "full accuracy": metrics.full_accuracy,
        "accuracy change": metrics.point.accuracy - metrics.full_accuracy,
        "FLOPs saved": 1.0 - metrics.point.cost,
        "early exits": 1.0 - metrics.exit_shares[-1],
        "worst risk": metrics.worst_risk,
    }
    for number, (threshold, risk) in enumerate(zip(policy.thresholds[:-1], metrics.risks, strict=False), start=1):
        row |= {f"threshold {number}": "closed" if threshold == math.inf else threshold, f"risk {number}": risk}
    for latency in result.latency:
        row |= {
            f"time ratio, batch {latency.batch_size}": latency.ratio,
            f"standard error, batch {latency.batch_size}": latency.error,
        }
    return row


def _validity(report: ExitReport) -> ReportTable:
    rows = [
        {
            "target risk": validity.calibrator.target_risk,
            "rule": validity.calibrator.mode,
            "guarantee": "yes" if MODES[validity.calibrator.mode].has_guarantee else "no",
            "draws": validity.draws,
            "violations": validity.violations,
            "violation rate": validity.violation_rate,
            "CI low": validity.interval[0],
            "CI high": validity.interval[1],
            "verdict": _verdict(validity),
            "mean cost": float(validity.costs.mean()),
        }
        for validity in report.validity
    ]
    allowed = round(1.0 - report.options.confidence, 12)
    description = (
        f"Calibration and tuning sets are drawn with replacement from the {len(report.networks[0].held_out)} held-out"
        " images, which serve as the population, so that the true error rates are exact. A violation is a draw in which"
        f" the true error rate of some exit exceeds the target risk; its allowed probability is {allowed:g}. CI: 95%"
        " Clopper-Pearson interval of that probability. The verdict is holds if the interval lies below the allowed"
        " probability, consistent if it contains it, and violated if it lies above."
    )
    return ReportTable("validity", "Validity of the guarantee", description, pd.DataFrame(rows))


def _verdict(validity: Validity) -> str:
    if validity.interval[1] <= validity.calibrator.failure_probability:
        return "holds"
    return "consistent" if validity.is_consistent else "violated"


def _reliability(report: ExitReport) -> ReportTable:
    rows = [
        {
            "exit": line.exit,
            "ECE": line.error,
            "ECE of exiting images": line.exiting_error,
            "temperature": line.temperature,
            "scaled ECE": line.scaled_error,
            "scaled ECE of exiting images": line.scaled_exiting_error,
        }
        for line in report.reliabilities
    ]
    description = (
        "Expected calibration error (ECE, 15 bins): mean distance of confidence from accuracy, over all test images and"
        f" over the images that take the exit at target risk {report.options.target_risk:g}. Scaled: after dividing the"
        " logits of the exit by its temperature, which is fitted on the tuning split. The policy uses the unscaled"
        " confidence: with more than two classes, scaling changes the order of images, so that thresholds do not carry"
        " over."
    )
    return ReportTable("reliability", "Calibration error of each exit", description, pd.DataFrame(rows))


def _corruptions(report: ExitReport) -> ReportTable:
    target_risk = report.options.target_risk
    rows = [
        {
            "corruption": result.corruption,
            "severity": result.severity,
            "full accuracy": result.original.full_accuracy,
            **_outcome(result.original),
            "excess risk": result.original.worst_risk - target_risk,
            **{f"recalibrated {name}": value for name, value in _outcome(result.recalibrated).items()},
        }
        for result in report.corruptions
    ]
    description = (
        "The guarantee does not cover images from another distribution. Here the policy for target risk"
        f" {target_risk:g} is applied to corrupted images. Worst risk: largest error rate of an exit; excess risk:"
        " worst risk minus target risk. Recalibrated: a policy calibrated on images with the same corruption. At most"
        f" {report.options.corrupted} images per set, so the values are rough."
    )
    return ReportTable("corruption", "Corrupted images", description, pd.DataFrame(rows))


def _outcome(metrics: PolicyMetrics) -> dict[str, float]:
    return {
        "accuracy": metrics.point.accuracy,
        "FLOPs saved": 1.0 - metrics.point.cost,
        "worst risk": metrics.worst_risk,
    }
