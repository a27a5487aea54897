"""Runs at hospital scale: 3,000 images, 6 clients, learning rate 1e-3.

Experiments share the runs: one that is finished is not repeated, one that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock

from fedekd.atomic import atomic_file
from fedekd.cli import main as fedekd
from fedekd.configuration.load_run import open_finished
from fedekd.methods import Client

Row = dict[str, Any]

#: Columns that name a run.
KEY = ("dataset", "alpha", "method", "seed")

#: Options of `fit`.
SETTING = (
    *("--data.max_samples=3000", "--data.extra_test=500", "--data.num_clients=6", "--rounds=5"),
    *("--client.local_epochs=2", "--client.optimizer.lr=0.001", "--trainer.threads=1", "--logger=null"),
)


class Run(NamedTuple):
    """One federated run; fields as in `KEY`."""

    dataset: str
    alpha: float
    method: str
    seed: int


def add_seeds(result: argparse.ArgumentParser, count: int = 4) -> None:
    """Add the options of `seeds`."""
    result.add_argument("--seeds", type=int, default=count, help=f"Number of seeds (default {count}).")
    result.add_argument("--first_seed", type=int, default=10, help="First seed (default 10).")


def seeds(arguments: argparse.Namespace) -> range:
    """Return the seeds of the command line."""
    return range(arguments.first_seed, arguments.first_seed + arguments.seeds)


def parser(name: str, description: str | None, methods: Sequence[str], results: Path) -> argparse.ArgumentParser:
    """Create the parser of an experiment.

    Args:
        name: Module of the experiment.
        description: Text of its help.
        methods: Default methods; the only one cannot be replaced.
        results: Default file of the rows.
    """
    result = argparse.ArgumentParser(prog=f"python -m {name}", description=description, allow_abbrev=False)
    result.add_argument("--datasets", nargs="+", default=["cifar10", "fashionmnist"], help="Names of configurations.")
    result.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.5], help="Concentrations.")
    add_seeds(result)
    if len(methods) > 1:
        result.add_argument("--methods", nargs="+", default=list(methods), help="Methods by name.")
    result.set_defaults(methods=list(methods))
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/hospital"), help="Folder of the runs.")
    result.add_argument("--results", type=Path, default=results, help="CSV file to which the rows are written.")
    return result


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of the command line, seed by seed."""
    for seed, dataset, alpha, method in product(
        seeds(arguments), arguments.datasets, arguments.alphas, arguments.methods
    ):
        yield Run(dataset, alpha, method, seed)


def clients_of(run: Run, arguments: argparse.Namespace, options: Sequence[str] = ()) -> list[Client]:
    """Train a run unless it is finished, and return its clients.

    Args:
        run: The run.
        arguments: Folders, as those of `parser`.
        options: Further options of `fit` for a new run.
    """
    name = f"{run.dataset}-{run.alpha:g}-{run.method.lower()}-{run.seed:02d}"
    folder = arguments.output / name
    data = [f"--config={run.dataset}.yaml", f"--data.root={arguments.root}", f"--data.alpha={run.alpha}"]
    fixed = [f"--method={run.method}", f"--seed={run.seed}", f"--baseline_dir={arguments.output / 'local'}"]
    fit(folder, [*data, *SETTING, *fixed, *options])
    return open_finished("fit", folder, in_process=True)[0].load_clients()


def fit(folder: Path, options: Iterable[str]) -> None:
    """Train a run unless it is finished; an interrupted one is resumed.

    Args:
        folder: Folder of the run.
        options: Options of `fit` for a new run, without its folder.
    """
    if (folder / "summary.json").is_file():
        return
    is_started = (folder / "config.yaml").is_file()
    new = ["--resume", str(folder)] if is_started else [*options, f"--output={folder}"]
    if code := fedekd(["fit", "--quiet", *new]):
        sys.exit(code)


@cache
def commit() -> str:
    """Return the commit at the first call; `unknown` outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return shown.stdout.strip() or "unknown"


def _read(path: Path) -> pd.DataFrame:
    # A commit of digits only is no number.
    return pd.read_csv(path, dtype={"commit": str, "options": str})


def _has_key(rows: pd.DataFrame, key: Mapping[str, Any]) -> pd.Series:
    columns = rows.reindex(columns=list(key))  # NaN in a column that the rows lack
    return pd.DataFrame(
        {name: columns[name].isna() if value != value else columns[name] == value for name, value in key.items()}
    ).all(axis=1)


def is_stored(key: Mapping[str, Any], path: Path) -> bool:
    """Return whether the results have rows with a key; NaN equals NaN."""
    return path.is_file() and bool(_has_key(_read(path), key).any())


def store(key: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add rows to the results, in place of those with the same key.

    Args:
        key: Columns that name the run or cell.
        rows: The other columns; without `commit`, that of the code is added.
        path: CSV file of the results.
    """
    found = [{**key, **row} for row in rows]
    frame = pd.DataFrame([row if "commit" in row else {**row, "commit": commit()} for row in found])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # another process may add rows
        if path.is_file():
            known = _read(path)
            frame = pd.concat([known[~_has_key(known, key)], frame])
        with atomic_file(path) as file:
            file.write(frame.sort_values(list(key), kind="stable").to_csv(index=False, float_format="%.6g").encode())


def mean_and_error(values: pd.Series) -> str:
    """Format the mean over seeds and its standard error."""
    error = f" ({values.std(ddof=1) / len(values) ** 0.5:.4f})" if len(values) > 1 else ""
    return f"{values.mean():+.4f}{error}"
