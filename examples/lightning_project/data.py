"""Data module of the project: the digits of scikit-learn at two sites."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

#: Where the validation samples of a site begin, and its test samples.
BOUNDS = (550, 700)


class DigitsOfSite(LightningDataModule):
    """Digits (1, 8, 8) in [0, 1] of one site; the sites share no sample.

    Args:
        site: 0 or 1.
        batch_size: Samples per batch, at least 1.
    """

    def __init__(self, site: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        self.site, self.batch_size = site, batch_size

    def setup(self, stage: str) -> None:
        """Split the samples of the site."""
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[self.site :: 2]
        self.parts = [TensorDataset(x[part], torch.tensor(labels)[part]) for part in order.tensor_split(BOUNDS)]

    def _loader(self, part: int, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(self.parts[part], self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, shuffled."""
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation samples."""
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test samples."""
        return self._loader(2)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test samples."""
        return self._loader(2)
