"""Results of federations by where they belong: data set, alpha, method, seed."""

from __future__ import annotations

from collections.abc import Iterable

from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.results import Row

#: Labels of the sweeps of Figures 3 and 4, by what they begin with.
SWEEPS = ("beta ", "lambda_kd ")

_OTHER_OPTIONS = ", other options"


class Measured:
    """What was measured, by place.

    Runs of the paper's data sets with other options than the paper's grid stand apart, as a data set of their own. Of
    several configurations under one name each is a method of its own: their mean would say nothing.

    Args:
        rows: Rows of results, as `read_results` gives them.
        paper_keys: Keys of the paper's grid; without any, nothing is set apart.
    """

    def __init__(self, rows: Iterable[Row], paper_keys: Iterable[str] = ()) -> None:
        self._rows: dict[tuple[str, str, float], dict[int, Row]] = {}
        known = set(paper_keys)
        placed = [_placed(row, bool(known) and row["key"] not in known) for row in rows]
        configurations: dict[tuple[str, str, float], set[str]] = {}
        for row in placed:
            configurations.setdefault(_place(row), set()).add(row["configuration"])
        for row in placed:
            if len(configurations[_place(row)]) > 1:
                row["method"] += f" ({row['configuration'][:6]})"
        for row in placed:
            self._rows.setdefault(_place(row), {}).setdefault(int(row["seed"]), row)

    @property
    def rows(self) -> list[Row]:
        """All rows, with `dataset` and `method` as they are called here."""
        return [row for of_place in self._rows.values() for row in of_place.values()]

    @property
    def datasets(self) -> list[str]:
        """Data sets: the paper's in its order, then the others by name."""
        found = {dataset for _, dataset, _ in self._rows}
        return [name for name in DATASETS if name in found] + sorted(found - DATASETS.keys())

    @property
    def apart(self) -> list[str]:
        """Data sets of the paper of which runs with other options stand apart."""
        return [name.removesuffix(_OTHER_OPTIONS) for name in self.datasets if name.endswith(_OTHER_OPTIONS)]

    def alphas(self, dataset: str) -> list[float]:
        """The alphas of a data set, ascending."""
        return sorted({alpha for _, other, alpha in self._rows if other == dataset})

    def methods(self, dataset: str, swept: bool = False) -> list[str]:
        """The methods of a data set, in the order of their rows; or, instead, the values of the swept parameters."""
        found = dict.fromkeys(method for method, other, _ in self._rows if other == dataset)
        return [method for method in found if method.startswith(SWEEPS) == swept]

    def metric(self, dataset: str) -> str:
        """The score of a data set's task: accuracy or rmse."""
        return next(
            row["metric"] for (_, other, _), rows in self._rows.items() if other == dataset for row in rows.values()
        )

    def values(self, measure: str, method: str, dataset: str, alpha: float) -> dict[int, float]:
        """A measure by seed; empty if nothing was run, NaN where a run diverged.

        Local's mean is part of every run, and its Delta is zero: it needs no run of its own.
        """
        if method == "Local":
            return self._of_local(measure, dataset, alpha)
        rows = self._rows.get((method, dataset, alpha), {})
        return {seed: float(row[measure]) for seed, row in sorted(rows.items())}

    def _of_local(self, measure: str, dataset: str, alpha: float) -> dict[int, float]:
        if measure != "mean":
            return {}
        found: dict[int, float] = {}
        for (_, other, at), rows in self._rows.items():
            if (other, at) == (dataset, alpha):
                for seed, row in rows.items():
                    found.setdefault(seed, float(row["local_mean"]))
        return dict(sorted(found.items()))


def _placed(row: Row, foreign: bool) -> Row:
    return {**row, "dataset": row["dataset"] + _OTHER_OPTIONS} if foreign and row["dataset"] in DATASETS else dict(row)


def _place(row: Row) -> tuple[str, str, float]:
    return row["method"], row["dataset"], float(row["alpha"])


def title(dataset: str) -> str:
    """A data set's name to be read.

    Example:
        >>> title("cifar10"), title("cifar10, other options"), title("digits")
        ('CIFAR-10', 'CIFAR-10, other options', 'digits')
    """
    name, comma, rest = dataset.partition(", ")
    return f"{DATASETS.get(name, name)}{comma}{rest}"
