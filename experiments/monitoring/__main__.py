"""Measure false alarms and delays of the monitor on FashionMNIST.

Run `python -m experiments.monitoring`. A federation of two clients is trained once, and the exits of client 0 are
calibrated. Streams are drawn from its test samples, clean or corrupted from the change on. The monitor is
compared with tests in fixed windows of the same familywise level, and on exits with MAPIE. Scores and rows that are
stored are not computed again, and an interrupted training is resumed. On one core it takes about half an hour, nearly
all of it training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.hospital_runs import Row, is_stored, store
from experiments.monitoring.scores import CLEAN, Scores, scores_of, train
from experiments.monitoring.streams import (
    NEVER,
    Design,
    at_target,
    draw,
    mapie_alarms,
    monitor_alarms,
    window_alarms,
)

RESULTS = Path(__file__).resolve().parents[2] / "results" / "monitoring"

#: Changes: name of the pool, corruption and severity. The third was added after the scores of the others were seen.
CHANGES = {
    "gaussian_noise-3": ("gaussian_noise", 3),
    "contrast-3": ("contrast", 3),
    "gaussian_noise-5": ("gaussian_noise", 5),
}

#: Further numbers of arrivals before the change, added likewise: windows do not begin there.
LATER_CHANGES = (1050,)

#: Scenario in which the error rate equals the target risk: the boundary of the hypothesis.
AT_TARGET = "at target"

#: Confidence of the exit policy.
CONFIDENCE = 0.9


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    result = argparse.ArgumentParser(prog="python -m experiments.monitoring", description=__doc__)
    result.add_argument("--streams", type=int, default=1000, help="Streams per scenario (default 1000).")
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/monitoring"), help="Folder of run and scores.")
    result.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSV files with the rows.")
    return result.parse_args(argv)


def families(scores: dict[str, Scores], scenario: str) -> dict[str, list[str]]:
    """Return the quantities that share a level: with labels, and without."""
    if scenario == AT_TARGET:
        return {"labelled": ["exit 1"]}
    thresholds = scores[CLEAN]["thresholds"]
    exits = [f"exit {index + 1}" for index in np.flatnonzero(np.isfinite(thresholds[:-1]))]
    return {"labelled": [*exits, "do_no_harm"], "unlabelled": ["confidence", "disagreement"]}


def rows_of(design: Design, scores: dict[str, Scores], scenario: str) -> list[Row]:
    """Return the rows of a scenario: one per test and quantity, and per family."""
    streams = at_target(design) if scenario == AT_TARGET else draw(design, scores, scenario)
    change = design.arrivals if scenario in (AT_TARGET, CLEAN) else design.change
    rows = []
    for family, quantities in families(scores, scenario).items():
        tests = {"monitor": monitor_alarms}
        tests |= {f"window {length}": partial(window_alarms, window=length) for length in design.windows}
        if family == "labelled":
            tests["MAPIE"] = mapie_alarms
        for test, first_alarms in tests.items():
            # MAPIE follows a risk in [0, 1] with a fixed limit, so not the excess loss of do no harm.
            followed = [name for name in quantities if name != "do_no_harm" or test != "MAPIE"]
            alarms = {name: first_alarms(design, streams, name, len(quantities)) for name in followed}
            alarms["any"] = np.min(list(alarms.values()), axis=0)
            rows += [
                {"family": family, "test": test, "quantity": name, **_summary(first, change)}
                for name, first in alarms.items()
            ]
    return rows


def _summary(first: npt.NDArray[Any], change: int) -> Row:
    """Count alarms before and after the change, and delays without a false alarm."""
    is_false = first < change
    delays = first[~is_false] - change + 1
    low, median, high = np.quantile(delays, [0.25, 0.5, 0.75], method="higher") if len(delays) else [NEVER] * 3
    return {
        "streams": len(first),
        "false_alarms": int(is_false.sum()),
        "alarms_after": int(np.isfinite(delays).sum()),
        "delay_low": low,
        "delay": median,
        "delay_high": high,
    }


def pool_rows(scores: dict[str, Scores], design: Design) -> list[Row]:
    """Return the true error rates, excess losses and drift means of each pool."""
    rows = []
    for pool, values in scores.items():
        for quantity in chain.from_iterable(families(scores, pool).values()):
            if quantity.startswith("exit"):
                takes = values["exits"] == int(quantity.removeprefix("exit "))
                mean, limit, samples = values["errors"][takes].mean(), design.target_risk, int(takes.sum())
            else:
                column = values["excess" if quantity == "do_no_harm" else quantity]
                limit = design.margin if quantity == "do_no_harm" else float("nan")
                mean, samples = column.mean(), len(column)
            rows.append({"pool": pool, "quantity": quantity, "samples": samples, "mean": mean, "limit": limit})
    return rows


def _key(design: Design, scenario: str) -> Row:
    """Return the columns that name a scenario and its design."""
    columns = {name: value for name, value in asdict(design).items() if name not in ("streams", "windows")}
    return {"scenario": scenario, **columns, "drawn": design.streams}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score, draw the streams, and print the rows."""
    arguments = parse(argv)
    design, folder = replace(Design(), streams=arguments.streams), arguments.output / "federation"
    path, pools = arguments.results / "streams.csv", arguments.results / "pools.csv"
    designs = [(design, scenario) for scenario in (CLEAN, AT_TARGET, *CHANGES)]
    designs += [(replace(design, change=change), scenario) for change in LATER_CHANGES for scenario in CHANGES]
    missing = [pair for pair in designs if not is_stored(_key(*pair), path)]
    if missing:
        train(folder, arguments.root)
        scores = scores_of(folder, CHANGES, design.target_risk, CONFIDENCE)
        store({"network": "FedeKD, client 0"}, pool_rows(scores, design), pools)
        for changed, scenario in missing:
            store(_key(changed, scenario), rows_of(changed, scores, scenario), path)
            print(scenario, changed.change, flush=True)
    print(pd.read_csv(pools).to_string(index=False))
    print(pd.read_csv(path).to_string(index=False))


if __name__ == "__main__":
    main()
