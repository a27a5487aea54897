"""Results of federations by where they belong: data set, alpha, method, seed."""

from __future__ import annotations

from collections.abc import Iterable

from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.results import Row
from fedekd.errors import UserError

#: Columns of the results that are held against each other.
MEASURES = ("delta_avg", "delta_worst", "delta_tail", "mean")


class Measured:
    """What was measured, by place.

    Args:
        rows: Rows of results, as `read_results` gives them.
        paper_keys: Keys of the paper's grid. Rows of the paper's data sets with another key were run with other
            options; they stand apart, as a data set of their own.

    Raises:
        UserError: If two rows are of one place but of different configurations: their mean would say nothing.
    """

    def __init__(self, rows: Iterable[Row], paper_keys: Iterable[str] = ()) -> None:
        self._rows: dict[tuple[str, str, float], dict[int, Row]] = {}
        known = set(paper_keys)
        for row in rows:
            apart = known and row["dataset"] in DATASETS and row["key"] not in known
            dataset = f"{row['dataset']}, other options" if apart else row["dataset"]
            place = (row["method"], dataset, float(row["alpha"]))
            kept = self._rows.setdefault(place, {}).setdefault(int(row["seed"]), row)
            if kept["key"] != row["key"]:
                raise UserError(
                    f"{dataset} alpha {place[2]:g} seed {row['seed']} {place[0]} was run with two configurations "
                    f"({kept['key']}, {row['key']}); report them one at a time"
                )

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for of_place in self._rows.values() for row in of_place.values()]

    @property
    def datasets(self) -> list[str]:
        """Data sets: the paper's in its order, then the others by name."""
        found = {dataset for _, dataset, _ in self._rows}
        return [name for name in DATASETS if name in found] + sorted(found - DATASETS.keys())

    def alphas(self, dataset: str) -> list[float]:
        """The alphas of a data set, ascending."""
        return sorted({alpha for _, other, alpha in self._rows if other == dataset})

    def methods(self, dataset: str) -> list[str]:
        """The methods of a data set, in the order of their rows."""
        return list(dict.fromkeys(method for method, other, _ in self._rows if other == dataset))

    def metric(self, dataset: str) -> str:
        """Accuracy or rmse."""
        return next(
            row["metric"] for (_, other, _), rows in self._rows.items() if other == dataset for row in rows.values()
        )

    def values(self, measure: str, method: str, dataset: str, alpha: float) -> dict[int, float]:
        """A measure by seed; empty if nothing was run.

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
