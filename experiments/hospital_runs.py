"""Runs at hospital scale: 3,000 images, 6 clients, learning rate 1e-3.

Experiments share the runs: one that is finished is not repeated, one that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedekd.atomic import atomic_file
from fedekd.cli import main as fedekd
from fedekd.configuration.load_run import open_finished
from fedekd.methods import Client

Row = dict[str, Any]

#: Columns that name a run.
KEY = ("dataset", "alpha", "method", "seed")

_OPTIONS = (
    *("--data.max_samples=3000", "--data.extra_test=500", "--data.num_clients=6", "--rounds=5"),
    *("--client.local_epochs=2", "--client.optimizer.lr=0.001", "--trainer.threads=1", "--logger=null", "--quiet"),
)


class Run(NamedTuple):
    """One federated run; fields as in `KEY`."""

    dataset: str
    alpha: float
    method: str
    seed: int


def parser(name: str, description: str | None, methods: Sequence[str], results: Path) -> argparse.ArgumentParser:
    """Create the parser of an experiment.

    Args:
        name: Module of the experiment.
        description: Text of its help.
        methods: Default methods.
        results: Default file of the rows.
    """
    result = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    result.add_argument("--datasets", nargs="+", default=["cifar10", "fashionmnist"], help="Names of configurations.")
    result.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.5], help="Concentrations.")
    result.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13], help="Seeds.")
    result.add_argument("--methods", nargs="+", default=list(methods), help="Methods by name.")
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/hospital"), help="Folder of the runs.")
    result.add_argument("--results", type=Path, default=results, help="CSV file to which the rows are written.")
    return result


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of the command line, seed by seed."""
    for seed, dataset, alpha, method in product(
        arguments.seeds, arguments.datasets, arguments.alphas, arguments.methods
    ):
        yield Run(dataset, alpha, method, seed)


def clients_of(run: Run, arguments: argparse.Namespace) -> list[Client]:
    """Train a run unless it is finished, and return its clients."""
    name = f"{run.dataset}-{run.alpha:g}-{run.method.lower()}-{run.seed:02d}"
    folder = arguments.output / name
    if not (folder / "summary.json").is_file():
        local = f"--baseline_dir={arguments.output / 'local'}"
        fixed = [f"--data.alpha={run.alpha}", f"--method={run.method}", f"--seed={run.seed}", f"--output={folder}"]
        new = [f"--config={run.dataset}.yaml", f"--data.root={arguments.root}", *_OPTIONS, *fixed, local]
        is_started = (folder / "config.yaml").is_file()
        if code := fedekd(["fit", *(["--quiet", "--resume", str(folder)] if is_started else new)]):
            sys.exit(code)
    return open_finished("fit", folder, in_process=True)[0].load_clients()


def is_stored(run: Run, path: Path) -> bool:
    """Return whether the rows of a run are in the results."""
    if not path.is_file():
        return False
    known = pd.read_csv(path)
    return bool((known[list(KEY)] == pd.Series(run._asdict())).all(axis=1).any())


def store(run: Run, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add the rows of a run to the results, with the commit of the code."""
    shown = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    frame = pd.DataFrame([{**run._asdict(), **row, "commit": shown.stdout.strip()} for row in rows])
    if path.is_file():
        frame = pd.concat([pd.read_csv(path), frame])
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = frame.sort_values(list(KEY), kind="stable")
    with atomic_file(path) as file:
        file.write(frame.to_csv(index=False, float_format="%.6g").encode())


def mean_and_error(values: pd.Series) -> str:
    """Format the mean over seeds and its standard error."""
    error = f" ({values.std(ddof=1) / len(values) ** 0.5:.4f})" if len(values) > 1 else ""
    return f"{values.mean():+.4f}{error}"
