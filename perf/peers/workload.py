"""Data, network and clock of all contenders."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedekd.data import FederatedDataModule, Samples
from fedekd.models import PrivateCNN

#: Options of all contenders.
EPOCHS, BATCH, RATE = 2, 64, 0.01


@dataclass
class Clock:
    """Wall and CPU time at the end of each round, in seconds, and peak memory.

    Attributes:
        ends: Times at the end of each round.
        peak: Largest memory at the end of a round in MiB.
    """

    ends: list[tuple[float, float]] = field(default_factory=list)
    peak: float = 0.0

    def tick(self, *_: object) -> None:
        """Note the end of a round."""
        self.ends.append((time.perf_counter(), self.cpu()))
        self.peak = max(self.peak, self.memory())

    def cpu(self) -> float:
        """Return the CPU time so far in seconds."""
        return time.process_time()

    def memory(self) -> float:
        """Return the peak memory so far in MiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def report(self, parameters: Iterable[Tensor]) -> None:
        """Print the mean times of the rounds after the first one as JSON.

        And the CPU time of the process until the end of the first round, its peak memory in MiB, and the 2-norm of the
        global model.
        """
        pairs, rounds = zip(self.ends[0], self.ends[-1], strict=True), len(self.ends) - 1
        wall, cpu = ((last - first) / rounds for first, last in pairs)
        norm = sum(float(tensor.detach().double().square().sum()) for tensor in parameters) ** 0.5
        print(json.dumps({"wall": wall, "cpu": cpu, "start_up": self.ends[0][1], "peak": self.peak, "norm": norm}))


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train a network for one visit, as a plain PyTorch loop.

    Args:
        network: The network.
        images: Scaled images of a client, shape (n, 1, size, size).
        labels: Their labels, shape (n,).
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()


@dataclass
class Workload:
    """Clients with equally many random grey images.

    Attributes:
        clients: Number of clients.
        images: Training images of a client; a tenth as many each validate and test.
        size: Height and width of an image.
        rounds: Rounds.
        every_round: Whether fedekd saves every round.
    """

    clients: int
    images: int
    size: int
    rounds: int
    every_round: bool = False

    @classmethod
    def from_arguments(cls) -> Workload:
        """Read the command line: clients, images, size, rounds; and use one thread."""
        parser = argparse.ArgumentParser()
        for name in ("clients", "images", "size", "rounds"):
            parser.add_argument(name, type=int)
        parser.add_argument("--every_round", action="store_true")
        torch.set_num_threads(1)
        return cls(**vars(parser.parse_args()))

    def network(self) -> nn.Module:
        """Return the global model with its initial weights."""
        torch.manual_seed(0)
        return PrivateCNN(image_size=self.size)

    def data(self) -> FederatedDataModule:
        """Return the partitioned images."""
        few = max(1, round(self.images / 10))
        total = self.images + 2 * few
        generator, shape = torch.Generator().manual_seed(0), (self.clients * total, 1, self.size, self.size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (len(images),), generator=generator)
        fractions = (self.images / total, few / total, few / total)
        data = FederatedDataModule(
            "fashionmnist",
            num_clients=self.clients,
            partition="iid",
            min_samples=2,
            batch_size=BATCH,
            fractions=fractions,
        )
        data.adopt(Samples("fashionmnist", images, labels, "classification", 10))
        data.setup()
        assert {len(splits.train) for splits in data.clients} == {self.images}
        return data

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return training images as float32 in [-1, 1], and their labels.

        Shapes (clients, images, 1, size, size) and (clients, images).
        """
        data = self.data()
        rows = torch.stack([splits.train for splits in data.clients])
        return data.samples.inputs[rows].float() / 127.5 - 1, data.samples.targets[rows]
