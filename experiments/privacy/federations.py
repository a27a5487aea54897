"""Federations under attack, and the confidences of the networks they send."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.privacy.membership import logit_confidence
from fedekd.configuration.options import parts_of
from fedekd.data import ClientSplits, FederatedDataModule, Samples
from fedekd.federation import ClientResult, Orchestrator, RoundRequest, SequentialEngine, SilentObserver
from fedekd.functional import log_label_prior
from fedekd.methods import Client, FederationSpec, Method, StateDict
from fedekd.seeding import derive_seed

Floats = npt.NDArray[np.float64]

#: Attacked networks: the last update of a client, and the last global message.
TARGETS = ("update", "global")

#: Network whose outputs are attacked: with the label prior of the client added, or not.
ADJUSTMENTS = ("none", "prior")

#: Added to each class count of the prior, as in the loss of ProxyEnsemble.
_SMOOTHING = 0.01

#: Confidences of networks that diverged are cut here.
_LARGEST = 1e6


@dataclass(frozen=True)
class PartOfData:
    """Samples with some of the training samples, as an engine reads them."""

    samples: Samples
    clients: list[ClientSplits]


class RecordingEngine(SequentialEngine):
    """Engine that keeps the last update of each client."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.updates: dict[int, StateDict] = {}

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """See `Engine`."""
        for result in super().run_clients(request):
            if result.update is not None:
                # The tensors of an update may be those of the network, which the next message overwrites.
                self.updates[result.client] = {name: value.clone() for name, value in result.update.state.items()}
            yield result


@dataclass(frozen=True)
class Confidences:
    """Logit-scaled confidences of the attacked networks.

    Attributes:
        train: By client, those of all its training samples, shape (targets, adjustments, n).
        test: By client, those of its test samples, likewise.
    """

    train: dict[int, Floats]
    test: dict[int, Floats]


class Federation:
    """One setting: data, method, noise and seed.

    Args:
        options: Options of `fit`.
    """

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.parts = parts_of(options)
        self.data: FederatedDataModule = self.parts["data"]
        self.spec = FederationSpec.from_parts(
            self.data,
            self.parts["client"],
            self.parts["trainer"],
            rounds=self.parts["rounds"].rounds,
            seed=self.parts["seed"],
            num_clients=self.data.num_clients,
            default_exits=self.parts["method"].exits,
        )

    def run(self, baseline_dir: str) -> tuple[dict[str, Any], Confidences]:
        """Run the whole federation; return its summary and the confidences."""
        run = Orchestrator(**self.parts | {"engine": RecordingEngine, "loggers": []}, baseline_dir=baseline_dir)
        summary = run.run()
        return summary, self._confidences(run.method, run.engine)  # type: ignore[arg-type]

    def run_shadow(self, number: int) -> tuple[list[npt.NDArray[np.bool_]], Confidences]:
        """Train a federation on a random half of each client's training samples.

        Pairs of shadows, 2i and 2i + 1, have complementary halves: every sample is in half of the federations.

        Args:
            number: Number of the shadow, which also enters the seed of the training.

        Returns:
            True for the samples of each client that were used, shape (n,), and the confidences.
        """
        used = [self._half(splits, number) for splits in self.data.clients]
        clients = [
            replace(splits, train=splits.train[torch.from_numpy(half)])
            for splits, half in zip(self.data.clients, used, strict=True)
        ]
        spec = replace(self.spec, seed=derive_seed(self.spec.seed, number, "shadow"))
        method, numbers = copy.deepcopy(self.parts["method"]), list(range(len(clients)))
        engine = RecordingEngine(method, PartOfData(self.data.samples, clients), spec, None, SilentObserver())
        method.init_server(spec)
        for round_idx in range(spec.rounds):
            broadcast = method.broadcast(numbers, round_idx)
            request = RoundRequest(numbers, broadcast, round_idx, True, privacy=self.parts["privacy"])
            method.aggregate([result.update for result in engine.run_clients(request)], round_idx)
        return used, self._confidences(method, engine)

    def _half(self, splits: ClientSplits, number: int) -> npt.NDArray[np.bool_]:
        """Return which training samples of a client a shadow uses."""
        rng = np.random.default_rng(derive_seed(self.spec.seed, splits.client, number // 2, "half"))
        chosen = rng.permutation(len(splits.train)) < len(splits.train) // 2
        return chosen if number % 2 == 0 else ~chosen

    def _confidences(self, method: Method, engine: RecordingEngine) -> Confidences:
        numbers = list(range(len(self.data.clients)))
        broadcast = method.broadcast(numbers, self.spec.rounds)
        train, test = {}, {}
        for number in numbers:
            sent = {"update": engine.updates[number], "global": broadcast.to(number)}
            # All training samples, also those that a shadow did not use.
            client = Client(number, self.data.clients[number], engine.samples, engine.spec)
            for name in TARGETS:
                client.networks[name] = _attacked(engine.clients[number], sent[name])
            train[number], test[number] = (self._of_split(client, split) for split in ("train", "test"))
        return Confidences(train, test)

    @staticmethod
    def _of_split(client: Client, split: str) -> Floats:
        targets = client.targets(split).cpu().numpy()
        counts = torch.bincount(client.targets("train"), minlength=client.spec.num_outputs)
        offsets = {"none": 0.0, "prior": log_label_prior(counts, _SMOOTHING).cpu().numpy()}
        values = []
        for name in TARGETS:
            logits = client.predict(name, split, mixed=False).output.cpu().double().numpy()
            values.append([logit_confidence(logits + offsets[adjustment], targets) for adjustment in ADJUSTMENTS])
        finite = np.nan_to_num(np.asarray(values), nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        return finite.clip(-_LARGEST, _LARGEST)


def _attacked(client: Client, sent: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return the network that was sent, with the head of the client if frozen."""
    network = copy.deepcopy(client.networks["proxy" if "proxy" in client.networks else "private"])
    state = network.state_dict()
    network.load_state_dict({**state, **{name: tensor for name, tensor in sent.items() if name in state}})
    return network
