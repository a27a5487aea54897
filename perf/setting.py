"""What all contenders share: data, models, number of steps, precision, threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedekd.data import FederatedDataModule, ImageData, load_images
from fedekd.errors import UserError
from fedekd.methods import Client, ClientOptions, FederationSpec, Method
from fedekd.modules import TrainerFactory


@dataclass
class CalibrationTarget:
    """One benchmark's common ground.

    Attributes:
        data: FashionMNIST, or random images of its shape, dealt to six clients at alpha 0.1.
        spec: How networks are built and trained.
        images: All images, uint8, on the device.
        targets: All labels, on the device.
        source: Where the images come from.
    """

    data: FederatedDataModule
    spec: FederationSpec
    images: Tensor
    targets: Tensor
    source: str

    @property
    def batch_size(self) -> int:
        """Samples of a training batch."""
        return self.spec.batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples of an evaluation batch."""
        return self.spec.eval_batch_size

    @property
    def epochs(self) -> int:
        """Epochs of a phase."""
        return self.spec.client.local_epochs

    @property
    def trainer(self) -> TrainerFactory:
        """Device, precision and threads."""
        return self.spec.trainer

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.trainer.torch_device

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return self.trainer.autocast()

    def synchronize(self) -> None:
        """Wait for what was launched on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def client(self, method: Method, indices: Tensor) -> Client:
        """A client that trains on the samples `indices`, ready for its first phase."""
        method.init_server(self.spec)
        images = replace(self.data.images, pixels=self.images, targets=self.targets)
        client = Client(0, replace(self.data.clients[0], train=indices), images, self.spec)
        method.init_client(client)
        return client


def make_setting(trainer: TrainerFactory, root: str, samples: int, seed: int = 0) -> CalibrationTarget:
    """FashionMNIST's first `samples` images, or random ones where it is not at hand; nothing is downloaded."""
    try:
        whole, source = load_images("fashionmnist", root, download=False), "FashionMNIST"
        images, targets = whole.pixels[:samples], whole.targets[:samples]
    except UserError:
        source = "random images of FashionMNIST's shape"
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8, generator=generator)
        targets = torch.randint(0, 10, (samples,), generator=generator)
    data = FederatedDataModule("fashionmnist", num_clients=6, alpha=0.1, seed=seed)
    data.adopt(ImageData("fashionmnist", images.contiguous(), targets, "classification", 10, {"train": samples}))
    data.setup()
    spec = FederationSpec.from_parts(data, ClientOptions(), trainer, rounds=1, seed=seed, num_clients=6)
    device = spec.trainer.torch_device
    return CalibrationTarget(data, spec, data.images.pixels.to(device), data.images.targets.to(device), source)
