"""Compare private models with pretrained and with random initial weights.

Run `python -m experiments.pretrained`. For each seed a private model is trained on FashionMNIST, on one site. Its
weights are the file of `client.private_weights` for six clients with 600 digits of scikit-learn together. All images
have 32x32 pixels. The frozen tensors of all private models are compared with the file, byte for byte. Finished runs and
stored rows are not repeated, and interrupted runs are resumed.

The runs of four seeds take about four minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from experiments.hospital_runs import Row, add_seeds, fit, is_stored, mean_and_error, seeds, store
from fedekd.atomic import atomic_file
from fedekd.configuration.load_run import open_finished
from fedekd.methods import Client
from fedekd.models.freezing import frozen_names

RESULTS = Path(__file__).resolve().parents[2] / "results" / "pretrained" / "digits.csv"

RANDOM = "random"

#: Options of each start; `{weights}` is the file of the pretraining.
STARTS: dict[str, list[str]] = {
    RANDOM: [],
    "pretrained": ["--client.private_weights={weights}"],
    "pretrained, first group frozen": ["--client.private_weights={weights}", "--client.freeze=[stem.*, groups.0.*]"],
}

#: Options of all runs. BatchNorm has statistics, which frozen parts keep.
MODEL = (
    *("--data.image_size=32", "--client.private_model=CIFARResNet", "--client.private_model.norm=batch"),
    *("--client.private_model.base_width=8", "--client.proxy_model=ProxyCNN", "--client.proxy_model.width=0.25"),
    *("--client.optimizer.lr=0.001", "--client.local_epochs=1", "--trainer.threads=1", "--trainer.accelerator=cpu"),
    *("--logger=null", "--quiet"),
)


class Run(NamedTuple):
    """One federated run."""

    method: str
    start: str
    seed: int
    rounds: int
    source: str
    source_samples: int
    max_samples: int


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    result = argparse.ArgumentParser(prog="python -m experiments.pretrained", description=__doc__)
    result.add_argument("--methods", nargs="+", default=["FedeKD", "FedAvg"], help="Methods by name.")
    result.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), help="Initial weights.")
    add_seeds(result)
    result.add_argument("--rounds", type=int, default=10, help="Rounds of 1 local epoch (default 10).")
    result.add_argument("--source", default="fashionmnist", help="Data set of the pretraining (default fashionmnist).")
    result.add_argument("--source_samples", type=int, default=6000, help="Its samples (default 6000).")
    result.add_argument("--max_samples", type=int, default=600, help="Digits of all clients together (default 600).")
    result.add_argument("--root", default="data", help="Folder of the data sets (default data).")
    result.add_argument("--output", type=Path, default=Path("runs/pretrained"), help="Folder of the runs.")
    result.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which the rows are written.")
    return result.parse_args(argv)


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of the command line, seed by seed."""
    for seed, method, start in product(seeds(arguments), arguments.methods, arguments.starts):
        sizes = arguments.source_samples, arguments.max_samples
        yield Run(method, start, seed, arguments.rounds, arguments.source, *sizes)


def pretrain(run: Run, arguments: argparse.Namespace) -> Path:
    """Return the file with the weights of a private model trained on the source data."""
    folder = arguments.output / f"{Path(run.source).stem}-{run.source_samples}-{run.seed:02d}"
    data = [f"--data.dataset={run.source}", f"--data.root={arguments.root}", "--data.num_clients=1"]
    size = [f"--data.max_samples={run.source_samples}", "--data.batch_size=64", "--rounds=3"]
    fit(folder, ["--config=digits.yaml", "--method=Local", *data, *size, f"--seed={run.seed}", *MODEL])
    [client] = open_finished("fit", folder, in_process=True)[0].load_clients()
    weights = folder / "private.pt"
    with atomic_file(weights) as file:
        torch.save({name: tensor.cpu() for name, tensor in client.networks["private"].state_dict().items()}, file)
    return weights


def train(run: Run, weights: Path, arguments: argparse.Namespace) -> Path:
    """Train a run on digits unless it is finished, and return its folder."""
    start = run.start.replace(", ", "-").replace(" ", "-")
    source = f"{Path(run.source).stem}-{run.source_samples}"
    folder = arguments.output / f"{run.method.lower()}-{start}-{source}-{run.max_samples}-{run.rounds}-{run.seed:02d}"
    size = [f"--data.max_samples={run.max_samples}", "--data.extra_test=100", "--data.alpha=0.5"]
    options = [f"--method={run.method}", *(option.format(weights=weights) for option in STARTS[run.start])]
    fixed = [f"--rounds={run.rounds}", f"--seed={run.seed}", f"--baseline_dir={arguments.output / 'local'}"]
    fit(folder, ["--config=digits.yaml", *options, *size, *fixed, *MODEL])
    return folder


def frozen_tensors(clients: Iterable[Client], file: dict[str, Tensor]) -> tuple[int, int]:
    """Count the frozen tensors of private models, and those that differ from a file.

    Tensors are compared byte for byte.
    """
    pairs = [
        (tensor, file[name])
        for client in clients
        for name, tensor in client.networks["private"].state_dict().items()
        if name in frozen_names(client.networks["private"])
    ]
    return len(pairs), sum(not torch.equal(as_bytes(one), as_bytes(other)) for one, other in pairs)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, shape (n,)."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def row_of(folder: Path, weights: Path) -> Row:
    """Return the row of a finished run, of its clients and their local baselines."""
    orchestrator, _, summary = open_finished("fit", folder, in_process=True)
    baselines = [client for client in orchestrator.baseline_clients() if client is not None]
    file = torch.load(weights, weights_only=True)
    frozen, changed = frozen_tensors([*orchestrator.load_clients(), *baselines], file)
    return {
        "accuracy": summary["mean"],
        "local_accuracy": summary["local_mean"],
        "delta": summary["delta"]["avg"],
        "bytes_up": summary["bytes_up"],
        "frozen_tensors": frozen,
        "changed_frozen_tensors": changed,
    }


def measure(run: Run, arguments: argparse.Namespace) -> None:
    """Train and measure a run whose row is not stored."""
    if is_stored(run._asdict(), arguments.results):
        return
    weights = pretrain(run, arguments)
    store(run._asdict(), [row_of(train(run, weights, arguments), weights)], arguments.results)


def table(results: pd.DataFrame) -> str:
    """Return the table of the documentation: means over seeds, and gains.

    A gain is over random weights, paired by seed; its standard error is in parentheses.
    """
    lines = [
        "| method | initial weights | accuracy | gain | Local | gain | Delta | MB sent | seeds |",
        "| --- " * 9 + "|",
    ]
    groups = {name: group.set_index("seed") for name, group in results.groupby(["method", "start"])}
    for method, start in sorted(groups, key=lambda name: (name[0], list(STARTS).index(name[1]))):
        part, random = groups[method, start], groups.get((method, RANDOM))
        cells = []
        for name in ("accuracy", "local_accuracy"):
            gain = (
                mean_and_error((part[name] - random[name]).dropna()) if start != RANDOM and random is not None else ""
            )
            cells += [f"{part[name].mean():.4f}", gain]
        size = part["bytes_up"].mean() / 1e6
        cells += [mean_and_error(part["delta"]), f"{size:.2f}", str(len(part))]
        lines.append(f"| {' | '.join([method, start, *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the runs of the command line, and print the table."""
    arguments = parse(argv)
    for run in runs(arguments):
        measure(run, arguments)
        print(*run, flush=True)
    results = pd.read_csv(arguments.results)
    for name in ("rounds", "source", "source_samples", "max_samples"):
        results = results[results[name] == getattr(arguments, name)]
    print(table(results))
    print(f"{results['changed_frozen_tensors'].sum()} of {results['frozen_tensors'].sum()} frozen tensors changed")


if __name__ == "__main__":
    main()
