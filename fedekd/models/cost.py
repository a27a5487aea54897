"""What each exit of a network costs, in floating-point operations."""

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
from fedekd.models.build import eval_mode
from fedekd.models.multi_exit import MultiExitNetwork


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters, trainable or not; shared ones count once, buffers do not count.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ExitCosts:
    """Floating-point operations of one image in a network of E exits; a multiply-add counts as 2.

    Attributes:
        stages: Of each stage alone, E numbers, shallow to deep.
        heads: Of each head alone, E numbers.
        proxy: Of a second network that is asked before anyone may leave early; 0 for none.

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
        """Of the plain network: all stages and the last head alone."""
        return sum(self.stages) + self.heads[-1]

    def flops_at_exits(self, evaluated: Sequence[bool], uses_proxy: bool = False) -> tuple[int, ...]:
        """Of an image that leaves at exit e: all stages up to e, and the heads up to e that are evaluated.

        Args:
            evaluated: Of each exit, whether its head is evaluated when an image comes by: where no image may leave
                it need not be, and costs nothing. The last exit's always is, whatever is said of it.
            uses_proxy: Whether the proxy is asked; of every image, where any exit before the last is evaluated.

        Returns:
            E numbers, each with the head of its own exit: at an exit that is not evaluated, it is what leaving there
            would cost if that one were evaluated too.

        Raises:
            ValueError: `evaluated` has not E entries.
        """
        if len(evaluated) != len(self.heads):
            raise ValueError(f"evaluated has {len(evaluated)} entries, but there are {len(self.heads)} exits")
        passing = [head if paid else 0 for head, paid in zip(self.heads, evaluated, strict=True)]
        before = accumulate(passing[:-1], initial=0)
        reached = accumulate(self.stages)
        second = self.proxy if uses_proxy and any(evaluated[:-1]) else 0
        return tuple(second + sum(parts) for parts in zip(reached, before, self.heads, strict=True))

    def shares(self, evaluated: Sequence[bool], uses_proxy: bool = False) -> list[float]:
        """The same as shares of the plain network's cost, E numbers."""
        return [cost / self.full for cost in self.flops_at_exits(evaluated, uses_proxy)]


def exit_costs(
    network: MultiExitNetwork, image_shape: tuple[int, int, int], proxy: nn.Module | None = None
) -> ExitCosts:
    """Count the operations of every stage and head on one image, as `torch.utils.flop_counter` does.

    Convolutions, matrix products and attention count; norms, activations and pools do not. The network is run once,
    in evaluation mode, and is then as it was.

    Args:
        network: E exits, on any device, in any floating-point type.
        image_shape: Channels, height and width of an image.
        proxy: A network that is asked for a second opinion, if any; on the same device.

    Raises:
        UserError: The network cannot take images of that shape.

    Example:
        >>> from torch import nn
        >>> network = MultiExitNetwork([nn.Conv2d(1, 4, 3), nn.Flatten()], [nn.Flatten(), nn.Linear(4 * 36, 5)])
        >>> exit_costs(network, (1, 8, 8))
        ExitCosts(stages=(2592, 0), heads=(0, 1440), proxy=0)
    """
    like = network.head.weight
    x = image = torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype)
    stages, heads = [], []
    with eval_mode(network), torch.no_grad(), _countable_attention():
        try:
            for stage, head in zip(network.stages, network.heads, strict=True):
                x, flops = _counted(stage, x)
                stages.append(flops)
                heads.append(_counted(head, x)[1])
            second = 0
            if proxy is not None:
                with eval_mode(proxy):
                    second = _counted(proxy, image)[1]
        except Exception as error:  # a stage of one's own may fail in any way
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"image_shape is {image_shape}, which the network cannot take: {said}") from error
    return ExitCosts(tuple(stages), tuple(heads), second)


def _counted(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    return output, int(counter.get_total_flops())


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention by plain matrix products: in evaluation mode fused kernels take over that the counter cannot see."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
