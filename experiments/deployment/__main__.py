"""Compare rules by which a client deploys a model of ProxyEnsemble.

Run `python -m experiments.deployment`. Every client's local model and the candidates are evaluated on its tuning,
holdout and test samples, once per run. The decisions of all rules follow from these counts, and are summarised in
`summary.csv`, next to the counts. Runs are trained at
hospital scale (`experiments.hospital_runs`) without controls; finished runs and stored rows are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from experiments.deployment.rules import deployed, summary
from experiments.hospital_runs import Row, clients_of, is_stored, parser, runs, store
from fedekd.atomic import atomic_file
from fedekd.methods import Client, ProxyEnsemble
from fedekd.methods.serving import CANDIDATE, Candidate, Serving

RESULTS = Path(__file__).resolve().parents[2] / "results" / "do_no_harm" / "deployment" / "counts.csv"

SPLITS = ("tuning", "holdout", "test")


def equal_weights(client: Client, method: ProxyEnsemble) -> Serving:
    """Return the ensemble of `--method.combination equal`."""
    servings = [client.single("private"), *(method.candidates()[name](client) for name in ("proxy", "tuned"))]
    parts = [serving for serving in servings if serving is not None]
    offsets = torch.cat([serving.offsets for serving in parts])
    weights = torch.full((len(parts),), 1 / len(parts), dtype=offsets.dtype)
    return Serving(tuple(serving.members[0] for serving in parts), weights, offsets)


def losses(client: Client, candidate: Candidate) -> dict[str, Tensor]:
    """Return 0 or 1 per sample of each split."""
    with client.trial(candidate):
        return {split: client.held_out(split, CANDIDATE)[0].cpu() for split in SPLITS}


def rows_of(clients: Sequence[Client]) -> list[Row]:
    """Return one row per client and candidate: counts, and test accuracies."""
    method, rows = ProxyEnsemble(), []
    for client in clients:
        # The private model is trained on labels only, as the local baseline.
        local = losses(client, Candidate("local", None))
        servings = {name: serve(client) for name, serve in method.candidates().items() if name != "private"}
        servings["equal"] = equal_weights(client, method)
        for name, serving in servings.items():
            own = losses(client, Candidate(name, serving))
            row: Row = {"client": client.number, "candidate": name}
            for split in SPLITS[:2]:
                difference = local[split] - own[split]
                row |= {f"{split}_samples": len(difference), f"{split}_worse": int((difference < 0).sum())}
                row |= {f"{split}_better": int((difference > 0).sum())}
            row |= {"test_samples": len(own["test"]), "local": float(1 - local["test"].mean())}
            rows.append(row | {"accuracy": float(1 - own["test"].mean())})
    return rows


def main() -> None:
    """Evaluate the runs of the command line, and print the table."""
    arguments = parser("experiments.deployment", __doc__, ["ProxyEnsemble"], RESULTS).parse_args()
    for run in runs(arguments):
        if not is_stored(run._asdict(), arguments.results):
            clients = clients_of(run, arguments, ["--baseline.control=false"])
            store(run._asdict(), rows_of(clients), arguments.results)
        print(*run, flush=True)
    table = summary(deployed(pd.read_csv(arguments.results)))
    with atomic_file(arguments.results.with_name("summary.csv")) as file:
        file.write(table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
