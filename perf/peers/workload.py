"""What all contenders train, and the times of their rounds."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedekd.models import PrivateCNN

#: Options of all contenders.
EPOCHS, BATCH, RATE = 2, 64, 0.01


@dataclass
class Clock:
    """Wall and CPU time at the end of each round, in seconds."""

    ends: list[tuple[float, float]] = field(default_factory=list)

    def tick(self, *_: object) -> None:
        """Note the end of a round."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def report(self) -> None:
        """Print the mean time of the rounds after the first one, as JSON."""
        pairs, rounds = zip(self.ends[0], self.ends[-1], strict=True), len(self.ends) - 1
        wall, cpu = ((last - first) / rounds for first, last in pairs)
        print(json.dumps({"wall": wall, "cpu": cpu}))


@dataclass
class Workload:
    """Clients with equally many random grey images.

    Attributes:
        clients: Number of clients.
        images: Training images of a client.
        size: Height and width of an image.
        rounds: Rounds.
    """

    clients: int
    images: int
    size: int
    rounds: int

    @classmethod
    def from_arguments(cls) -> Workload:
        """Read the command line: clients, images, size, rounds; and use one thread."""
        parser = argparse.ArgumentParser()
        for name in ("clients", "images", "size", "rounds"):
            parser.add_argument(name, type=int)
        torch.set_num_threads(1)
        return cls(**vars(parser.parse_args()))

    def network(self) -> nn.Module:
        """Return the global model with its initial weights."""
        torch.manual_seed(0)
        return PrivateCNN(image_size=self.size)

    def samples(self, per_client: int) -> tuple[Tensor, Tensor]:
        """Return uint8 images (clients, per_client, 1, size, size) and their labels."""
        generator, shape = torch.Generator().manual_seed(0), (self.clients, per_client, 1, self.size, self.size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.randint(0, 10, (self.clients, per_client), generator=generator)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return the training images as float32 in [-1, 1], and their labels."""
        images, labels = self.samples(self.images)
        return images.float() / 127.5 - 1, labels
