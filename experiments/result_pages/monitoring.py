"""Tables of the monitor after deployment."""

from __future__ import annotations

import math

import pandas as pd
from scipy.stats import binomtest

from experiments.result_pages.common import markdown, minus, read

#: Scenarios of `experiments.monitoring`, as printed.
SCENARIOS = {
    "none": "no change",
    "at target": "error rate at the target",
    "gaussian_noise-3": "Gaussian noise, severity 3",
    "contrast-3": "contrast, severity 3",
    "gaussian_noise-5": "Gaussian noise, severity 5",
}


def _streams() -> pd.DataFrame:
    frame = read("monitoring/streams.csv")
    places = frame["scenario"].map(list(SCENARIOS).index)
    return frame.assign(place=places).sort_values("place", kind="stable")


def monitoring_pools() -> str:
    """True values of the followed quantities in each pool of samples."""
    rows = []
    for row in read("monitoring/pools.csv").itertuples():
        limit = "" if math.isnan(row.limit) else f"at most {row.limit:g}"
        rows.append([SCENARIOS[row.pool], row.quantity, minus(f"{row.mean:.4f}"), limit, f"{row.samples:,}"])
    return markdown(["samples", "quantity", "mean", "hypothesis", "number"], rows)


def monitoring_false_alarms() -> str:
    """Streams with a false alarm of any quantity, with exact intervals."""
    rows = []
    for row in _streams().query("quantity == 'any' and scenario in ('none', 'at target')").itertuples():
        low, high = binomtest(row.false_alarms, row.streams).proportion_ci(method="exact")
        share = f"{row.false_alarms / row.streams:.3f} ({low:.3f} to {high:.3f})"
        rows.append([SCENARIOS[row.scenario], row.family, row.test, share, f"{row.streams:,}"])
    return markdown(["scenario", "arrivals", "test", "streams with a false alarm", "streams"], rows)


def monitoring_delays() -> str:
    """Delay of the first alarm after the change, in arrivals."""
    rows = []
    changed = _streams().query("scenario not in ('none', 'at target') and quantity not in ('any', 'do_no_harm')")
    tests = changed["test"].unique()
    for (_, scenario, change, family, quantity), group in changed.groupby(
        ["place", "scenario", "change", "family", "quantity"], sort=False
    ):
        cells = {}
        for row in group.itertuples():
            delays = [
                f"{value:.0f}" if math.isfinite(value) else "none"
                for value in (row.delay, row.delay_low, row.delay_high)
            ]
            share = row.alarms_after / (row.streams - row.false_alarms)
            cells[row.test] = f"{delays[0]} ({delays[1]} to {delays[2]}), {share:.0%}"
        rows.append([SCENARIOS[scenario], f"{change:,}", family, quantity, *(cells.get(test, "-") for test in tests)])
    return markdown(["change", "after", "arrivals", "quantity", *tests], rows)
