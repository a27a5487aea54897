"""Local, the reference of Delta: trained once per client, kept on disk by what it was trained from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedekd
from fedekd.atomic import atomic_file
from fedekd.federation.storage import digest, pack, unpack
from fedekd.methods import Client, Local


def reference_key(client: Client) -> str:
    """A hash of everything that decides what Local gives a client: its samples, model, optimizer, seed, numerics."""
    blueprint = client.blueprint.fingerprint()
    blueprint["client"].pop("proxy_model")  # the proxy takes no part in local training
    blueprint["client"]["private_model"] = client.blueprint.private_model(client.number)
    content = {
        "data": client.splits.digest(client.images),
        "client": client.number,
        "blueprint": blueprint,
        "torch": torch.__version__,
        "fedekd": fedekd.__version__,
    }
    return digest(json.dumps(content, sort_keys=True, default=str).encode())


@dataclass
class LocalReference:
    """What a client reaches on its own.

    Attributes:
        scores: Its test score after each round's supervised epochs: entry i after i + 1 rounds.
        state: The client's state after the last of them.
    """

    scores: list[float]
    state: dict[str, Any] | None = None

    def after(self, rounds: int) -> float:
        """The score after so many rounds of supervised training; the first and the last one bound it."""
        return self.scores[min(max(rounds, 1), len(self.scores)) - 1]


def train_reference(client: Client, rounds: int, folder: Path | None) -> LocalReference:
    """Train Local on a new client for some rounds, going on from what `folder` already holds.

    Every finished round is kept, so that a killed run loses one round of one client at most. More rounds than
    asked for may be there already; only the scores of those asked for are given.

    Args:
        client: A client as it is before its first round; it is changed.
        rounds: Rounds of `local_epochs` each.
        folder: Where references are kept; None keeps nothing.
    """
    method = Local()
    path = None if folder is None else folder / f"{reference_key(client)}.pt"
    kept = _read(path)
    if kept.state is not None:
        client.load_state_dict(kept.state)
    for round in range(len(kept.scores) + 1, rounds + 1):
        method.absorb(client, {}, round)
        kept = LocalReference([*kept.scores, client.score()], client.state_dict())
        if path is not None:
            with atomic_file(path) as file:
                file.write(pack({"scores": kept.scores, "state": kept.state}))
    return LocalReference(kept.scores[:rounds], kept.state if len(kept.scores) == rounds else None)


def _read(path: Path | None) -> LocalReference:
    if path is None or not path.exists():
        return LocalReference([])
    try:
        content = unpack(path.read_bytes())
        return LocalReference(list(content["scores"]), content["state"])
    except Exception:  # a damaged file is worth no more than none: it is trained and written anew
        return LocalReference([])
