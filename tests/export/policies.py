"""A small network with exits, a proxy, and a policy for random images."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.policy import GroupExits
from fedekd.export.inputs import PixelScaling
from fedekd.export.served import OUTPUTS
from fedekd.functional import score_exit
from fedekd.models import MultiExitNetwork, PrivateCNN, ProxyCNN, multi_exit

SHAPE = (1, 8, 8)


def images(count: int = 400, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def calibrated(score: str, gap: float = 1e-5) -> tuple[MultiExitNetwork, nn.Module, ExitPolicy]:
    """A random network, a proxy, and a policy whose thresholds lie between two scores of `images()`."""
    torch.manual_seed(1)
    network = multi_exit(PrivateCNN(in_channels=1, image_size=8, num_classes=4), 4, 3).eval()
    proxy = ProxyCNN(in_channels=1, image_size=8, num_classes=4).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.6)  # scores that differ
        x = PixelScaling(torch.float32)(images())
        scores = [score_exit(score, logits, proxy(x), 0.5).double().sort().values for logits in network(x)[:-1]]
    limits = []
    for number, quantile in ((0, 0.7), (0, 0.5), (1, 0.6)):
        values = scores[number]
        start = int(quantile * len(values))
        index = next(i for i in range(start, len(values) - 1) if values[i + 1] - values[i] > gap)
        limits.append(float(values[index] + values[index + 1]) / 2)
    first, bound, second = limits
    policy = ExitPolicy(
        thresholds=(first, second, -math.inf),
        search_bounds=(bound, second, -math.inf),  # samples between bound and threshold take the last exit
        certified=(True, True, False),
        target_risk=0.1,
        confidence=0.9,
        mode="ltt",
        score=score,
        gamma=0.5,
    )
    return network, proxy, policy


def framework(network: MultiExitNetwork, proxy: nn.Module, policy: ExitPolicy, raw: Tensor) -> dict[str, np.ndarray]:
    logits, exits, scores = policy.predict_with_exits(network, PixelScaling(torch.float32)(raw), proxy)
    tensors = (logits.argmax(1), logits.softmax(1), scores, exits + 1, logits)
    return dict(zip(OUTPUTS["classification"], (tensor.numpy() for tensor in tensors), strict=True))


def by_class(policy: ExitPolicy) -> ExitPolicy:
    """A policy with thresholds per predicted class: closed for class 0, higher ones for class 1."""
    groups = []
    for number in range(4):
        shift = (math.inf, 0.02, 0.0, -0.02)[number]
        limits = [
            tuple(value if value == -math.inf else value + shift for value in row)
            for row in (policy.thresholds, policy.search_bounds)
        ]
        groups.append(GroupExits(str(number), *limits, certified=(shift < math.inf, shift < math.inf, False)))
    closed = (math.inf, math.inf, -math.inf)
    return replace(
        policy,
        thresholds=closed,
        search_bounds=closed,
        certified=(False,) * 3,
        group_by="predicted_class",
        groups=tuple(groups),
    )
