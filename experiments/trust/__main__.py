"""Compare FedeKD's gates with their own shuffled weights, at hospital scale.

Run `python -m experiments.trust --seeds 8 --processes 2`. Each finished run adds a row to the results, and runs with a
row are not repeated. Delta of a gate minus that of its control is what the ranking of the samples adds.

Cross-fitting is confounded: each of its two proxies is distilled on half of the samples, with half of the steps, and a
client sends twice as much. A difference to one proxy may be due to any of them. There is no control with two proxies of
which each sample is taught by the one that was distilled on it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.fedekd_paper.statistics import signed_rank
from experiments.hospital_runs import add_seeds, is_stored, seeds, store
from fedekd.benchmark import Block, Cell, cells, run_grid
from fedekd.benchmark.results import Row
from fedekd.cli.benchmark import GridDisplay
from fedekd.modules.losses import GATES

RESULTS = Path(__file__).resolve().parents[2] / "results" / "trust" / "distillation.csv"

KEY = ["setting", "gate", "cross_fit", "seed"]
COLUMNS = [*KEY, "delta", "worst", "commit"]

DATASETS = ("cifar10", "fashionmnist")
ALPHAS = (0.1, 0.5)

#: 3,000 images in all; the rest enlarges the test splits, so that scores have less noise.
OPTIONS: dict[str, Any] = {"data.max_samples": 3000, "data.extra_test": 500, "client.optimizer.lr": 1e-3}

#: Each gate, and what it is compared with.
CONTROLS = {"energy": "shuffled", "reversed": "reversed_shuffled", "correctness": "correctness_shuffled"}


def label(gate: str, cross_fit: bool) -> str:
    """Return the label of a method."""
    return f"{gate}, cross-fit" if cross_fit else gate


METHODS = {label(gate, cross_fit): (gate, cross_fit) for cross_fit in (False, True) for gate in GATES}


def grid(seed: int, root: Path) -> list[Cell]:
    """Return the runs of one seed: every setting, gate, and number of proxies."""
    methods = {
        name: {"class_path": "FedeKD", "init_args": {"gate": gate, "cross_fit": cross_fit}}
        for name, (gate, cross_fit) in METHODS.items()
    }
    blocks = []
    for dataset in DATASETS:
        file = root / f"{dataset}.npz"
        source = {"data.dataset": str(file)} if file.is_file() else {"data.root": str(root)}
        blocks.append(Block([dataset], list(ALPHAS), [seed], methods, {**OPTIONS, **source}))
    return cells(blocks)


def key_of(cell: Cell) -> dict[str, Any]:
    """Return the key of the row of a run."""
    return dict(zip(KEY, [cell.clients, *METHODS[cell.method], cell.seed], strict=True))


def to_result(row: Row) -> dict[str, Any]:
    """Return the columns of the results for a finished run."""
    return {"delta": float(row["delta_avg"]), "worst": float(row["delta_worst"]), "commit": row["commit"]}


def unfinished(grid: Sequence[Cell], path: Path) -> list[Cell]:
    """Return the runs without a row in the results."""
    return [cell for cell in grid if not is_stored(key_of(cell), path)]


def comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare gates with their controls, and two proxies with one, over seeds.

    Returns:
        Per setting and comparison the number of paired seeds, in how many the first is better, the mean difference of
        Delta with its standard error, the p-value of the signed-rank test, and the mean difference of the worst Delta.
    """
    table = rows.pivot_table(index="seed", columns=["setting", "cross_fit", "gate"], values=["delta", "worst"])
    found = []
    for setting in sorted(rows["setting"].unique()):
        pairs = [((fit, gate), (fit, control)) for fit in (False, True) for gate, control in CONTROLS.items()]
        pairs += [((False, gate), (False, "energy")) for gate in ("none", "reversed", "correctness")]
        pairs += [((True, gate), (False, gate)) for gate in ("none", *CONTROLS)]
        for one, other in pairs:
            names = [(setting, *one), (setting, *other)]
            if any(("delta", *name) not in table.columns for name in names):
                continue
            delta, worst = (
                (table[(value, *names[0])] - table[(value, *names[1])]).dropna() for value in ("delta", "worst")
            )
            found.append(
                {
                    "setting": setting,
                    "comparison": f"{label(one[1], one[0])} - {label(other[1], other[0])}",
                    "seeds": len(delta),
                    "better": int((delta > 0).sum()),
                    "delta": delta.mean(),
                    "standard_error": delta.std() / math.sqrt(len(delta)) if len(delta) > 1 else math.nan,
                    "p_value": signed_rank(delta.tolist()),
                    "worst": worst.mean(),
                }
            )
    return pd.DataFrame(found)


class StoringDisplay(GridDisplay):
    """Prints the progress, and adds each finished run to the results."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def cell_finished(self, cell: Cell, row: Row) -> None:
        """Store the row and print it."""
        store(key_of(cell), [to_result(row)], self.path)
        super().cell_finished(cell, row)


def main() -> None:
    """Run the seeds that have no rows yet, and print the comparisons."""
    parser = argparse.ArgumentParser(prog="python -m experiments.trust", description=__doc__)
    add_seeds(parser, 8)
    parser.add_argument("--only", default="", help="Run settings that contain this text, as in 'cifar10 alpha 0.5'.")
    parser.add_argument("--processes", type=int, default=1, help="Runs in parallel (default 1).")
    parser.add_argument("--root", type=Path, default=Path("data"), help="Folder of the data sets (default data).")
    parser.add_argument("--output", type=Path, default=Path("runs/trust"), help="Folder of the runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which the rows are written.")
    arguments = parser.parse_args()
    trainer = {"accelerator": "auto", "precision": "auto", "threads": 1}
    has_failed = False
    for seed in seeds(arguments):
        waiting = unfinished(grid(seed, arguments.root), arguments.results)
        waiting = [cell for cell in waiting if arguments.only in cell.clients]
        if waiting:
            display = StoringDisplay(arguments.results)
            folder, rows = arguments.output, arguments.output / "results"
            try:
                failures = run_grid(waiting, folder, rows, arguments.processes, trainer, display)
            finally:
                display.progress.stop()
            has_failed |= bool(failures)
    if arguments.results.is_file():
        print(comparisons(pd.read_csv(arguments.results)).to_string(index=False, float_format="%+.4f"))
    sys.exit(int(has_failed))


if __name__ == "__main__":
    main()
