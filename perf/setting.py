"""Workload of all contenders: data, models, steps, precision, threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedekd.data import FederatedDataModule, Samples, load_samples
from fedekd.errors import UserError
from fedekd.methods import Client, ClientOptions, FederationSpec, Method
from fedekd.modules import TrainerFactory


@dataclass
class Workload:
    """Data and models that all contenders train.

    Attributes:
        data: FashionMNIST, or random images of its shape, partitioned across six clients (alpha 0.1).
        spec: How models are built and trained.
        images: All images, uint8, on the device.
        targets: All labels, on the device.
        source: Name of the data.
    """

    data: FederatedDataModule
    spec: FederationSpec
    images: Tensor
    targets: Tensor
    source: str

    @property
    def batch_size(self) -> int:
        """Size of a training batch."""
        return self.spec.batch_size

    @property
    def eval_batch_size(self) -> int:
        """Size of an evaluation batch."""
        return self.spec.eval_batch_size

    @property
    def epochs(self) -> int:
        """Epochs per phase."""
        return self.spec.client.local_epochs

    @property
    def trainer(self) -> TrainerFactory:
        """Device, precision and threads."""
        return self.spec.trainer

    @property
    def device(self) -> torch.device:
        """Device of training."""
        return self.trainer.torch_device

    def autocast(self) -> torch.autocast:
        """Return a context manager with the precision of forward passes."""
        return self.trainer.autocast()

    def synchronize(self) -> None:
        """Wait for all kernels on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def client(self, method: Method, indices: Tensor) -> Client:
        """Return a client that trains on the samples `indices`."""
        method.init_server(self.spec)
        images = replace(self.data.samples, inputs=self.images, targets=self.targets)
        client = Client(0, replace(self.data.clients[0], train=indices), images, self.spec)
        method.init_client(client)
        return client


def make_setting(trainer: TrainerFactory, root: str, samples: int, seed: int = 0) -> Workload:
    """Return the workload on FashionMNIST, or on random images without the data.

    Nothing is downloaded.

    Args:
        trainer: Device, precision and threads.
        root: Folder of the data files.
        samples: Number of images.
        seed: Seed of the random images, the partition and the models.
    """
    try:
        whole, source = load_samples("fashionmnist", root, download=False), "FashionMNIST"
        images, targets = whole.inputs[:samples], whole.targets[:samples]
    except UserError:
        source = "random images of FashionMNIST's shape"
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8, generator=generator)
        targets = torch.randint(0, 10, (samples,), generator=generator)
    data = FederatedDataModule("fashionmnist", num_clients=6, alpha=0.1, seed=seed)
    data.adopt(Samples("fashionmnist", images.contiguous(), targets, "classification", 10))
    data.setup()
    spec = FederationSpec.from_parts(data, ClientOptions(), trainer, rounds=1, seed=seed, num_clients=6)
    device = spec.trainer.torch_device
    return Workload(data, spec, data.samples.inputs.to(device), data.samples.targets.to(device), source)
