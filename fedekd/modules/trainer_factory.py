"""Factory of Lightning Trainers: device, precision and threads of training."""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from weakref import WeakSet

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from fedekd.errors import UserError, describe_error, require, require_choice, shorten
from fedekd.global_state import exclusive, intraop_threads
from fedekd.modules.lean_loop import GradientOptions, build_lean_loop
from fedekd.modules.phase_callbacks import CallbackSpec, build_callbacks

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]

_AUTOCAST: dict[str, torch.dtype] = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def _cuda_precision() -> Precision:
    # Emulated bf16 (before Ampere) is slower than float16 with a loss scaler.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def _cpu_precision() -> Precision:
    # Without native instructions bf16 on a CPU is emulated and slower than float32.
    capabilities: Callable[[], Any] | None = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.12 on
    native = capabilities() if capabilities is not None else {}
    bf16 = any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bf16-mixed" if bf16 else "32-true"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def usable_threads() -> int:
    """Return the number of CPU threads for training.

    These are all usable cores, or `OMP_NUM_THREADS` if it is lower.
    """
    cores, limit = usable_cores(), os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


@dataclass(frozen=True)
class TrainerFactory:
    """Device, precision and threads of training.

    `resolve` replaces `auto` by values for this machine.

    Args:
        accelerator: `cpu`, `cuda`, or `auto`: CUDA if there is a device.
        device: Index of the CUDA device, at least 0.
        precision: `32-true`, `bf16-mixed`, `16-mixed`, `64-true`, or `auto`: bf16-mixed on CUDA (16-mixed on cards
            without bf16), bf16-mixed on a CPU with native bf16, else 32-true.
        threads: CPU threads per client, at least 1; `auto` uses all cores, or OMP_NUM_THREADS if it is lower. The
            number affects results in the last bits.
        channels_last: Store images and convolutions in channels-last layout, which is faster on CPUs and tensor cores.
        loop: `lightning` trains by a Lightning Trainer; `lean` calls the module's hooks in a plain loop, with
            bit-identical results, where a Trainer is not needed (see `fedekd.modules.lean_loop`); `auto` is lean
            without callbacks.
        capture: In the lean loop on CUDA, run the training step as a CUDA graph where it can be captured.
        callbacks: Lightning callbacks of each training phase: a name of lightning.pytorch.callbacks or a class path, a
            mapping with class_path and init_args, or a list of these. Each client and phase has new objects, see
            `fedekd.modules.phase_callbacks.build_callbacks`. Training then uses Lightning's loop.
        gradient_clip_val: Largest norm of the gradient, or of each of its values, above 0; null does not clip.
        gradient_clip_algorithm: norm clips the norm of the gradient of all parameters, value each value by itself.
        accumulate_grad_batches: Batches per step of the optimizer, at least 1; the gradient is their mean. The last
            step of an epoch may have fewer, whose sum is divided by the same number, as in Lightning.

    Raises:
        UserError: If a value is out of range.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    device: int = 0
    precision: Precision = "auto"
    threads: int | Literal["auto"] = "auto"
    channels_last: bool = True
    loop: Literal["auto", "lightning", "lean"] = "auto"
    capture: bool = True
    callbacks: CallbackSpec | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("accelerator", self.accelerator, ("auto", "cpu", "cuda")),
            ("precision", self.precision, ("auto", *_AUTOCAST, "32-true", "64-true")),
            ("loop", self.loop, ("auto", "lightning", "lean")),
            ("gradient_clip_algorithm", self.gradient_clip_algorithm, ("norm", "value")),
        ):
            require_choice(f"trainer.{flag}", value, allowed)
        threads_allowed = self.threads == "auto" or (isinstance(self.threads, int) and self.threads >= 1)
        require(threads_allowed, "trainer.threads", "auto, or at least 1", self.threads)
        require(self.device >= 0, "trainer.device", "at least 0", self.device)
        clip, batches = self.gradient_clip_val, self.accumulate_grad_batches
        clips = clip is None or (math.isfinite(clip) and clip > 0)
        require(clips, "trainer.gradient_clip_val", "a finite number above 0, or null", clip)
        require(batches >= 1, "trainer.accumulate_grad_batches", "at least 1", batches)
        require(
            not (self.callbacks and self.loop == "lean"),
            "trainer.loop",
            "auto or lightning with --trainer.callbacks",
            self.loop,
        )

    def resolve(self) -> TrainerFactory:
        """Return a copy in which every `auto` is replaced by a value for this machine.

        Raises:
            UserError: If the device does not exist, the precision needs another device, or a callback cannot be built.
        """
        accelerator = self.accelerator
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        if accelerator == "cuda" and self.device >= torch.cuda.device_count():
            raise UserError(
                f"trainer.device: expected one of {torch.cuda.device_count()} CUDA devices, got {self.device}. Use"
                " --trainer.accelerator cpu"
            )
        precision = self.precision
        if precision == "auto":
            precision = _cuda_precision() if accelerator == "cuda" else _cpu_precision()
        if precision == "16-mixed" and accelerator == "cpu":
            raise UserError("trainer.precision: expected bf16-mixed or 32-true on a CPU, got 16-mixed")
        threads = usable_threads() if self.threads == "auto" else self.threads
        self._check_callbacks()
        return replace(self, accelerator=accelerator, precision=precision, threads=threads)

    def _check_callbacks(self) -> None:
        """Build the callbacks and a Trainer with them, on the CPU.

        Raises:
            UserError: If a callback cannot be built, or Lightning rejects one.
        """
        if not self.callbacks:
            return
        callbacks = build_callbacks(self.callbacks)
        try:
            with exclusive(), _quiet():
                replace(self, accelerator="cpu", precision="32-true").build(1, callbacks)
        except Exception as error:
            raise UserError(
                f"trainer.callbacks: expected callbacks that a Trainer accepts, got {shorten(repr(self.callbacks))}."
                f" It reports: {describe_error(error)}"
            ) from error

    @property
    def gradients(self) -> GradientOptions:
        """Clipping and accumulation of gradients."""
        return GradientOptions(self.gradient_clip_val, self.gradient_clip_algorithm, self.accumulate_grad_batches)

    @property
    def prefers_lean_loop(self) -> bool:
        """True if phases that need no Trainer are trained without one."""
        return self.loop != "lightning" and not self.callbacks

    @property
    def allows_fused(self) -> bool:
        """True if a fused optimizer can be used.

        In mixed precision Lightning does not clip for optimizers that unscale the gradients themselves.
        """
        return self.gradient_clip_val is None or self.precision not in _AUTOCAST

    @property
    def torch_device(self) -> torch.device:
        """Device of tensors during training."""
        return torch.device("cuda", self.device) if self.accelerator == "cuda" else torch.device("cpu")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory layout of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and images."""
        return torch.float64 if self.precision == "64-true" else torch.float32

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """Context manager: use `threads` threads and only deterministic cuDNN algorithms.

        Other threads are excluded: these settings belong to the process.
        """
        with (
            intraop_threads(int(self.threads)),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            yield

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the training precision."""
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.torch_device.type, dtype=dtype, enabled=dtype is not None)

    def build(self, max_epochs: int, callbacks: Sequence[Callback] = ()) -> Trainer:
        """Create a Trainer for one phase, without logger, files and progress bars."""
        return Trainer(
            accelerator=self.accelerator,
            devices=[self.device] if self.accelerator == "cuda" else 1,
            precision=self.precision if self.precision != "auto" else None,
            max_epochs=max_epochs,
            **asdict(self.gradients),
            callbacks=list(callbacks),
            strategy=_Resident(self.torch_device),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )

    def fit(self, module: LightningModule, batches: Iterable[Any], epochs: int) -> None:
        """Train a module by the loop of `loop`, and release what a Trainer holds.

        Raises:
            UserError: If a callback ends the phase early.
        """
        if self.prefers_lean_loop:
            loop = build_lean_loop(module, batches, self.torch_device, self.precision, self.capture, self.gradients)
            if loop is not None:
                with exclusive():
                    loop.fit(epochs)
                return
        with exclusive(), _quiet():
            trainer = self.build(epochs, build_callbacks(self.callbacks))
            _TRAINERS.add(trainer)
            trainer.fit(module, train_dataloaders=batches)
        if self.callbacks:
            # Delta compares with as many epochs of the local baseline.
            batches_done, expected = trainer.fit_loop.total_batch_idx + 1, epochs * trainer.num_training_batches
            epochs_done = trainer.current_epoch  # more than `epochs` with StochasticWeightAveraging and BatchNorm
            require(
                not expected or (epochs_done == epochs and batches_done >= expected),
                "trainer.callbacks",
                f"callbacks that keep the {epochs} epochs of {trainer.num_training_batches} batches of a phase",
                f"{epochs_done} epochs and {batches_done} batches",
            )
        # Trainers form reference cycles, which only the garbage collector frees: drop large objects now.
        trainer.strategy.optimizers = []
        module.zero_grad(set_to_none=True)
        module.trainer = None


#: Trainers that `fit` has built and that are still in memory.
_TRAINERS: WeakSet[Trainer] = WeakSet()


def collect_trainers() -> None:
    """Free Trainers that have ended, to bound peak memory.

    They form reference cycles. The lean loop forms none, and a collection of a large process takes 0.25 s.
    """
    if _TRAINERS:
        gc.collect()


class _Resident(SingleDeviceStrategy):
    """Strategy that keeps networks and optimizer states on their device.

    Lightning's teardown moves them to the CPU, and the next phase, some milliseconds later, would move them back.
    """

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


#: Warnings of Lightning that do not apply to a federated run.
_EXPECTED = (
    ".*You defined a `validation_step` but have no `val_dataloader`",
    ".*module\\(s\\) in eval mode at the start of training",  # the frozen teacher
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # raised by Lightning with newer torch
    ".*`OneCycleLR` scheduler is using 'interval': 'epoch'",  # the default of client.scheduler_interval
)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
