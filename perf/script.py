"""(c) Script: the same two phases as in typical research code.

A DataLoader per phase, float32 in PyTorch's default layout, the teacher run in every step, the loss copied to the host
in every step, whole models pickled between phases.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from perf.setting import Workload


class Images(Dataset[Any]):
    """Images of a client, scaled one by one."""

    def __init__(self, setting: Workload, indices: Tensor) -> None:
        self.images, self.targets = setting.data.samples.inputs, setting.data.samples.targets  # on the host
        self.indices = indices.cpu()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        index = self.indices[place]
        return self.images[index].float() / 127.5 - 1.0, self.targets[index]


def _pickled_copy(network: nn.Module, setting: Workload) -> nn.Module:
    received: nn.Module = pickle.loads(pickle.dumps(network))
    return received.to(setting.device, memory_format=torch.contiguous_format)


def gated(logits: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """Gated distillation loss (Eq. 5), term by term."""
    p, q = F.softmax(logits, dim=1), F.softmax(teacher, dim=1)
    log_p, log_q = torch.log(p + 1e-8), torch.log(q + 1e-8)
    divergence = 0.5 * ((p * (log_p - log_q)).sum(dim=1) + (q * (log_q - log_p)).sum(dim=1))
    energy = (divergence / (-(p * log_p).sum(dim=1) - (q * log_q).sum(dim=1) + 1e-8)).detach()
    weights = torch.sigmoid(-(energy - energy.mean()) / (energy.std(unbiased=False) + 1e-8))
    distillation = F.kl_div(F.log_softmax(logits, dim=1), q, reduction="none").sum(dim=1)
    return F.cross_entropy(logits, y) + (weights * distillation).mean()


def distilled(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), averaged over the batch."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


def private_phase(setting: Workload, private: nn.Module, proxy: nn.Module, indices: Tensor) -> nn.Module:
    """Train the private model."""
    private, proxy = _pickled_copy(private, setting), _pickled_copy(proxy, setting)
    loader = DataLoader(Images(setting, indices), batch_size=setting.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(private.parameters(), lr=1e-4)
    private.train()
    proxy.eval()
    for _ in range(setting.epochs):
        running = 0.0
        for x, y in loader:
            x, y = x.to(setting.device), y.to(setting.device)
            optimizer.zero_grad()
            logits = private(x)
            with torch.no_grad():
                teacher = proxy(x)
            loss = gated(logits, teacher, y)
            loss.backward()
            optimizer.step()
            running += loss.item()
    return _pickled_copy(private, setting)


def proxy_phase(setting: Workload, private: nn.Module, proxy: nn.Module, indices: Tensor) -> nn.Module:
    """Train the proxy."""
    private, proxy = _pickled_copy(private, setting), _pickled_copy(proxy, setting)
    loader = DataLoader(Images(setting, indices), batch_size=setting.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(proxy.parameters(), lr=1e-4)
    proxy.train()
    private.eval()
    for _ in range(setting.epochs):
        running = 0.0
        for x, _y in loader:
            x = x.to(setting.device)
            optimizer.zero_grad()
            with torch.no_grad():
                teacher = private(x)
            loss = distilled(proxy(x), teacher)
            loss.backward()
            optimizer.step()
            running += loss.item()
    return _pickled_copy(proxy, setting)


@torch.no_grad()
def accuracy(setting: Workload, private: nn.Module, indices: Tensor) -> float:
    """Return the test accuracy of a client."""
    private.eval()
    loader = DataLoader(Images(setting, indices), batch_size=256)
    right = sum(int((private(x.to(setting.device)).argmax(dim=1).cpu() == y).sum()) for x, y in loader)
    return right / max(1, len(indices))
