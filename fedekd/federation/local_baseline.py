"""Local baseline of a client: its model trained on its own data, cached on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedekd.atomic import atomic_file, remove_drafts, seal, unseal
from fedekd.federation.baseline_key import baseline_key
from fedekd.federation.checkpoint import pack, unpack
from fedekd.federation.source_code import SourceUnavailableError
from fedekd.methods import Client, Local

#: Splits on which a client may compare its local model with the federated one.
COMPARED_SPLITS = ("tuning", "holdout")

#: Least time between two writes of an unfinished baseline; a killed run repeats what it trained since the last.
WRITE_SECONDS = 10.0

#: Age from which the draft of a baseline belongs to a killed process: runs share the folder.
DRAFT_SECONDS = 3600.0


@dataclass
class LocalBaseline:
    """Results of local training after each round.

    Attributes:
        scores: Primary metric on the test split; entry i is after i + 1 rounds of `local_epochs` each. An engine may
            leave it empty and return all metrics.
        losses: Loss per sample of the splits `tuning` and `holdout`, see `Client.held_out`. They stay on the client.
        metrics: All metrics on the test split by key; an engine may leave it empty and return the scores.
        tuning_losses: Mean supervised loss on the tuning split, see `Client.supervised_loss`; NaN without samples.
        held_out_scores: Scores of two classes on the splits of `losses`, see `Client.held_out`; likewise.
    """

    scores: list[float]
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    tuning_losses: list[float] = field(default_factory=list)
    held_out_scores: list[dict[str, Tensor]] = field(default_factory=list)

    def after(self, rounds: int) -> float:
        """Return the score after a number of rounds, clipped to those trained."""
        return self.scores[self._index(rounds)]

    def metrics_after(self, rounds: int) -> dict[str, float]:
        """Return all metrics after a number of rounds, clipped likewise."""
        return self.metrics[self._index(rounds)] if self.metrics else {}

    def losses_after(self, rounds: int, split: str) -> Tensor:
        """Return the losses (n,) on a split after a number of rounds, clipped likewise."""
        return self.losses[self._index(rounds)][split]

    def scores_after(self, rounds: int, split: str) -> Tensor:
        """Return the scores of two classes on a split, likewise."""
        return self.held_out_scores[self._index(rounds)][split]

    def _index(self, rounds: int) -> int:
        return min(max(rounds, 1), len(self.scores or self.metrics)) - 1


class WriteInterval:
    """Time since the last write of an unfinished baseline."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def is_over(self) -> bool:
        """Return whether the next write is due; if so, the interval starts again."""
        now = time.monotonic()
        if is_over := now - self._start >= WRITE_SECONDS:
            self._start = now
        return is_over


def train_local_baseline(
    client: Client,
    rounds: int,
    folder: Path | None,
    warn: Callable[[str], None] | None = None,
    memory: MutableMapping[int, bytes] | None = None,
) -> LocalBaseline:
    """Train the local baseline, continuing from the cached rounds.

    It is cached after the last round, and every `WRITE_SECONDS` at the end of a round.

    Args:
        client: Client in its initial state; it is changed.
        rounds: Rounds of `local_epochs` each, at least 1.
        folder: Folder of the cache; None caches nothing.
        warn: Called with the reason where a baseline has no key, and is neither read nor cached in the folder.
        memory: By client, baselines that are not cached in the folder, such as those without a key; None keeps none.

    Returns:
        Results of the requested rounds; the cache may have more.
    """
    method = Local()
    if folder is not None:
        remove_drafts(folder, min_age=DRAFT_SECONDS)
    path = _path(client, folder, warn)
    kept = None if memory is None or path is not None else memory.get(client.number)
    baseline, state = _read(path) if kept is None else _parts(unpack(kept))
    metrics, losses, tuning_losses = baseline.metrics, baseline.losses, baseline.tuning_losses
    held_out_scores = baseline.held_out_scores
    if state is not None:
        client.load_state_dict(state)
    interval = WriteInterval()
    for round_idx in range(len(metrics) + 1, rounds + 1):
        method.receive(client, {}, round_idx)
        metrics.append(client.evaluate()[1])
        held_out = {split: client.held_out(split) for split in COMPARED_SPLITS}
        losses.append({split: values.cpu() for split, (values, _) in held_out.items()})
        held_out_scores.append({split: values.cpu() for split, (_, values) in held_out.items()})
        tuning_losses.append(client.supervised_loss("tuning"))
        if (path is None and memory is None) or not (round_idx == rounds or interval.is_over()):
            continue
        content = {
            "metrics": metrics,
            "losses": losses,
            "tuning": tuning_losses,
            "held_out_scores": held_out_scores,
            "state": client.state_dict(),
        }
        write_cached(path, content)
        if path is None and memory is not None:
            memory[client.number] = pack(content)
    name = client.spec.primary.name  # not part of the key: one baseline serves every choice of metrics
    scores = [values[name] for values in metrics[:rounds]]
    return LocalBaseline(scores, losses[:rounds], metrics[:rounds], tuning_losses[:rounds], held_out_scores[:rounds])


def train_local_model(new_client: Callable[[], Client], rounds: int, folder: Path | None) -> Client:
    """Return a client with the local model of exactly a number of rounds.

    Args:
        new_client: Returns the client in its initial state.
        rounds: Rounds of `local_epochs` each, at least 1.
        folder: Folder of the cache; None caches nothing.
    """
    local = new_client()
    train_local_baseline(local, rounds, folder)
    return exact_local_model(local, new_client, rounds)


def exact_local_model(local: Client, new_client: Callable[[], Client], rounds: int) -> Client:
    """Return the client, trained again if the cached baseline has more rounds."""
    if local.supervised_rounds == rounds:
        return local
    local = new_client()
    train_local_baseline(local, rounds, None)
    return local


def read_local_baseline(client: Client, folder: Path | None) -> LocalBaseline:
    """Return the cached results of the local baseline; empty without any.

    Args:
        client: Client in its initial state.
        folder: Folder of the cache.
    """
    return _read(_path(client, folder))[0]


def restore_local_baseline(client: Client, rounds: int, folder: Path | None) -> bool:
    """Load the cached local model of exactly `rounds` rounds into a new client.

    Returns whether the cache has it.
    """
    baseline, state = _read(_path(client, folder))
    if state is None or len(baseline.metrics) != rounds:
        return False
    client.load_state_dict(state)
    return True


def _path(client: Client, folder: Path | None, warn: Callable[[str], None] | None = None) -> Path | None:
    if folder is None:
        return None
    try:
        return folder / f"{baseline_key(client)}.pt"
    except SourceUnavailableError as error:
        if warn is not None:
            warn(f"local baselines are trained in every run, because their code cannot be compared: {error}")
        return None


def read_cached(path: Path | None) -> Any:
    """Return what was cached in a file; None without a file, or if it is corrupt."""
    if path is None or not path.exists():
        return None
    try:
        return unpack(unseal(path.read_bytes()))
    except Exception:  # a corrupt file counts as missing: train again and overwrite it
        return None


def write_cached(path: Path | None, content: Any) -> None:
    """Write plain values atomically, with a checksum; without a path nothing."""
    if path is not None:
        with atomic_file(path) as file:
            file.write(seal(pack(content)))


def _read(path: Path | None) -> tuple[LocalBaseline, Any]:
    content = read_cached(path)
    try:
        return (LocalBaseline([]), None) if content is None else _parts(content)
    except Exception:  # of another structure: counts as missing
        return LocalBaseline([]), None


def _parts(content: Any) -> tuple[LocalBaseline, Any]:
    """Return a stored baseline without `scores`, and the client's state."""
    parts = (list(content[name]) for name in ("losses", "metrics", "tuning", "held_out_scores"))
    return LocalBaseline([], *parts), content["state"]
