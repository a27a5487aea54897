"""A stand-in for `torch.cuda.CUDAGraph` on a CPU."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class RecordedGraph(TorchDispatchMode):
    """Record operators with their tensors, without an effect, and execute them on the same tensors at a replay.

    As in a CUDA graph, no Python runs at a replay: what the step keeps outside of tensors is as it was at the capture.
    """

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self.replays = 0
        self.pools: Any = None
        self.made.append(self)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.pools = pool
        self.random_state = torch.get_rng_state()
        self.__enter__()

    @torch.no_grad()
    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)
        torch.set_rng_state(self.random_state)

    def pool(self) -> tuple[int, int]:
        return (0, self.made.index(self) + 1)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, recorded in self.calls:
            outputs = tree_flatten(function(*args, **kwargs))[0]
            if any(output.alias_info for output in function._schema.returns):
                continue  # a view of a recorded tensor, or one that was written in place
            for before, output in zip(tree_flatten(recorded)[0], outputs, strict=True):
                if isinstance(before, Tensor):
                    before.copy_(output)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        for place, argument in enumerate(function._schema.arguments):
            # The schema of native_batch_norm does not say that it writes the running statistics.
            is_statistic = argument.name in ("running_mean", "running_var")
            if is_statistic or (argument.alias_info is not None and argument.alias_info.is_write):
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                self.overwritten += [(t, t.detach().clone()) for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
        output = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, output))
        return output
