"""Compute the level and the power of the tests of `do_no_harm`.

Run `python -m experiments.exact_test`. All figures are sums over outcomes, without simulation. `level.csv` has the
largest probability of a wrong decision over the rate at which the two models differ. `power.csv` has the power of the
sign test and of the unconditional test, and a bound on that of every valid test. Stored rows are not repeated.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from tqdm import tqdm

from fedekd.atomic import atomic_file
from fedekd.do_no_harm import DoNoHarm, acceptance_probability

RESULTS = Path(__file__).resolve().parents[2] / "results" / "exact_test"

Row = dict[str, float]

#: Numbers of samples, margins and levels of `level.csv`.
SAMPLES, MARGINS, LEVELS = (20, 60, 300, 780, 2300), (0.0, 0.005, 0.01, 0.02), (0.1, 0.05, 0.01)

#: Numbers of samples, margins and rates of differing samples of `power.csv`.
POWER_SETTINGS = (
    *((300, 0.0, 0.05), (780, 0.0, 0.02), (780, 0.0, 0.05), (2300, 0.0, 0.05)),
    *((300, 0.01, 0.02), (300, 0.01, 0.05), (780, 0.01, 0.02), (780, 0.01, 0.05), (2300, 0.01, 0.05)),
)
GAINS = (0.002, 0.005, 0.01, 0.02)

#: Confidence of `power.csv`.
CONFIDENCE = 0.9

#: Largest counts are those with this probability of a larger one.
_NEGLIGIBLE = 1e-12


def differing_rates(samples: int, margin: float) -> npt.NDArray[np.float64]:
    """Return rates of differing samples at which the level is computed, ascending.

    They are evenly spaced in the arcsine of their root, where the distribution of counts changes evenly.

    Args:
        samples: Number of compared samples n; there are 40 sqrt(n) + 200 rates.
        margin: Smallest possible rate under the boundary of the hypothesis; 0 is left out.
    """
    angles = np.linspace(0.0, np.pi / 2, int(40 * np.sqrt(samples)) + 201)[1:]
    rates: npt.NDArray[np.float64] = margin + (1.0 - margin) * np.sin(angles) ** 2
    return np.minimum(rates, 1.0)


def level_row(samples: int, margin: float, level: float) -> Row:
    """Compute the largest probability of a wrong decision over all rates.

    Args:
        samples: Number of compared samples.
        margin: Margin of the rule.
        level: 1 - confidence of the rule.
    """
    rule = DoNoHarm(confidence=1 - level, margin=margin)
    rates = differing_rates(samples, margin)
    probabilities = [acceptance_probability(rule, -margin, rate, samples) for rate in rates.tolist()]
    worst = int(np.argmax(probabilities))
    return {
        "samples": samples,
        "margin": margin,
        "level": level,
        "worst": probabilities[worst],
        "differing": float(rates[worst]),
    }


def neyman_pearson_power(
    samples: int, null: tuple[float, float], alternative: tuple[float, float], level: float
) -> float:
    """Compute the power of the most powerful test between two distributions.

    It is randomised at its critical value, so that its level is exact.

    Args:
        samples: Number of compared samples.
        null: Probabilities that only the local, and only the federated model is correct, under the hypothesis.
        alternative: The same under the alternative.
        level: Level of the test, in (0, 1).

    Reference:
        Neyman and Pearson, 1933.
    """
    limits = [int(binom.isf(_NEGLIGIBLE, samples, max(rates))) + 1 for rates in zip(null, alternative, strict=True)]
    worse, better = np.meshgrid(*(np.arange(min(limit, samples) + 1) for limit in limits), indexing="ij")

    def probabilities(worse_rate: float, better_rate: float) -> npt.NDArray[np.float64]:
        given = binom.pmf(better, samples - worse, min(better_rate / (1 - worse_rate), 1.0))
        joint: npt.NDArray[np.float64] = (binom.pmf(worse, samples, worse_rate) * given).ravel()
        return joint

    sizes, powers = probabilities(*null), probabilities(*alternative)
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(-np.nan_to_num(powers / sizes, nan=0.0, posinf=np.inf), kind="stable")
    sizes, powers = sizes[order], powers[order]
    spent = np.cumsum(sizes)
    last = int(np.searchsorted(spent, level))  # the outcome at which the test is randomised
    if last == len(spent):
        return float(powers.sum())
    left = level - (float(spent[last - 1]) if last else 0.0)
    return float(powers[:last].sum() + left / sizes[last] * powers[last])


def power_bound(samples: int, margin: float, differing: float, gain: float, level: float) -> float:
    """Compute a bound on the power of every valid test.

    A valid test keeps its level at each rate of differing samples. So its power is at most that of the most powerful
    test of the hypothesis at any one rate; the bound is the smallest of these.

    Args:
        samples: Number of compared samples.
        margin: Margin of the rule.
        differing: Probability that exactly one of the two models is correct, at least `gain`.
        gain: True gain in accuracy, above -margin.
        level: Level of the test, in (0, 1).
    """
    alternative = ((differing - gain) / 2, (differing + gain) / 2)

    def power(rate: float) -> float:
        return neyman_pearson_power(samples, ((rate + margin) / 2, (rate - margin) / 2), alternative, level)

    highest = min(1.0, differing + margin + 0.05)
    rates = np.linspace(margin, highest, 25)[int(margin == 0) :]
    smallest = int(np.argmin([power(rate) for rate in rates.tolist()]))
    around = rates[max(smallest - 1, 0)], rates[min(smallest + 1, len(rates) - 1)]
    found = minimize_scalar(power, bounds=around, method="bounded", options={"xatol": 1e-5})
    return float(min(found.fun, power(float(rates[smallest]))))


def power_row(samples: int, margin: float, differing: float, gain: float) -> Row:
    """Compute the power of both tests and their bound."""
    sign, unconditional = (
        acceptance_probability(DoNoHarm(CONFIDENCE, margin, test=test), gain, differing, samples)
        for test in ("sign", "unconditional")
    )
    return {
        "samples": samples,
        "margin": margin,
        "differing": differing,
        "gain": gain,
        "sign": sign,
        "unconditional": unconditional,
        "bound": power_bound(samples, margin, differing, gain, 1 - CONFIDENCE),
    }


def main() -> int:
    """Compute the rows that are missing, and write each table after every row."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exact_test", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="Folder of the tables (default results/exact_test)."
    )
    folder = parser.parse_args().results
    tables = {
        "level": (level_row, list(product(SAMPLES, MARGINS, LEVELS))),
        "power": (power_row, [(*setting, gain) for setting in POWER_SETTINGS for gain in GAINS]),
    }
    for name, (compute, settings) in tables.items():
        path = folder / f"{name}.csv"
        rows = pd.read_csv(path).to_dict("records") if path.exists() else []
        names = list(compute.__annotations__)[:-1]
        stored = {tuple(row[column] for column in names) for row in rows}
        for setting in tqdm([setting for setting in settings if setting not in stored], desc=name, file=sys.stderr):
            rows.append(compute(*setting))
            with atomic_file(path) as file:
                file.write(pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
