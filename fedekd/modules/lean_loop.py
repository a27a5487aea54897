"""Training loop without a Trainer; on CUDA, full batches run as one CUDA graph.

The loop calls the hooks of an `ObjectiveModule` in the order of a Lightning Trainer, with Lightning's own precision
plugins, which also clip the gradients, and gives the same weights to the last bit. It has no callbacks, no loggers and
no progress bar.

The training step on a full batch is captured: gathering the images, forward, backward, the optimizer's step, and the
sums of what is recorded. The first step of a phase is eager; it creates the optimizer's state and the sums, and shows
whether a step waits for the device. The second is captured, which costs about as much as two eager steps, once per
phase; all further steps on full batches are replays, which launch nothing else. Dropout, BatchNorm and permutations
drawn on the device are captured, too: a replay reads and advances the state of the default generator as an eager step
does. A network whose forward pass draws from Python's `random`, or otherwise depends on values outside of tensors,
would repeat the values of the captured step: train it with `--trainer.capture false`.

Eager steps are used for the last, smaller batch of an epoch, for modules that are not `capturable`, for optimizers
other than SGD that have no `capturable` form, for phases of fewer than `MIN_CAPTURED_STEPS`, for batches that are
augmented or read from files, for steps that wait for the device, as `.item()` does, with a learning rate schedule,
whose rates a graph would not follow, and where gradients are accumulated.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

from fedekd.data import TensorBatches
from fedekd.modules.objective_module import ObjectiveModule

#: Smallest number of steps on full batches for which a capture saves time.
MIN_CAPTURED_STEPS = 8

#: Hooks of a LightningModule that the loop does not call: a module that overrides one is trained by Lightning.
UNCALLED_HOOKS = (
    *("setup", "teardown", "configure_model", "configure_callbacks", "on_fit_end", "backward", "optimizer_zero_grad"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "on_before_batch_transfer"),
    *("transfer_batch_to_device", "on_after_batch_transfer"),
)

#: The last graph of each device, whose memory the next one takes over.
_latest_graph: dict[torch.device, torch.cuda.CUDAGraph] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(frozen=True)
class GradientOptions:
    """Clipping and accumulation of gradients, named as the arguments of a Trainer.

    Attributes:
        gradient_clip_val: Largest norm or value, above 0; None does not clip.
        gradient_clip_algorithm: `norm` or `value`.
        accumulate_grad_batches: Batches per step of the optimizer, at least 1.
    """

    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    accumulate_grad_batches: int = 1


class HookTrainer:
    """The part of a Trainer that the hooks of a module read.

    Attributes:
        barebones: True: `log` does nothing, as under `Trainer(barebones=True)`.
        precision_plugin: Lightning's plugin of the precision.
        optimizers: The optimizer, in a list.
        current_epoch: From 0.
    """

    barebones = True

    def __init__(self, precision_plugin: Precision) -> None:
        self.precision_plugin = precision_plugin
        self.optimizers: list[torch.optim.Optimizer] = []
        self.current_epoch = 0


class LeanLoop:
    """Trains one module for one phase.

    Args:
        module: Module to train; see `build_lean_loop`.
        batches: Training samples.
        device: Device of the training.
        precision: `32-true`, `bf16-mixed` or `64-true`.
        capture: Capture the steps on full batches as a CUDA graph where that is possible.
        gradients: Clipping and accumulation of gradients.

    Attributes:
        captured: The captured step; None where all steps are eager.
    """

    def __init__(
        self,
        module: ObjectiveModule,
        batches: TensorBatches,
        device: torch.device,
        precision: str,
        capture: bool,
        gradients: GradientOptions,
    ) -> None:
        self.module, self.batches, self.device, self.capture = module, batches, device, capture
        self.gradients = gradients
        self.plugin = _precision_plugin(precision, device)
        self.trainer = HookTrainer(self.plugin)
        self.captured: CapturedStep | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The module's optimizer."""
        return self.trainer.optimizers[0]

    def fit(self, epochs: int) -> None:
        """Train for some epochs."""
        module: Any = self.module
        self.plugin.convert_module(module).to(self.device)
        module.trainer = self.trainer
        try:
            with torch.enable_grad(), _own_stream(self.device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*`Trainer\\(barebones=True\\)`")
                warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # some steps are eager
                configured = module.configure_optimizers()
                self.trainer.optimizers = [configured["optimizer"] if isinstance(configured, dict) else configured]
                module.on_fit_start()
                if epochs and len(self.batches):
                    self._train(epochs)
        finally:
            self.captured = None  # it refers to this object: a cycle would keep the module until a collection
            module.zero_grad(set_to_none=True)
            module.trainer = None

    def _train(self, epochs: int) -> None:
        steps = epochs * (self.batches.num_visited // self.batches.batch_size)
        captures = self.capture and supports_graphs(self.device) and self.module.capturable and self.batches.is_plain
        captures = captures and self.module.schedule is None and self.gradients.accumulate_grad_batches == 1
        flags = [group.get("capturable") for group in self.optimizer.param_groups]
        if captures and steps >= MIN_CAPTURED_STEPS and make_capturable(self.optimizer):
            self.captured = CapturedStep(lambda positions: self._step(self.batches.take(positions)), self.device)
        self.module.on_train_start()
        for epoch in range(epochs):
            self.trainer.current_epoch = epoch
            self.module.on_train_epoch_start()
            self._train_epoch()
            self.module.on_train_epoch_end()
        for group, flag in zip(self.optimizer.param_groups, flags, strict=True):
            if flag is not None:
                group["capturable"] = flag  # a state that is carried on may be loaded on a CPU
        self.module.on_train_end()

    def _train_epoch(self) -> None:
        if self.captured is None:
            last = len(self.batches) - 1
            for number, batch in enumerate(self.batches):
                self._step(batch, number, number == last)
        else:
            positions, size = self.batches.draw_positions(), self.batches.batch_size
            start = len(positions) // size * size
            self.captured.train(positions[:start].view(-1, size))
            for first in range(start, len(positions), size):
                self._step(self.batches.take(positions[first : first + size]), first // size)
        self.module.samples_seen = self.batches.num_visited  # a replay does not count
        self._step_schedule("epoch")

    def _step(self, batch: tuple[Any, ...], batch_idx: int = 0, is_last: bool = False) -> None:
        """Train on one batch, like Lightning's automatic optimization."""
        batch, accumulated = self.plugin.convert_input(batch), self.gradients.accumulate_grad_batches

        def backward() -> Tensor:
            with self.plugin.train_step_context():
                loss = self.module.training_step(batch, batch_idx)
            if batch_idx % accumulated == 0:
                self.optimizer.zero_grad()
            torch.autograd.backward(loss / accumulated if accumulated > 1 else loss)
            return loss

        def closure() -> Tensor:
            loss = backward()
            algorithm = GradClipAlgorithmType(self.gradients.gradient_clip_algorithm)
            self.plugin.clip_gradients(self.optimizer, self.gradients.gradient_clip_val or 0.0, algorithm)
            return loss

        if (batch_idx + 1) % accumulated and not is_last:
            backward()
            return
        self.module.optimizer_step(self.trainer.current_epoch, batch_idx, self.optimizer, closure)
        self._step_schedule("step")

    def _step_schedule(self, interval: str) -> None:
        schedule = self.module.schedule
        if schedule is not None and schedule.scheduler is not None and schedule.interval == interval:
            self.module.lr_scheduler_step(schedule.scheduler, None)


class CapturedStep:
    """Steps on full batches: first eager, second captured, then replayed.

    Args:
        step: Trains on the samples at the given positions, (batch size,).
        device: Device of the training.
    """

    def __init__(self, step: Callable[[Tensor], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.order: Tensor | None = None
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def train(self, order: Tensor) -> None:
        """Train on the batches of an epoch, the rows of `order` (steps, batch size)."""
        is_first = self.order is None
        if self.order is None:
            self.order = order.clone()
        self.order.copy_(order)
        self.place.zero_()
        if is_first:
            with synchronizations(self.device) as found:
                self._next()
            self.graph = None if found else capture(self._next, self.device)
        for _ in range(int(is_first), len(order)):
            if self.graph is None:
                self._next()
            else:
                self.graph.replay()

    def _next(self) -> None:
        assert self.order is not None
        self.step(self.order.index_select(0, self.place)[0])
        self.place.add_(1)


def build_lean_loop(
    module: LightningModule,
    batches: object,
    device: torch.device,
    precision: str,
    capture: bool,
    gradients: GradientOptions,
) -> LeanLoop | None:
    """Build the loop for a phase, or return None if it requires Lightning's loop.

    That is the case for other modules and batches, for modules that override a hook that the loop does not call, and
    in 16-mixed, which needs Lightning's loss scaler.
    """
    if (
        isinstance(module, ObjectiveModule)
        and isinstance(batches, TensorBatches)
        and precision in ("32-true", "bf16-mixed", "64-true")
        and module.automatic_optimization
        and type(module).configure_optimizers is ObjectiveModule.configure_optimizers
        and all(getattr(type(module), hook) is getattr(LightningModule, hook) for hook in UNCALLED_HOOKS)
    ):
        return LeanLoop(module, batches, device, precision, capture, gradients)
    return None


def capture(body: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """Capture what `body` launches, without executing it.

    Returns:
        The graph; None, after a warning, where it cannot be captured.
    """
    # Not torch.cuda.graph(): it returns all cached memory to the driver at each capture.
    graph, latest = torch.cuda.CUDAGraph(), _latest_graph.get(device)
    pool = None if latest is None else latest.pool()  # it is never replayed again: its memory is free
    collects = gc.isenabled()
    gc.disable()  # a collection could free what must not be freed during a capture
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            body()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"training continues without a CUDA graph, which cannot hold this step: {reason}", stacklevel=2)
        return None
    finally:
        if collects:
            gc.enable()
    _latest_graph[device] = graph
    return graph


def make_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Set an optimizer to keep its state on the device.

    Returns:
        True if a CUDA graph can hold its step.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return True
    if not all("capturable" in group for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["capturable"] = True
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)
    return True


def supports_graphs(device: torch.device) -> bool:
    """Return whether a device has CUDA graphs."""
    return device.type == "cuda"


@contextmanager
def synchronizations(device: torch.device) -> Iterator[list[str]]:
    """Context manager: collect operations that wait for the device.

    They cannot be captured.
    """
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            found.append(str(warning.message))
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Context manager: queue work on a stream other than the default, for a capture."""
    if device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = _streams[device]
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def _precision_plugin(precision: str, device: torch.device) -> Precision:
    if precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", device.type)
    return DoublePrecision() if precision == "64-true" else Precision()
