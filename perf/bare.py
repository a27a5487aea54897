"""(a) Bare loop: FedeKD's two training phases in PyTorch, tuned by hand.

Tensors in memory, channels last, autocast, fused Adam, teacher outputs computed once per phase, no logging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from perf.setting import Workload

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _batches(setting: Workload, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over positions, images and labels of the batches of an epoch."""
    order = torch.randperm(len(indices)).to(indices.device)
    for places in order.split(setting.batch_size):
        chosen = indices[places]
        x = setting.images[chosen].float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
        yield places, x, setting.targets[chosen]


@torch.no_grad()
def _teacher_outputs(setting: Workload, teacher: nn.Module, indices: Tensor) -> Tensor:
    teacher.eval()
    parts = []
    with setting.autocast():
        for chosen in indices.split(setting.eval_batch_size):
            x = setting.images[chosen].float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
            parts.append(teacher(x))
    teacher.train()
    return torch.cat(parts).float()


def _train(setting: Workload, network: nn.Module, teacher: nn.Module, indices: Tensor, loss: Loss) -> None:
    teacher_outputs = log_softmax(_teacher_outputs(setting, teacher, indices), dim=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    for _ in range(setting.epochs):
        for places, x, y in _batches(setting, indices):
            with setting.autocast():
                logits = network(x)
            total = loss(log_softmax(logits.float(), dim=1), teacher_outputs[places], y)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()


def gated(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """Gated distillation loss (Eq. 1-5)."""
    q = teacher.exp()
    divergence = (q * (teacher - student)).sum(dim=1)
    with torch.no_grad():
        p = student.exp()
        entropies = -(p * student + q * teacher).sum(dim=1)
        energy = 0.5 * ((p - q) * (student - teacher)).sum(dim=1) / (entropies + 1e-8)
        weights = torch.sigmoid(-(energy - energy.mean()) / (energy.std(correction=0) + 1e-8))
    return nn.functional.nll_loss(student, y) + (weights * divergence).mean()


def distilled(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """KL(teacher || student), averaged over the batch."""
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean()


def private_phase(setting: Workload, private: nn.Module, proxy: nn.Module, indices: Tensor) -> None:
    """Train the private model on labels and on the outputs of the proxy."""
    _train(setting, private, proxy, indices, gated)


def proxy_phase(setting: Workload, private: nn.Module, proxy: nn.Module, indices: Tensor) -> None:
    """Train the proxy on the outputs of the private model."""
    _train(setting, proxy, private, indices, distilled)
