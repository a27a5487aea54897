"""Compare SafeKD with training on labels: networks with exits on one site.

Run `python -m experiments.safe_exits`. A run trains SafeKD and its local baseline, the same network with the same
initial weights and batches, trained on the labels of all exits. Both are measured: accuracy and calibration error per
exit, area under accuracy against cost, the largest saving of a calibrated policy within a loss of accuracy, latency,
and image corruptions. The policy for a loss is chosen on the tuning and calibration splits among those of several
target risks, and evaluated on the test split; the guarantee of a policy does not cover this choice. Finished runs and
stored rows are not repeated, and interrupted runs are resumed.

On one core a run with all samples takes about an hour (PrivateCNN) or 40 minutes (CIFARResNet), and with `--max_samples
6000` less than ten minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.hospital_runs import add_seeds, fit, is_stored, mean_and_error, seeds, store
from experiments.safe_exits.measures import FILES, Extent, rows_of
from fedekd.configuration.load_run import open_finished
from fedekd.errors import UserError
from fedekd.methods import Client

RESULTS = Path(__file__).resolve().parents[2] / "results" / "exits_seeds"

#: Settings of SafeKD by name: SAFE-KD's (DKD's beta as in its code), with a shorter warm-up, and that of results/exits.
METHODS: dict[str, dict[str, float]] = {
    "SafeKD": {"temperature": 4.0, "dkd_beta": 1.0, "warmup_epochs": 20},
    "SafeKD, warm-up 5": {"temperature": 4.0, "dkd_beta": 1.0, "warmup_epochs": 5},
    "SafeKD, temperature 1": {"temperature": 1.0, "dkd_beta": 1.0, "warmup_epochs": 5},
}

LOCAL = "Local"

#: Columns of the differences that are printed.
PRINTED = ("area", "saved_0.0", "saved_0.5", "change_0.5")


class Run(NamedTuple):
    """One run and the extent of its measurement; `samples` is 0 for all samples."""

    dataset: str
    model: str
    method: str
    seed: int
    samples: int
    epochs: int
    corrupted: int
    batches: int

    def key(self, method: str) -> dict[str, Any]:
        """Return the columns that name a network of the run."""
        return {**self._asdict(), "method": method}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    result = argparse.ArgumentParser(prog="python -m experiments.safe_exits", description=__doc__)
    result.add_argument("--datasets", nargs="+", default=["fashionmnist", "cifar10"], help="Names in early_exit/.")
    result.add_argument("--models", nargs="+", default=["PrivateCNN", "CIFARResNet"], help="Networks of clients.")
    result.add_argument("--methods", nargs="+", default=["SafeKD"], choices=list(METHODS), help="Settings of SafeKD.")
    add_seeds(result, 3)
    result.set_defaults(first_seed=0)
    result.add_argument("--epochs", type=int, default=20, help="Epochs of training (default 20).")
    result.add_argument("--max_samples", type=int, default=0, help="Largest number of samples; 0 (default) for all.")
    result.add_argument("--corrupted", type=int, default=Extent.corrupted, help="Images per corrupted set; 0 for none.")
    result.add_argument("--batches", type=int, default=Extent.batches, help="Batches for latency; 0 for none.")
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/safe_exits"), help="Folder of the runs.")
    result.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSV files with the rows.")
    return result.parse_args(argv)


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of the command line, seed by seed."""
    for seed, dataset, model, method in product(
        seeds(arguments), arguments.datasets, arguments.models, arguments.methods
    ):
        size = (arguments.max_samples, arguments.epochs)
        yield Run(dataset, model, method, seed, *size, arguments.corrupted, arguments.batches)


def clients_of(run: Run, arguments: argparse.Namespace) -> tuple[dict[str, Client], float]:
    """Train a run unless it is finished.

    Returns:
        The client with the network of the method and with that of the local baseline, and the seconds of the run.
    """
    size = f"{run.samples or 'all'}-{run.epochs}"
    name = f"{run.dataset}-{run.model.rpartition('.')[2]}-{run.method}-{size}-{run.seed:02d}".lower()
    folder = arguments.output / name.replace(", ", "-").replace(" ", "-")
    fit(folder, options_of(run, arguments))
    orchestrator, _, summary = open_finished("fit", folder, in_process=True)
    [trained], [baseline] = orchestrator.load_clients(), orchestrator.baseline_clients()
    if baseline is None:
        raise UserError(f"{folder}: expected the local baseline in {arguments.output / 'local'}, got none. Remove both")
    return {run.method: trained, LOCAL: baseline}, float(summary["seconds"])


def options_of(run: Run, arguments: argparse.Namespace) -> list[str]:
    """Return the options of `fit` for a new run."""
    model = f"--client.private_model={run.model}"
    return [
        *(f"--config=early_exit/{run.dataset}.yaml", f"--data.root={arguments.root}", "--logger=null"),
        *(f"--method.{name}={value}" for name, value in METHODS[run.method].items()),
        *(f"--rounds={run.epochs}", "--client.local_epochs=1", f"--seed={run.seed}", "--trainer.threads=1", model),
        *([f"--data.max_samples={run.samples}"] if run.samples else []),
        f"--baseline_dir={arguments.output / 'local'}",
    ]


def measure(run: Run, arguments: argparse.Namespace) -> None:
    """Train and measure the networks of a run whose rows are not stored."""
    paths = {name: arguments.results / f"{name}.csv" for name in FILES}
    missing = [name for name in (run.method, LOCAL) if not is_stored(run.key(name), paths[FILES[-1]])]
    if not missing:
        return
    clients, seconds = clients_of(run, arguments)
    for name in missing:
        rows = rows_of(clients[name], name, Extent(corrupted=run.corrupted, batches=run.batches))
        rows["networks"][0] |= {"settings": json.dumps(METHODS.get(name, {})), "run_seconds": seconds}
        for file, path in paths.items():
            if rows[file]:
                store(run.key(name), rows[file], path)


def differences(networks: pd.DataFrame) -> pd.DataFrame:
    """Return the differences to Local over seeds, by setting and method."""
    setting = ["dataset", "model", "samples", "epochs", "corrupted", "batches"]
    rows = []
    for values, group in networks.groupby(setting, sort=False):
        by_method = {name: part.set_index("seed") for name, part in group.groupby("method", sort=False)}
        local = by_method.pop(LOCAL)
        for name, part in by_method.items():
            paired = part.index.intersection(local.index)
            found = {column: mean_and_error(part.loc[paired, column] - local.loc[paired, column]) for column in PRINTED}
            rows.append(dict(zip(setting, values, strict=True)) | {"method": name, **found, "seeds": len(paired)})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the runs of the command line, and print the differences to Local."""
    arguments = parse(argv)
    for run in runs(arguments):
        measure(run, arguments)
        print(*run, flush=True)
    networks = pd.read_csv(arguments.results / "networks.csv")
    print("Difference to Local: mean over seeds (standard error)")
    print(differences(networks).to_string(index=False))


if __name__ == "__main__":
    main()
