"""Scores of a deployed network on clean and corrupted samples, cached on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.hospital_runs import fit
from fedekd.atomic import atomic_file
from fedekd.configuration.trained import open_run
from fedekd.data import corrupt, split_inputs, take_inputs
from fedekd.early_exit import ExitPolicy, SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import calibrate_client
from fedekd.early_exit.deployed import deployed_outputs
from fedekd.early_exit.scoring import BATCH_SIZE
from fedekd.methods import Client
from fedekd.monitoring import MonitoredColumns

Array = npt.NDArray[Any]
Scores = dict[str, Array]

#: Options of `fit`. The test split of the client, with extra samples, is the pool of the streams.
SETTING = (
    *("--config=fashionmnist.yaml", "--method=FedeKD", "--client.exits=3", "--do_no_harm=null", "--logger=null"),
    *("--data.num_clients=2", "--data.alpha=1.0", "--data.max_samples=6000", "--data.extra_test=5000"),
    *("--data.fractions=[0.5,0.4,0.1]", "--rounds=6", "--client.local_epochs=2", "--client.optimizer.lr=0.001"),
    "--trainer.threads=1",
)

#: Name of the pool without corruption.
CLEAN = "none"


def train(folder: Path, root: str, options: tuple[str, ...] = SETTING) -> None:
    """Train the federation unless it is finished; an interrupted run is resumed."""
    fit(folder, [*options, f"--data.root={root}", f"--baseline_dir={folder.parent / 'local'}"])


def scores_of(
    folder: Path, pools: dict[str, tuple[str, int]], target_risk: float, confidence: float
) -> dict[str, Scores]:
    """Return the scores of client 0 on each pool, from disk if they are there.

    Args:
        folder: Folder of the finished run; the scores are stored next to it.
        pools: By name of the pool, corruption and severity.
        target_risk: Target risk of the exit policy.
        confidence: Its confidence.

    Returns:
        By pool: `exits`, from 1, `errors` at the exit, `excess` loss of the federated model over the local one,
        `confidence` and `disagreement`, each of shape (n,), and the `thresholds` of the policy.
    """
    paths = {name: folder.parent / f"scores-{name}-{target_risk:g}-{confidence:g}.npz" for name in (CLEAN, *pools)}
    if not all(path.is_file() for path in paths.values()):
        trained = open_run("monitoring", folder)
        client = trained.clients[0]
        policy = calibrate_client(client, SelectiveRiskCalibrator(target_risk, confidence))
        columns = MonitoredColumns(client, trained.local_model(client))
        for name, path in paths.items():
            if not path.is_file():
                content = io.BytesIO()
                np.savez(content, allow_pickle=False, **_scores(client, policy, columns, pools.get(name)))
                with atomic_file(path) as file:
                    file.write(content.getvalue())
    return {name: dict(np.load(path)) for name, path in paths.items()}


def _scores(
    client: Client, policy: ExitPolicy, columns: MonitoredColumns, corruption: tuple[str, int] | None
) -> Scores:
    """Score the test split of a client, corrupted if a corruption is given."""
    device = client.samples.inputs.device
    images = take_inputs(client.samples.inputs, client.splits.test.to(device))
    assert isinstance(images, torch.Tensor)
    if corruption is not None:
        images = corrupt(images, *corruption)
    targets = client.targets("test").cpu().numpy()
    parts: dict[str, list[Any]] = {}
    labels: list[int] = []
    for batch in split_inputs(images, BATCH_SIZE):
        output = deployed_outputs(client, policy, batch)
        labels += output.logits.argmax(dim=1).tolist()
        for name, values in {"exits": (output.exits + 1).tolist(), **columns.of_batch(batch)}.items():
            parts.setdefault(name, []).extend(values)
    wrong = {name: (np.array(parts[f"label_{name}"]) != targets).astype(float) for name in ("federated", "local")}
    return {
        "exits": np.array(parts["exits"]),
        "errors": (np.array(labels) != targets).astype(float),
        "excess": wrong["federated"] - wrong["local"],
        "confidence": np.array(parts["confidence"]),
        "disagreement": np.array(parts["disagreement"]),
        "thresholds": np.array(policy.thresholds),
    }
