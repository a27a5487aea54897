"""How long inference takes, with and without leaving early."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedekd.early_exit.policy import ExitPolicy
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import eval_mode

BATCH_SIZES = (1, 32, 256)


@dataclass(frozen=True)
class Latency:
    """Measured on one machine in one run: compare within it.

    Attributes:
        batch_size: Images at a time.
        full: Milliseconds an image through the whole network, the last head alone; the mean.
        early: The same with images leaving early.
        ratio: early / full, of the same images.
        error: Its standard error, over batches.
    """

    batch_size: int
    full: float
    early: float
    ratio: float
    error: float


@torch.no_grad()
def measure_latency(
    network: MultiExitNetwork,
    policy: ExitPolicy,
    images: Tensor,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    batches: int = 20,
) -> list[Latency]:
    """Time a network with and without its policy, batch by batch in turn, so that a busy machine slows both alike.

    Means, not medians: of single images some take a tenth of the time and some all of it, and a median would tell only
    whether half of them leave early.

    Args:
        network: The network that was calibrated.
        policy: Its policy.
        images: What is classified, shape (N, C, H, W), on the network's device; taken in order, over and over, so give
            them in a random one.
        batch_sizes: Images at a time.
        batches: How many batches of each size, at least 2; of single images twenty times as many.

    Returns:
        One entry a batch size.

    Raises:
        UserError: If the policy is of another network.
    """
    policy.require(network)
    found = []
    with eval_mode(network):
        for size in batch_sizes:
            pairs = []
            for number in range(-2, batches if size > 1 else 20 * batches):  # two to warm up
                places = (torch.arange(size) + max(number, 0) * size) % len(images)
                x = images[places.to(images.device)]
                full = _seconds(lambda x=x: network.head(network.features(x)), x.device)  # type: ignore[misc]
                early = _seconds(lambda x=x: policy.predict_with_exits(network, x), x.device)  # type: ignore[misc]
                if number >= 0:
                    pairs.append((full, early))
            full, early = (statistics.fmean(times) for times in zip(*pairs, strict=True))
            ratio = early / full
            # Of a ratio of means, to first order.
            spread = statistics.stdev(left - ratio * whole for whole, left in pairs)
            error = spread / full / math.sqrt(len(pairs))
            found.append(Latency(size, 1000 * full / size, 1000 * early / size, ratio, error))
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
