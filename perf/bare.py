"""(a) The reference: FedeKD's two training phases as bare PyTorch, everything tuned by hand for the machine.

Tensors in memory, channels last, autocast, fused Adam, the teacher asked once a phase, nothing logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from perf.setting import CalibrationTarget

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _batches(setting: CalibrationTarget, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Places within `indices`, images and labels of one epoch's batches."""
    order = torch.randperm(len(indices)).to(indices.device)
    for places in order.split(setting.batch_size):
        chosen = indices[places]
        x = setting.images[chosen].float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
        yield places, x, setting.targets[chosen]


@torch.no_grad()
def _teach(setting: CalibrationTarget, teacher: nn.Module, indices: Tensor) -> Tensor:
    teacher.eval()
    parts = []
    with setting.autocast():
        for chosen in indices.split(setting.eval_batch_size):
            x = setting.images[chosen].float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
            parts.append(teacher(x))
    teacher.train()
    return torch.cat(parts).float()


def _train(setting: CalibrationTarget, network: nn.Module, teacher: nn.Module, indices: Tensor, loss: Loss) -> None:
    teacher_outputs = log_softmax(_teach(setting, teacher, indices), dim=1)
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
    """Eq. 5: the supervised loss, and the proxy's where the gate trusts it (Eq. 1-4)."""
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


def private_phase(setting: CalibrationTarget, private: nn.Module, proxy: nn.Module, indices: Tensor) -> None:
    """The backward stage: the private model learns from labels and from the proxy."""
    _train(setting, private, proxy, indices, gated)


def proxy_phase(setting: CalibrationTarget, private: nn.Module, proxy: nn.Module, indices: Tensor) -> None:
    """The forward stage: the proxy learns to answer as the private model does."""
    _train(setting, proxy, private, indices, distilled)
