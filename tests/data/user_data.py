"""Data sets as a user writes them, for tests: importable by other processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fedekd.models import ProxyCNN


class Blobs(Dataset[Any]):
    """Images of three classes, drawn from their numbers."""

    def __init__(self, length: int = 60, seed: int = 0, size: int = 8, wrong: int | None = None) -> None:
        self.length, self.seed, self.size, self.wrong = length, seed, size, wrong

    def __len__(self) -> int:
        return self.length

    def label(self, index: int) -> int:
        return (index + self.seed) % 3

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == self.wrong:
            raise OSError(f"file {index} is truncated")
        rng = np.random.default_rng((self.seed, index))
        pixels = rng.integers(0, 80, (1, self.size, self.size)) + 80 * self.label(index)
        return torch.from_numpy(pixels.astype(np.uint8)), self.label(index)


class Labelled(Blobs):
    """Has labels, names of classes and patients, and cannot be read without need."""

    classes = ("low", "mid", "high")

    def __init__(self, length: int = 60, seed: int = 0) -> None:
        super().__init__(length, seed)
        self.targets = [self.label(index) for index in range(length)]
        self.groups = [index // 2 for index in range(length)]
        self.reads: list[int] = []

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads.append(index)
        return super().__getitem__(index)


class Pictures(Blobs):
    """PIL images in colour."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x, y = super().__getitem__(index)
        return Image.fromarray(x[0].numpy()).convert("RGB"), y


class Noisy(Blobs):
    """Draws from every global generator, as augmentation in a data set does."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x, y = super().__getitem__(index)
        noise = int(torch.randint(0, 9, ())) + random.randrange(9) + int(np.random.randint(9))
        return x // 2 + noise, y


class Triples(Blobs):
    """Items that are no pairs."""

    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), "weight")


class Mixed(Blobs):
    """The images differ in size from number 20 on."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x, y = super().__getitem__(index)
        return (x if index < 20 else x[:, :6]), y


class Stream(IterableDataset[Any]):
    """Has no positions."""

    def __iter__(self) -> Any:
        return iter([(torch.zeros(1, 8, 8), 0)])


class Marked(Blobs):
    """Appends a line to a file at each read."""

    def __init__(self, folder: str, length: int = 60) -> None:
        super().__init__(length)
        self.folder = folder

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with (Path(self.folder) / "reads.txt").open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


class Module(LightningDataModule):
    """Has training, validation and test loaders."""

    def __init__(self, seed: int = 0, stream: bool = False) -> None:
        super().__init__()
        self.seed, self.stream = seed, stream
        self.parts: dict[str, Any] = {}

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str | None = None) -> None:
        assert self.prepared
        self.parts = {"train": Blobs(30, self.seed), "val": Blobs(12, self.seed + 1), "test": Blobs(9, self.seed + 2)}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream() if self.stream else self.parts["train"], batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["val"], batch_size=4)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.parts["test"], batch_size=4)]


class WithDropout(ProxyCNN):
    """A network that draws random numbers during training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(x, 0.1, self.training))


class Halve:
    """A transform that is no module: random brightness by Python's generator."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x // random.randint(1, 4)


class Scaled:
    """Multiplies by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def fails(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such\nfilter")


class Cropped:
    """Changes the shape."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:]


class Failing:
    """Fails at every sample."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return fails(x)


class NotCallable:
    """No transform."""
