"""Confidence scores and correctness at each exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedekd.errors import UserError


@dataclass(frozen=True, eq=False)
class ExitScores:
    """Scores of n samples at E exits, the last exit included.

    Attributes:
        scores: Confidence, float64, shape (n, E).
        correct: Whether the prediction of the exit is correct, bool, shape (n, E).
        true_class_probability: Predicted probability of the true class, shape (n, E), or None.
        groups: Number of the group of each sample at each exit, int64, shape (n, E), or None. A predicted class may
            differ between exits.
    """

    scores: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    true_class_probability: npt.NDArray[np.float64] | None = None
    groups: npt.NDArray[np.int64] | None = None

    @classmethod
    def from_arrays(cls, scores: Any, correct: Any, true_class_probability: Any = None, name: str = "") -> ExitScores:
        """Validate arrays or tensors and convert them.

        Args:
            scores: Confidence, shape (n, E), finite.
            correct: bool, or 0 and 1, shape (n, E).
            true_class_probability: Probabilities, shape (n, E), or None.
            name: Prefix of the arrays' names in error messages, with a trailing space.

        Raises:
            UserError: Shapes differ, there are no samples, or scores are not finite.
        """
        array = _to_array(scores).astype(np.float64)
        if array.ndim != 2 or not array.shape[1]:
            raise UserError(f"{name}scores: expected the shape (samples, exits), got {array.shape}")
        if not len(array):
            raise UserError(f"{name}scores: expected at least 1 sample, got 0")
        if np.isnan(array).any():
            sample, exit_ = np.argwhere(np.isnan(array))[0]
            raise UserError(
                f"{name}scores: expected finite values, got NaN, first at sample {sample}, exit {exit_ + 1}."
                " The training of the network diverged"
            )
        if np.isinf(array).any():
            raise UserError(f"{name}scores: expected finite values, got inf")
        flags = _to_array(correct)
        if flags.shape != array.shape:
            raise UserError(f"{name}correct: expected the shape {array.shape} of the scores, got {flags.shape}")
        if flags.dtype != np.bool_ and not np.isin(flags, (0, 1)).all():
            raise UserError(f"{name}correct: expected bool, or 0 and 1, got other values in an array of {flags.dtype}")
        probability = None
        if true_class_probability is not None:
            probability = _to_array(true_class_probability).astype(np.float64)
            if probability.shape != array.shape or not ((probability >= 0) & (probability <= 1)).all():
                raise UserError(f"{name}true_class_probability: expected the shape {array.shape} and values in 0..1")
        return cls(array, flags.astype(np.bool_), probability)

    @classmethod
    def concatenate(cls, parts: Sequence[ExitScores]) -> ExitScores:
        """Concatenate samples in order; optional arrays only if each part has them."""
        probabilities = [part.true_class_probability for part in parts if part.true_class_probability is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.correct for part in parts]),
            np.concatenate(probabilities) if len(probabilities) == len(parts) else None,
            np.concatenate(groups) if len(groups) == len(parts) else None,
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_exits(self) -> int:
        """Number of exits E, the last included."""
        return int(self.scores.shape[1])

    def take(self, indices: npt.NDArray[Any]) -> ExitScores:
        """Select samples by index (repeats allowed) or by mask."""
        optional = (self.true_class_probability, self.groups)
        return ExitScores(
            self.scores[indices],
            self.correct[indices],
            *(None if array is None else array[indices] for array in optional),
        )

    def groups_at(self, exit_: int) -> npt.NDArray[np.int64]:
        """Return the group of each sample at an exit, shape (n,); 0 without groups."""
        return np.zeros(len(self), dtype=np.int64) if self.groups is None else self.groups[:, exit_]


def _to_array(values: Any) -> npt.NDArray[Any]:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return np.asarray((values.double() if values.is_floating_point() else values).numpy())
