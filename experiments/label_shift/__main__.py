"""Serve models on test sets of another class mix, with and without correction.

Run `python -m experiments.label_shift`. Each client's deployed model predicts samples drawn from the test splits of all
clients, none of which trained a model. The class mix is the client's own, uniform, its own in reverse order (the most
frequent class becomes the rarest), or that of the next client. The served prior is that of training (no correction),
the true one of the drawn samples, uniform, or estimated from the drawn samples without their labels. The correction
starts from the network's prior, as `fedekd predict --label_prior`, or for comparison from the training prior. Runs are
trained at hospital scale (`experiments.hospital_runs`); finished runs and stored rows are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from experiments.hospital_runs import KEY, Row, clients_of, is_stored, mean_and_error, parser, runs, store
from fedekd.cli.label_prior import ESTIMATED, TRAIN, UNIFORM, network_label_prior, resolve_label_prior
from fedekd.functional import adjust_log_prior
from fedekd.methods import Client
from fedekd.seeding import derive_seed

RESULTS = Path(__file__).resolve().parents[2] / "results" / "label_shift" / "label_shift.csv"

#: Numbers of test inputs that are drawn, from which the prior is estimated.
SIZES = (50, 500)

TRUE, FROM_TRAINING = "true", "from training prior"


def class_mixes(counts: Tensor, other_counts: Tensor) -> dict[str, Tensor]:
    """Return the class mixes of the test sets of a client by name, shape (C,) each.

    Args:
        counts: Training samples of the client per class, shape (C,).
        other_counts: Those of another client.
    """
    own = counts.double() / counts.sum()
    reversed_mix = torch.empty_like(own)
    reversed_mix[own.argsort(stable=True)] = own.sort(descending=True).values
    mixes = {"own": own, "uniform": torch.full_like(own, 1 / len(own)), "reversed": reversed_mix}
    return mixes | {"other client": other_counts.double() / other_counts.sum()}


def draw(targets: Tensor, mix: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples with a class mix, with replacement.

    Args:
        targets: Classes of the samples, shape (N,).
        mix: Probability of each class, shape (C,). A class without samples is left out.
        size: Number of samples drawn.
        generator: Source of randomness.

    Returns:
        Positions in `targets`, shape (size,), and the class mix without classes that have no samples, shape (C,).
    """
    counts = torch.bincount(targets, minlength=len(mix))
    possible = torch.where(counts > 0, mix, 0.0)
    possible = possible / possible.sum()
    weights = (possible / counts.clamp_min(1))[targets]
    return torch.multinomial(weights, size, replacement=True, generator=generator), possible


def evaluate(logits: Tensor, targets: Tensor, source: Tensor, training: Tensor, true: Tensor) -> list[Row]:
    """Score the served priors on one test set.

    Args:
        logits: Uncorrected outputs, shape (n, C).
        targets: Classes, shape (n,).
        source: Prior of the network, shape (C,).
        training: The client's training prior, shape (C,).
        true: Class mix from which the samples were drawn, shape (C,).

    Returns:
        One row per served prior: `served`, `accuracy`, and `prior_error`, the total variation distance of the served
        prior to the true one.
    """
    priors = {
        TRAIN: (training, training),
        TRUE: (source, true),
        UNIFORM: (source, resolve_label_prior(UNIFORM, logits, source)),
        ESTIMATED: (source, resolve_label_prior(ESTIMATED, logits, source)),
        f"{TRUE}, {FROM_TRAINING}": (training, true),
        f"{ESTIMATED}, {FROM_TRAINING}": (training, resolve_label_prior(ESTIMATED, logits, training)),
    }
    rows = []
    for served, (start, prior) in priors.items():
        predicted = adjust_log_prior(logits, start, prior).argmax(dim=1)
        error = float((prior - true).abs().sum() / 2)
        rows.append({"served": served, "accuracy": float((predicted == targets).double().mean()), "prior_error": error})
    return rows


def rows_of(clients: Sequence[Client], seed: int) -> list[Row]:
    """Return one row per client, class mix, number of inputs and served prior."""
    pool = torch.cat([client.splits.test for client in clients]).unique()
    classes = clients[0].spec.num_outputs
    counts = [torch.bincount(client.targets("train").cpu(), minlength=classes) for client in clients]
    rows = []
    for client in clients:
        source, training, splits = network_label_prior(client), client.label_prior, client.splits
        client.splits = replace(splits, test=pool)
        logits = client.predict(client.deployed_role, "test", mixed=False).output.cpu().double()
        targets = client.targets("test").cpu()
        client.splits = splits
        for name, mix in class_mixes(counts[client.number], counts[(client.number + 1) % len(clients)]).items():
            for size in SIZES:
                generator = torch.Generator().manual_seed(derive_seed(seed, client.number, "label_shift", name, size))
                drawn, true = draw(targets, mix, size, generator)
                shift = float((true - training).abs().sum() / 2)
                shared = {"client": client.number, "mix": name, "inputs": size, "shift": shift}
                rows += [shared | row for row in evaluate(logits[drawn], targets[drawn], source, training, true)]
    return rows


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy by class mix and served prior.

    Means over clients, then over seeds. `train` is the accuracy without correction; the other columns are differences
    to it, with the standard error over seeds.
    """
    lines = []
    for (dataset, alpha, method, size, mix), group in results.groupby(
        ["dataset", "alpha", "method", "inputs", "mix"], sort=False
    ):
        means = group.groupby(["seed", "served"], sort=False)["accuracy"].mean().unstack()
        base = means.pop(TRAIN)
        gains = {name: mean_and_error(values - base) for name, values in means.items()}
        setting = {"setting": f"{dataset}, {alpha:g}", "method": method, "inputs": size, "mix": mix}
        lines.append(setting | {TRAIN: f"{base.mean():.3f}"} | gains)
    return pd.DataFrame(lines)


def main() -> None:
    """Evaluate the runs of the command line, and print a table."""
    methods = ("Local", "FedeKD", "ProxyEnsemble")
    arguments = parser("experiments.label_shift", __doc__, methods, RESULTS).parse_args()
    for run in runs(arguments):
        if not is_stored(run._asdict(), arguments.results):
            store(run._asdict(), rows_of(clients_of(run, arguments), run.seed), arguments.results)
        print(*run, flush=True)
    results = pd.read_csv(arguments.results)
    results = results[results[KEY[2]].isin(arguments.methods)]
    print(summary(results).to_string(index=False))


if __name__ == "__main__":
    main()
