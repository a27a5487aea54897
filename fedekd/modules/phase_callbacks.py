"""Lightning callbacks of training phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, callbacks

from fedekd.class_paths import build_object, class_path_of
from fedekd.errors import UserError

#: What `trainer.callbacks` accepts.
CallbackSpec = str | Mapping[str, Any] | Sequence[Any]

_PACKAGE = "lightning.pytorch.callbacks"

#: Callbacks of Lightning that a phase cannot have, with the reason.
_UNSUPPORTED: tuple[tuple[type[Callback], str], ...] = (
    (callbacks.Checkpoint, "A run saves checkpoints of its own"),
    (callbacks.EarlyStopping, "All phases have the same number of epochs, and no validation batches"),
    (callbacks.Timer, "All phases have the same number of epochs"),
    (callbacks.BatchSizeFinder, "Set --data.batch_size"),
    (callbacks.LearningRateFinder, "Set --client.optimizer.lr"),
    (callbacks.LearningRateMonitor, "A phase has no logger"),
    (callbacks.DeviceStatsMonitor, "A phase has no logger"),
    (callbacks.ThroughputMonitor, "A phase has no logger"),
    (callbacks.ProgressBar, "A run has a progress bar of its own"),
    (callbacks.ModelSummary, "It would print a table in every phase"),
    (callbacks.SpikeDetection, "It ends the run at the first spike"),
)


def build_callbacks(spec: CallbackSpec | None) -> list[Callback]:
    """Build new callbacks for one training phase.

    A callback sees the Trainer of one phase of one client, and the LightningModule that is trained (`pl_module`, an
    `ObjectiveModule` with the network in `pl_module.network`). These hooks of `fit` are called: `setup`,
    `on_fit_start`, `on_train_start`, `on_train_epoch_start`, `on_train_batch_start`, `on_before_zero_grad`,
    `on_before_backward`, `on_after_backward`, `on_before_optimizer_step`, `on_train_batch_end`, `on_train_epoch_end`,
    `on_train_end`, `on_fit_end`, `teardown` and `on_exception`. Hooks of validation, loggers and checkpoints are not
    called, because a phase has none of them. `pl_module.epoch_means` has the means of the last finished epoch, such as
    `loss`.

    The state of a callback is not carried to the next phase: each client and phase has new objects, so that results do
    not depend on the order of clients. What a callback changes in the network stays. Random numbers come from
    PyTorch's global generator, which is seeded at the start of each epoch.

    Args:
        spec: A name of `lightning.pytorch.callbacks` or a class path; a mapping with `class_path` and optionally
            `init_args`; or a list of these. None for no callbacks.

    Raises:
        UserError: If one cannot be imported or built, is not a Callback, or needs what a phase does not have.

    Example:
        >>> [type(callback).__name__ for callback in build_callbacks(["LambdaCallback"])]
        ['LambdaCallback']
    """
    return [_build(item) for item in _items(spec)]


def of_lightning(spec: CallbackSpec | None) -> list[Any]:
    """Return the parts of a specification that are callbacks of Lightning itself."""
    return [item for item in _items(spec) if type(_build(item)).__module__.startswith(f"{_PACKAGE}.")]


def _items(spec: CallbackSpec | None) -> Sequence[Any]:
    if spec is None:
        return []
    return [spec] if isinstance(spec, str | Mapping) or not isinstance(spec, Sequence) else spec


def _build(spec: Any) -> Callback:
    class_path, _ = class_path_of("trainer.callbacks", spec)
    callback = build_object("trainer.callbacks", spec, _PACKAGE)
    if not isinstance(callback, Callback):
        raise UserError(
            f"trainer.callbacks: expected a subclass of lightning.pytorch.Callback, got {class_path}, which gives a"
            f" {type(callback).__name__}"
        )
    for unsupported, reason in _UNSUPPORTED:
        if isinstance(callback, unsupported):
            raise UserError(f"trainer.callbacks: expected callbacks that a phase supports, got {class_path}. {reason}")
    return callback
