"""Power of three tests of the error rate of patients with several images each.

Run `python -m experiments.guarantees.patients`. The error rate of a random image of a random patient is tested: by one
image per patient (exact binomial test), and by the mean error per patient with a mixture of bets (Waudby-Smith and
Ramdas, JRSS B 2024) or with the bound of Bentkus (Annals of Probability 32, 2004), which is e times the binomial tail.
Errors are beta-binomial: the correlation of two errors of one patient is `correlation`. It takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binom

from fedekd.atomic import atomic_file

RESULTS = Path(__file__).resolve().parents[2] / "results" / "guarantees" / "patients.csv"

TARGET_RISK, LEVEL, RISK = 0.05, 0.05, 0.025
PATIENTS, IMAGES, CORRELATIONS = (100, 300, 1000), (2, 5, 20), (0.1, 0.3, 0.7)

#: Stakes of the bets, in units of the largest valid one.
STAKES = np.asarray([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])


def powers(patients: int, images: int, correlation: float, draws: int, seed: int = 0) -> dict[str, float]:
    """Return the share of draws in which each test rejects.

    Args:
        patients: Number of patients.
        images: Images per patient.
        correlation: Correlation of two errors of one patient, in (0, 1).
        draws: Number of simulated sets.
        seed: Seed.
    """
    rng = np.random.default_rng((seed, patients, images, round(100 * correlation)))
    scale = 1 / correlation - 1
    rates = rng.beta(RISK * scale, (1 - RISK) * scale, size=(draws, patients))
    means = rng.binomial(images, rates) / images
    single = rng.uniform(size=means.shape) < means  # the error of one random image
    tail = binom.cdf(np.ceil(means.sum(axis=1) - 1e-9), patients, TARGET_RISK)
    return {
        "one_image": float((binom.cdf(single.sum(axis=1), patients, TARGET_RISK) <= LEVEL).mean()),
        "mean_bets": float((betting_p_values(means) <= LEVEL).mean()),
        "mean_bentkus": float((np.e * tail <= LEVEL).mean()),
    }


def betting_p_values(means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return p-values of means, shape (draws, patients), from a mixture of bets."""
    stakes = STAKES / (1 - TARGET_RISK)
    wealth = [np.exp(np.log1p(stake * (TARGET_RISK - means)).sum(axis=1)) for stake in stakes]
    return np.asarray(1 / np.mean(wealth, axis=0))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the powers of all cells, and print them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.guarantees.patients", description=__doc__)
    parser.add_argument("--draws", type=int, default=4000, help="Simulated sets per cell (default 4000).")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file of the rows.")
    arguments = parser.parse_args(argv)
    rows = [
        {"patients": patients, "images": images, "correlation": correlation, "draws": arguments.draws}
        | powers(patients, images, correlation, arguments.draws)
        for patients, images, correlation in product(PATIENTS, IMAGES, CORRELATIONS)
    ]
    frame = pd.DataFrame(rows)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.results) as file:
        file.write(frame.to_csv(index=False, float_format="%.4g").encode())
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
