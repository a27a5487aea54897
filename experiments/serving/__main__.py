"""Compare weights of the members of ProxyEnsemble at serving time.

Run `python -m experiments.serving`. The members are the private model, the global proxy and the tuned proxy, both with
the client's label prior. Weights are fitted on the client's tuning split, or on its whole validation split. Runs are
trained at hospital scale (`experiments.hospital_runs`); finished runs and stored rows are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from experiments.hospital_runs import KEY, Row, clients_of, is_stored, mean_and_error, parser, runs, store
from experiments.serving.combiners import EQUAL, FITTED, FITTED_ENTROPY, combiners
from fedekd.methods import Client
from fedekd.seeding import derive_seed

RESULTS = Path(__file__).resolve().parents[2] / "results" / "trust" / "serving.csv"

MEMBERS = ("private", "proxy", "tuned")


def member_log_probabilities(client: Client, split: str) -> Tensor:
    """Return the members' log-probabilities on a split, (3, n, C), float64."""
    assert client.serving is not None
    offsets = dict(zip(client.serving.members, client.serving.offsets.cpu().double(), strict=True))
    outputs = [client.predict(name, split, mixed=False).output.cpu().double() + offsets[name] for name in MEMBERS]
    return torch.stack(outputs).log_softmax(dim=2)


def rows_of(clients: Sequence[Client], seed: int) -> list[Row]:
    """Return one row per client and combination."""
    rows = []
    for client in clients:
        test, targets = member_log_probabilities(client, "test"), client.targets("test").cpu()
        predictions: dict[str, Tensor] = dict(zip(MEMBERS, test.argmax(dim=2), strict=True))
        for split in ("tuning", "validation"):
            held_out, labels = member_log_probabilities(client, split), client.targets(split).cpu()
            found = combiners(held_out, labels, test, seed=derive_seed(seed, client.number, "serving"))
            if split == "validation":
                found = {f"{name}, whole validation split": found[name] for name in (FITTED, FITTED_ENTROPY)}
            predictions |= found
        shared = {"client": client.number, "tuning_samples": len(client.splits.tuning), "test_samples": len(targets)}
        for name, predicted in predictions.items():
            accuracy = float((predicted == targets).double().mean())
            rows.append(shared | {"combination": name, "accuracy": accuracy})
    return rows


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Return the difference of each combination to equal weights, by setting.

    Means over clients, then over seeds, with the standard error of the paired differences over seeds.
    """
    columns = {}
    for (dataset, alpha), group in results.groupby(["dataset", "alpha"], sort=False):
        means = group.groupby(["seed", "combination"], sort=False)["accuracy"].mean().unstack()
        base = means.pop(EQUAL)
        cells = {name: mean_and_error(values - base) for name, values in means.items()}
        columns[f"{dataset}, {alpha:g} ({len(base)} seeds)"] = {EQUAL: f"{base.mean():.4f}"} | cells
    return pd.DataFrame(columns)


def main() -> None:
    """Evaluate the runs of the command line, and print the table."""
    arguments = parser("experiments.serving", __doc__, ["ProxyEnsemble"], RESULTS).parse_args()
    for run in runs(arguments):
        if not is_stored(run._asdict(), arguments.results):
            store(run._asdict(), rows_of(clients_of(run, arguments), run.seed), arguments.results)
        print(*run, flush=True)
    results = pd.read_csv(arguments.results)
    print(summary(results[results[KEY[2]].isin(arguments.methods)]).to_string())


if __name__ == "__main__":
    main()
