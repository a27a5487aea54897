"""Count violated guarantees per class, group and patient over many draws.

Run `python -m experiments.guarantees`. A network with three exits is trained on 12,000 images of FashionMNIST, and its
scores on 18,000 others are cached. They are the population, so that true error rates are exact. Each draw takes tuning
and calibration samples with replacement, calibrates, and compares the error rate of each group at each open exit with
the target risk. Groups are the true class, the predicted class, and a scanner: a fifth of the images, with noise that
the network has not seen, comes from scanner B. Patients have four noisy copies of one image each.

Rows that are stored are not computed again. On one core training takes 3 minutes and 500 draws of all settings 15.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.guarantees.scores import Cached, Population, cached_scores
from experiments.hospital_runs import Row, add_seeds, is_stored, seeds, store
from fedekd.early_exit import ExitPolicy, ExitScores, SelectiveRiskCalibrator
from fedekd.early_exit.grouping import PREDICTED_CLASS, TRUE_CLASS, Grouping
from fedekd.functional.binomial import clopper_pearson

RESULTS = Path(__file__).resolve().parents[2] / "results" / "guarantees" / "groups.csv"

SCANNER, PATIENT = "scanner", "patient"

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

#: Names of the groups by what groups them.
NAMES = {TRUE_CLASS: CLASSES, PREDICTED_CLASS: CLASSES, SCANNER: ("A", "B"), PATIENT: ("all",)}

#: Calibrations by what groups the population: without groups, with a threshold per group, with shared thresholds; for
#: patients with all of their images as if independent, and with one image per patient.
CALIBRATIONS = {
    TRUE_CLASS: ("none", "shared"),
    PREDICTED_CLASS: ("none", "groups", "shared"),
    SCANNER: ("none", "groups", "shared"),
    PATIENT: ("images", "one image"),
}

#: Calibrations that have a guarantee for each group.
GUARANTEED = ("groups", "shared", "one image")


class Setting(NamedTuple):
    """One setting; the fields are columns of the results."""

    groups: str
    calibration: str
    target_risk: float
    confidence: float
    samples: int
    tuning_samples: int
    draws: int
    seed: int


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    result = argparse.ArgumentParser(prog="python -m experiments.guarantees", description=__doc__)
    result.add_argument("--groups", nargs="+", default=list(CALIBRATIONS), choices=list(CALIBRATIONS))
    result.add_argument("--target_risks", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.4], help="Target risks.")
    result.add_argument("--confidence", type=float, default=0.9, help="Confidence (default 0.9).")
    result.add_argument("--samples", type=int, default=3000, help="Calibration samples, or patients (default 3000).")
    result.add_argument("--tuning_samples", type=int, default=1500, help="Tuning samples, or patients (default 1500).")
    result.add_argument("--draws", type=int, default=500, help="Calibrations per setting (default 500).")
    add_seeds(result, 1)
    result.set_defaults(first_seed=0)
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/guarantees"), help="Folder of runs and scores.")
    result.add_argument("--results", type=Path, default=RESULTS, help="CSV file of the rows.")
    arguments = result.parse_args(argv)
    if arguments.draws < 1:
        result.error(f"--draws: expected at least 1, got {arguments.draws}")
    return arguments


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Yield the settings of the command line."""
    size = (arguments.samples, arguments.tuning_samples, arguments.draws)
    for seed in seeds(arguments):
        for groups in arguments.groups:
            for calibration in CALIBRATIONS[groups]:
                for target_risk in arguments.target_risks:
                    yield Setting(groups, calibration, target_risk, arguments.confidence, *size, seed)


def rows_of(setting: Setting, cached: Cached) -> list[Row]:
    """Return one row per group, and one for the violation of any group."""
    names = NAMES[setting.groups]
    calibrator = SelectiveRiskCalibrator(setting.target_risk, setting.confidence)
    population = cached.patients if setting.groups == PATIENT else cached.images
    scores, groups = exit_scores(population, setting.groups)
    grouping = None
    if setting.calibration in ("groups", "shared"):
        grouping = Grouping(setting.groups, names, setting.calibration == "shared")
    violations, opened = np.zeros((2, setting.draws, len(names)), dtype=bool)
    costs = np.empty(setting.draws)
    for draw in range(setting.draws):
        rng = np.random.default_rng((setting.seed, draw))
        sets = [draw_indices(population, setting, n, rng) for n in (setting.samples, setting.tuning_samples)]
        policy = calibrator.fit_scores(*(scores.take(indices) for indices in sets), cached.costs[1, 1], grouping)
        exits = policy.assign(scores.scores, groups)
        for number in range(len(names)):
            rates = group_rates(policy, exits, scores, groups == number)
            violations[draw, number] = any(rate > setting.target_risk for rate in rates)
            opened[draw, number] = bool(rates)
        costs[draw] = cost_of(cached, policy, exits, groups)
    rows = []
    for name, failed, is_open in [
        *zip(names, violations.T, opened.T, strict=True),
        ("any", violations.any(axis=1), opened.any(axis=1)),
    ]:
        low, high = clopper_pearson(int(failed.sum()), setting.draws)
        rows.append(
            {
                "group": name,
                "guarantee": setting.calibration in GUARANTEED,
                "violations": int(failed.sum()),
                "rate": float(failed.mean()),
                "low": low,
                "high": high,
                "open": float(is_open.mean()),
                "saved": float(1 - costs.mean()),
            }
        )
    return rows


def cost_of(cached: Cached, policy: ExitPolicy, exits: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]) -> float:
    """Return the mean cost of a sample; each group has its policy if it needs one."""
    if not policy.needs_group:
        return cached.mean_cost(policy, exits)
    masks = [groups[:, 0] == number for number in range(len(policy.groups))]
    costs = [
        cached.mean_cost(policy.for_group(group.name), exits[mask])
        for group, mask in zip(policy.groups, masks, strict=True)
    ]
    return float(np.average(costs, weights=[mask.sum() for mask in masks]))


def exit_scores(population: Population, by: str) -> tuple[ExitScores, npt.NDArray[np.int64]]:
    """Return the scores of a population, and the group of each sample at each exit."""
    shape = population.scores.shape
    columns = {
        TRUE_CLASS: population.labels[:, None],
        PREDICTED_CLASS: population.predicted,
        SCANNER: population.scanner[:, None],
        PATIENT: np.zeros((shape[0], 1)),
    }
    groups = np.broadcast_to(columns[by], shape).astype(np.int64)
    return ExitScores(population.scores, population.predicted == population.labels[:, None], None, groups), groups


def draw_indices(
    population: Population, setting: Setting, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw patients with replacement; all of their images, or one of each."""
    by_patient = np.argsort(population.patient, kind="stable").reshape(population.patient.max() + 1, -1)
    patients = by_patient[rng.integers(len(by_patient), size=count)]
    if setting.calibration == "images":
        return patients.ravel()
    return np.asarray(patients[np.arange(count), rng.integers(patients.shape[1], size=count)])


def group_rates(
    policy: ExitPolicy, exits: npt.NDArray[np.int64], scores: ExitScores, is_member: npt.NDArray[np.bool_]
) -> list[float]:
    """Return the true error rate of a group at each early exit that it takes."""
    rates = []
    for exit_ in range(policy.num_exits - 1):
        mask = (exits == exit_) & is_member[:, exit_]
        if mask.any():
            rates.append(float((~scores.correct[mask, exit_]).mean()))
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    """Count the violations of the settings of the command line, and print them."""
    arguments = parse(argv)
    for setting in settings(arguments):
        key: dict[str, Any] = setting._asdict()
        if is_stored(key, arguments.results):
            continue
        rows = rows_of(setting, cached_scores(arguments.output, arguments.root, setting.seed))
        store(key, rows, arguments.results)
        print(*setting, *(f"{name}={rows[-1][name]:.4g}" for name in ("rate", "low", "high", "saved")), flush=True)
    frame = pd.read_csv(arguments.results)
    print(frame[frame["group"] == "any"].to_string(index=False))


if __name__ == "__main__":
    main()
