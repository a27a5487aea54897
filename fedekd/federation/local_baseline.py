"""Local baseline of a client: its model trained on its own data, cached on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedekd
from fedekd.atomic import atomic_file
from fedekd.federation.checkpoint import digest, pack, unpack
from fedekd.methods import Client, Local

#: Splits on which a client may compare its local model with the federated one.
COMPARED_SPLITS = ("tuning", "holdout")

#: Code that trains and scores a client: a baseline of other code is not reused.
TRAINING_CODE = (
    "data/batches.py",
    "functional",
    "methods/options.py",
    "methods/specification.py",
    "methods/client.py",
    "methods/local.py",
    "metrics/registry.py",
    "models/build.py",
    "modules",
    "seeding.py",
)


@cache
def _training_code() -> str:
    root = Path(fedekd.__file__).parent
    files = [root / part for part in TRAINING_CODE if part.endswith(".py")]
    files += [path for part in TRAINING_CODE for path in sorted((root / part).rglob("*.py"))]
    return digest(b"".join(path.read_bytes() for path in files))


def _code_of(objects: Iterable[object]) -> str:
    """Hash the files that define the classes of objects.

    PyTorch is left out: its version is in the key.
    """
    names = sorted({type(item).__module__ for item in objects})
    files = [getattr(sys.modules[name], "__file__", None) for name in names if not name.startswith("torch.")]
    return digest(b"".join(Path(file).read_bytes() for file in files if file))


def baseline_key(client: Client) -> str:
    """Hash everything that determines a client's baseline.

    These are samples, model, weights, optimizer, seed and code.
    """
    spec = client.spec.hash_dict()
    spec["client"].pop("proxy_model")  # not used in local training
    for name in ("private_model", "private_models", "exits", "depths"):  # of all clients; this client's follow
        spec["client"].pop(name)
    spec["client"]["private"] = client.spec.client.model_for(client.number)
    spec["client"]["stages"] = client.spec.client.exits_for(client.number)
    spec["client"]["depth"] = client.spec.depth(client.number)
    network = client.networks["private"]
    content = {
        "data": client.splits.digest(client.images),
        "client": client.number,
        "spec": spec,
        "weights": digest(pack(network.state_dict())),
        "model": _code_of(network.modules()),
        "optimizer": _code_of([client.spec.optimizer(network.parameters())]),
        "code": _training_code(),
        "torch": torch.__version__,
    }
    return digest(json.dumps(content, sort_keys=True, default=str).encode())


@dataclass
class LocalBaseline:
    """Results of local training after each round.

    Attributes:
        scores: Test score; entry i is after i + 1 rounds of `local_epochs` each.
        losses: Loss per sample of the splits `tuning` and `holdout`, see `Client.losses`. They stay on the client.
    """

    scores: list[float]
    losses: list[dict[str, Tensor]] = field(default_factory=list)

    def after(self, rounds: int) -> float:
        """Return the score after a number of rounds, clipped to those trained."""
        return self.scores[self._index(rounds)]

    def losses_after(self, rounds: int, split: str) -> Tensor:
        """Return the losses (n,) on a split after a number of rounds, clipped likewise."""
        return self.losses[self._index(rounds)][split]

    def _index(self, rounds: int) -> int:
        return min(max(rounds, 1), len(self.scores)) - 1


def train_local_baseline(client: Client, rounds: int, folder: Path | None) -> LocalBaseline:
    """Train the local baseline, continuing from the cached rounds.

    Every finished round is cached, so that a killed run loses at most one round of one client.

    Args:
        client: Client in its initial state; it is changed.
        rounds: Rounds of `local_epochs` each, at least 1.
        folder: Folder of the cache; None caches nothing.

    Returns:
        Results of the requested rounds; the cache may have more.
    """
    method = Local()
    path = None if folder is None else folder / f"{baseline_key(client)}.pt"
    baseline, state = _read(path)
    scores, losses = baseline.scores, baseline.losses
    if state is not None:
        client.load_state_dict(state)
    for round_idx in range(len(scores) + 1, rounds + 1):
        method.receive(client, {}, round_idx)
        scores.append(client.score())
        losses.append({split: client.losses(split).cpu() for split in COMPARED_SPLITS})
        if path is not None:
            with atomic_file(path) as file:
                file.write(pack({"scores": scores, "losses": losses, "state": client.state_dict()}))
    return LocalBaseline(scores[:rounds], losses[:rounds])


def restore_local_baseline(client: Client, rounds: int, folder: Path | None) -> bool:
    """Load the cached local model of exactly `rounds` rounds into a new client.

    Returns whether the cache has it.
    """
    baseline, state = _read(None if folder is None else folder / f"{baseline_key(client)}.pt")
    if state is None or len(baseline.scores) != rounds:
        return False
    client.load_state_dict(state)
    return True


def _read(path: Path | None) -> tuple[LocalBaseline, Any]:
    if path is None or not path.exists():
        return LocalBaseline([]), None
    try:
        content = unpack(path.read_bytes())
        return LocalBaseline(list(content["scores"]), list(content["losses"])), content["state"]
    except Exception:  # a corrupt file counts as missing: train again and overwrite it
        return LocalBaseline([]), None
