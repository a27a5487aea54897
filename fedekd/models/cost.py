"""Size of a network, and floating-point operations (FLOPs) of its exits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedekd.errors import UserError
from fedekd.global_state import isolated_rng
from fedekd.models.build import eval_mode
from fedekd.models.multi_exit import MultiExitNetwork


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters; shared ones count once, buffers not.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ExitCosts:
    """FLOPs of one image in a network with E exits; a multiply-add counts as 2.

    Attributes:
        stages: FLOPs of each stage, shallow to deep, E numbers.
        heads: FLOPs of each head, E numbers.
        proxy: FLOPs of a proxy that is evaluated before the first exit; 0 without one.

    Example:
        >>> costs = ExitCosts(stages=(100, 200), heads=(10, 20))
        >>> costs.full, costs.flops_at_exits([True, True]), costs.flops_at_exits([False, True])
        (320, (110, 330), (110, 320))
    """

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    proxy: int = 0

    @property
    def full(self) -> int:
        """FLOPs of the plain network: all stages and the last head."""
        return sum(self.stages) + self.heads[-1]

    def flops_at_exits(self, evaluated: Sequence[bool], uses_proxy: bool = False) -> tuple[int, ...]:
        """Return the FLOPs per exit: stages and evaluated heads up to that exit.

        Args:
            evaluated: True for each exit whose head is evaluated, E entries. A closed exit needs no evaluation and
                costs nothing. The last exit is always evaluated.
            uses_proxy: True if the score needs the proxy, which then runs for every image if any exit before the last
                is evaluated.

        Returns:
            E numbers. Each includes the head of its own exit, also if that exit is not evaluated.

        Raises:
            ValueError: If `evaluated` does not have E entries.
        """
        if len(evaluated) != len(self.heads):
            raise ValueError(f"evaluated: expected {len(self.heads)} entries, one per exit, got {len(evaluated)}")
        evaluated_heads = [head if used else 0 for head, used in zip(self.heads, evaluated, strict=True)]
        heads_before = accumulate(evaluated_heads[:-1], initial=0)
        stages = accumulate(self.stages)
        proxy = self.proxy if uses_proxy and any(evaluated[:-1]) else 0
        return tuple(proxy + sum(parts) for parts in zip(stages, heads_before, self.heads, strict=True))

    def shares(self, evaluated: Sequence[bool], uses_proxy: bool = False) -> list[float]:
        """Return `flops_at_exits` as fractions of the plain network's FLOPs, E numbers."""
        return [cost / self.full for cost in self.flops_at_exits(evaluated, uses_proxy)]


def network_flops(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Count the FLOPs of one sample in a network, all exits included.

    Args:
        network: Network on any device, in any floating-point type.
        input_shape: Channels, height and width of an image, or number of features.

    Example:
        >>> network_flops(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2))
        24
    """
    like = next(network.parameters())
    x = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    with isolated_rng(0, like.device), eval_mode(network), torch.no_grad(), _countable_attention():
        return _run_counted(network, x)[1]


def exit_costs(network: MultiExitNetwork, image_shape: tuple[int, ...], proxy: nn.Module | None = None) -> ExitCosts:
    """Count the FLOPs of every stage and head on one image.

    Convolutions, matrix products and attention count; norms, activations and pools do not. The network runs once in
    evaluation mode and is not changed.

    Args:
        network: Network with E exits, on any device, in any floating-point type.
        image_shape: Channels, height and width of an image.
        proxy: Proxy of the confidence score `agreement`, on the same device; None without one.

    Raises:
        UserError: If the network does not accept images of that shape.

    Example:
        >>> from torch import nn
        >>> network = MultiExitNetwork([nn.Conv2d(1, 4, 3), nn.Flatten()], [nn.Flatten(), nn.Linear(4 * 36, 5)])
        >>> exit_costs(network, (1, 8, 8))
        ExitCosts(stages=(2592, 0), heads=(0, 1440), proxy=0)
    """
    like = network.head.weight
    x = image = torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype)
    stages, heads = [], []
    with isolated_rng(0, like.device), eval_mode(network), torch.no_grad(), _countable_attention():
        try:
            for stage, head in zip(network.stages, network.heads, strict=True):
                x, flops = _run_counted(stage, x)
                stages.append(flops)
                heads.append(_run_counted(head, x)[1])
            proxy_flops = 0
            if proxy is not None:
                with eval_mode(proxy):
                    proxy_flops = _run_counted(proxy, image)[1]
        except Exception as error:  # a user's stage may raise anything
            message = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"image_shape: expected images that the network accepts, got {image_shape}. It failed: {message}"
            ) from error
    return ExitCosts(tuple(stages), tuple(heads), proxy_flops)


def _run_counted(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    return output, int(counter.get_total_flops())


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Context manager: compute attention by matrix products, which are counted.

    In evaluation mode PyTorch would use fused kernels, which it does not count.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
