"""Training steps of FedeKD's phases on a GPU: eager, captured, several clients.

All of them train the same networks on the same batches with fused Adam; the batches are gathered on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import log_softmax, nll_loss

from perf import bare
from perf.setting import Workload

#: Log-probabilities of the student and of the teacher, (B, C), and classes, (B,), to a scalar.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Steps before a capture: cuDNN and the optimizer allocate what they need.
WARM_UP = 3


def supervised(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy."""
    return nll_loss(student, y)


@dataclass(frozen=True)
class Phase:
    """A training phase: name, role of the trained network and of its teacher, loss."""

    name: str
    role: str
    teacher: str | None
    loss: Loss


PHASES = (
    Phase("supervised", "private", None, supervised),
    Phase("gated", "private", "proxy", bare.gated),
    Phase("distillation", "proxy", "private", bare.distilled),
)


class Steps:
    """The training of one client in one phase, step by step.

    Args:
        setting: Data, precision and batch size.
        phase: Training phase.
        networks: By role; they are changed.
        indices: The client's training samples, a multiple of the batch size, shape (n,).
        capturable: Keep the optimizer's state such that a CUDA graph can hold its step.
    """

    def __init__(
        self,
        setting: Workload,
        phase: Phase,
        networks: dict[str, nn.Module],
        indices: Tensor,
        capturable: bool = False,
    ) -> None:
        self.setting, self.phase, self.indices = setting, phase, indices
        self.network = networks[phase.role].train()
        self.teacher = None if phase.teacher is None else networks[phase.teacher]
        self.teacher_outputs = torch.zeros(len(indices), 10, device=setting.device)
        self.capturable = capturable and setting.device.type == "cuda"
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=1e-4, fused=True, capturable=self.capturable)

    def begin(self) -> None:
        """Start a phase: a new optimizer, and the teacher's outputs for all samples."""
        self.optimizer = self._new_optimizer()
        self.predict_teacher()

    @torch.no_grad()
    def predict_teacher(self) -> None:
        """Compute the teacher's outputs for all samples, in place."""
        if self.teacher is None:
            return
        self.teacher.eval()
        size = self.setting.eval_batch_size
        for chosen, teacher_outputs in zip(self.indices.split(size), self.teacher_outputs.split(size), strict=True):
            with self.setting.autocast():
                logits = self.teacher(self.images(chosen))
            teacher_outputs.copy_(log_softmax(logits.float(), dim=1))

    def images(self, chosen: Tensor) -> Tensor:
        """Scaled images, channels last."""
        x = self.setting.images[chosen].float().div_(127.5).sub_(1.0)
        return x.contiguous(memory_format=torch.channels_last)

    def step(self, places: Tensor) -> Tensor:
        """Train on the samples at `places` of `indices`, and return the loss."""
        chosen = self.indices[places]
        with self.setting.autocast():
            logits = self.network(self.images(chosen))
        student = log_softmax(logits.float(), dim=1)
        teacher_outputs = student if self.teacher is None else self.teacher_outputs[places]
        loss = self.phase.loss(student, teacher_outputs, self.setting.targets[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on the batches of an epoch, (steps, batch size); return losses (steps,)."""
        return torch.stack([self.step(places) for places in order])

    def state(self) -> list[Tensor]:
        """Weights and optimizer state, for a capture to restore."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.network.parameters(), *moments]


class Stacked:
    """Training of K clients in one phase as one network of stacked weights (vmap).

    Args:
        clients: One `Steps` each, with equally many samples; their networks are copied.
    """

    def __init__(self, clients: Sequence[Steps]) -> None:
        self.clients, first = clients, clients[0]
        self.setting, self.phase = first.setting, first.phase
        self.parameters, _ = stack_module_state([client.network for client in clients])  # type: ignore[no-untyped-call]
        self.skeleton = copy.deepcopy(first.network).to("meta")
        self.indices = torch.stack([client.indices for client in clients])
        self.teacher_outputs = torch.stack([client.teacher_outputs for client in clients])
        self.capturable = first.capturable
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters.values(), lr=1e-4, fused=True, capturable=self.capturable)

    def begin(self) -> None:
        """Start a phase: a new optimizer, and the teachers' outputs for all samples."""
        self.optimizer = self._new_optimizer()
        self.predict_teacher()

    def predict_teacher(self) -> None:
        """Compute the teachers' outputs, in place."""
        for client in self.clients:
            client.predict_teacher()
        torch.stack([client.teacher_outputs for client in self.clients], out=self.teacher_outputs)

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, teacher_outputs: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.skeleton, parameters, (x,))
        return self.phase.loss(log_softmax(logits.float(), dim=1), teacher_outputs, y)

    def step(self, places: Tensor) -> Tensor:
        """Train each client on its samples at `places`, and return the mean loss."""
        chosen = self.indices[:, places]
        x = self.setting.images[chosen].float().div_(127.5).sub_(1.0)
        teacher_outputs, y = self.teacher_outputs[:, places], self.setting.targets[chosen]
        with self.setting.autocast():
            losses = vmap(self._loss)(self.parameters, x, teacher_outputs, y)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach().mean()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on all batches of an epoch, and return the mean losses (steps,)."""
        return torch.stack([self.step(places) for places in order])

    def state(self) -> list[Tensor]:
        """Weights and optimizer state."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.parameters.values(), *moments]


class Streams:
    """Training of K clients in one phase, one CUDA stream each; for a capture.

    Args:
        clients: One `Steps` each; they are trained in place.
    """

    def __init__(self, clients: Sequence[Steps]) -> None:
        self.clients, self.setting = clients, clients[0].setting
        self.streams = [torch.cuda.Stream() for _ in clients] if self.setting.device.type == "cuda" else []

    def begin(self) -> None:
        """Start a phase on each client."""
        for client in self.clients:
            client.begin()

    def predict_teacher(self) -> None:
        """Compute the teachers' outputs, in place."""
        for client in self.clients:
            client.predict_teacher()

    def step(self, places: Tensor) -> Tensor:
        """Train each client on its samples at `places`, and return the mean loss."""
        if not self.streams:
            return torch.stack([client.step(places) for client in self.clients]).mean()
        main, losses = torch.cuda.current_stream(), []
        for stream, client in zip(self.streams, self.clients, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                losses.append(client.step(places))
        for stream in self.streams:
            main.wait_stream(stream)
        return torch.stack(losses).mean()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on all batches of an epoch, and return the mean losses (steps,)."""
        return torch.stack([self.step(places) for places in order])

    def state(self) -> list[Tensor]:
        """Weights and optimizer states."""
        return [tensor for client in self.clients for tensor in client.state()]


class Captured:
    """A contender as a CUDA graph of one step; an epoch is one replay per step.

    On a CPU the step is called instead.

    Args:
        steps: Contender to capture; its weights are restored afterwards.
        order: Batches of an epoch, (steps, batch size): the shape that every later epoch has.
    """

    def __init__(self, steps: Steps | Stacked | Streams, order: Tensor) -> None:
        self.steps, self.order = steps, order.clone()
        self.place = torch.zeros(1, dtype=torch.int64, device=order.device)
        self.losses = torch.zeros(len(order), device=order.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if order.device.type == "cuda":
            self._capture()

    def _body(self) -> None:
        loss = self.steps.step(self.order[self.place][0])
        self.losses[self.place] = loss
        self.place.add_(1)

    def _capture(self) -> None:
        before = [tensor.detach().clone() for tensor in self._weights()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._body()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # The end of a Trainer frees cuBLAS's workspaces: the graph has its own, in its memory pool.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(self.graph):
            self._body()
        torch._C._cuda_clearCublasWorkspaces()
        self._restore(before)

    @torch.no_grad()
    def _restore(self, before: Sequence[Tensor]) -> None:
        """Undo the warm-up: set weights to `before` and the optimizer's state to 0."""
        for tensor in self.steps.state():
            if not tensor.requires_grad:
                tensor.zero_()
        for tensor, value in zip(self._weights(), before, strict=True):
            tensor.copy_(value)

    def _weights(self) -> list[Tensor]:
        return [tensor for tensor in self.steps.state() if tensor.requires_grad]

    @torch.no_grad()
    def begin(self) -> None:
        """Start a phase: reset the optimizer state, compute the teacher's outputs."""
        if self.graph is None:
            self.steps.begin()
            return
        for tensor in self.steps.state():
            if not tensor.requires_grad:
                tensor.zero_()
        self.steps.predict_teacher()

    def epoch(self, order: Tensor) -> Tensor:
        """Train on all batches of an epoch, and return their losses (steps,)."""
        self.order.copy_(order)
        self.place.zero_()
        for _ in range(len(order)):
            if self.graph is None:
                self._body()
            else:
                self.graph.replay()
        return self.losses.clone()
