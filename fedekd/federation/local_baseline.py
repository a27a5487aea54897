"""Local, the reference of Delta: trained once per client, kept on disk by what it was trained from."""

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
from fedekd.federation.storage import digest, pack, unpack
from fedekd.methods import Client, Local

#: Splits on which a client may later compare Local with what the federation gave it.
COMPARED_SPLITS = ("tuning", "holdout")

#: What trains and scores a client: a reference made by other code is not reused.
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
    """A hash of the files that define the classes of objects, PyTorch's own left to its version."""
    modules = {type(each).__module__ for each in objects}
    own = sorted(name for name in modules if not name.startswith("torch."))
    files = [getattr(sys.modules[name], "__file__", None) for name in own]
    return digest(b"".join(Path(file).read_bytes() for file in files if file))


def baseline_key(client: Client) -> str:
    """A hash of all that decides what Local gives a client: samples, model, weights, optimizer, seed and code."""
    spec = client.spec.hash_dict()
    spec["client"].pop("proxy_model")  # the proxy takes no part in local training
    for name in ("private_model", "private_models", "exits", "depths"):  # those of the others do not matter
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
    """What a client reaches on its own.

    Attributes:
        scores: Its test score after each round's supervised epochs: entry i after i + 1 rounds.
        losses: What it loses on each sample of its own splits `tuning` and `holdout`, alike; see
            `Client.losses`. They stay with the client.
    """

    scores: list[float]
    losses: list[dict[str, Tensor]] = field(default_factory=list)

    def after(self, rounds: int) -> float:
        """The score after so many rounds of supervised training; the first and the last one bound it."""
        return self.scores[self._place(rounds)]

    def losses_after(self, rounds: int, split: str) -> Tensor:
        """The losses on a split after so many rounds, bounded alike; (n,)."""
        return self.losses[self._place(rounds)][split]

    def _place(self, rounds: int) -> int:
        return min(max(rounds, 1), len(self.scores)) - 1


def train_local_baseline(client: Client, rounds: int, folder: Path | None) -> LocalBaseline:
    """Train Local on a new client for some rounds, going on from what `folder` already holds.

    Every finished round is kept, so that a killed run loses one round of one client at most. More rounds than
    asked for may be there already; only the scores of those asked for are given.

    Args:
        client: A client as it is before its first round; it is changed.
        rounds: Rounds of `local_epochs` each.
        folder: Where references are kept; None keeps nothing.
    """
    method = Local()
    path = None if folder is None else folder / f"{baseline_key(client)}.pt"
    reference, state = _read(path)
    scores, losses = reference.scores, reference.losses
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
    """Make a new client what Local left after exactly so many rounds, if `folder` holds that; whether it does."""
    reference, state = _read(None if folder is None else folder / f"{baseline_key(client)}.pt")
    if state is None or len(reference.scores) != rounds:
        return False
    client.load_state_dict(state)
    return True


def _read(path: Path | None) -> tuple[LocalBaseline, Any]:
    if path is None or not path.exists():
        return LocalBaseline([]), None
    try:
        content = unpack(path.read_bytes())
        return LocalBaseline(list(content["scores"]), list(content["losses"])), content["state"]
    except Exception:  # a damaged file is worth no more than none: it is trained and written anew
        return LocalBaseline([]), None
