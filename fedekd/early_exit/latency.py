"""Latency of inference with and without early exits."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedekd.early_exit.policy import ExitPolicy
from fedekd.models import MultiExitNetwork, eval_mode

BATCH_SIZES = (1, 32, 256)


@dataclass(frozen=True)
class Latency:
    """Times measured on one machine in one run; not comparable between runs.

    Attributes:
        batch_size: Images per forward pass.
        ratio: Time with early exits / time through the whole network with the last head only, on the same images.
        error: Standard error of the ratio, over batches.
    """

    batch_size: int
    ratio: float
    error: float


@torch.no_grad()
def forward_milliseconds(network: nn.Module, x: Tensor, repeats: int = 10) -> float:
    """Measure the mean time of a forward pass per sample, in milliseconds.

    Args:
        network: Any network; it runs in evaluation mode.
        x: Batch of inputs on the network's device.
        repeats: Measured passes, at least 1, after one for warm-up.
    """
    with eval_mode(network):
        times = [_seconds(lambda: network(x), x.device) for _ in range(repeats + 1)]
    return 1000 * statistics.fmean(times[1:]) / len(x)


def _last_exit(network: MultiExitNetwork, x: Tensor) -> Tensor:
    """Run all stages and the last head; an ensemble runs its other members, too."""
    for stage in network.stages:
        x = stage(x)
    logits: Tensor = network.heads[-1](x)
    return logits


@torch.no_grad()
def measure_latency(
    network: MultiExitNetwork,
    policy: ExitPolicy,
    images: Tensor,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    batches: int = 20,
) -> list[Latency]:
    """Measure a network with and without its policy.

    Both alternate per batch to cancel the load of the machine. Reports means, not medians: with single images some take
    a tenth of the time and others all of it, so the median would only show whether more than half exit early.

    Args:
        network: The calibrated network.
        policy: Its policy.
        images: Images, shape (N, C, H, W), on the network's device, in random order; used cyclically.
        batch_sizes: Images per forward pass.
        batches: Number of batches per batch size, at least 2; 20 times as many for single images.

    Returns:
        One entry per batch size.

    Raises:
        UserError: The policy was calibrated for another network.
    """
    policy.require(network)
    results = []
    with eval_mode(network):
        for size in batch_sizes:
            pairs = []
            for number in range(-2, batches if size > 1 else 20 * batches):  # two batches for warm-up
                indices = (torch.arange(size) + max(number, 0) * size) % len(images)
                x = images[indices.to(images.device)]
                full = _seconds(lambda x=x: _last_exit(network, x), x.device)  # type: ignore[misc]
                early = _seconds(lambda x=x: policy.predict_with_exits(network, x), x.device)  # type: ignore[misc]
                if number >= 0:
                    pairs.append((full, early))
            full, early = (statistics.fmean(times) for times in zip(*pairs, strict=True))
            ratio = early / full
            # Standard error of a ratio of means, to first order.
            deviation = statistics.stdev(with_exits - ratio * without for without, with_exits in pairs)
            error = deviation / full / math.sqrt(len(pairs))
            results.append(Latency(size, ratio, error))
    return results


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
