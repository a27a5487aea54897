"""What calibration looks at: how sure a network was at each exit, and whether it was right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedekd.errors import UserError


@dataclass(frozen=True, eq=False)
class ExitScores:
    """n samples at E exits, the last included.

    Attributes:
        scores: Confidence, float64, shape (n, E).
        correct: Whether the exit's answer is right, shape (n, E).
        true_class_probability: The probability that each exit gives the true class, shape (n, E), where it is known.
    """

    scores: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    true_class_probability: npt.NDArray[np.float64] | None = None

    @classmethod
    def checked(cls, scores: Any, correct: Any, true_class_probability: Any = None, name: str = "") -> ExitScores:
        """From arrays or tensors, once they are known to hold what is described above.

        Args:
            scores: (n, E).
            correct: (n, E), bool or 0 and 1.
            true_class_probability: (n, E) or None.
            name: What to call the samples in an error, with a trailing space.

        Raises:
            UserError: Shapes that do not fit, no samples, or scores that are no numbers.
        """
        array = _as_array(scores).astype(np.float64)
        if array.ndim != 2 or not array.shape[1]:
            raise UserError(f"{name}scores have the shape {array.shape}; (samples, exits) is needed")
        if not len(array):
            raise UserError(f"there are no {name}samples; at least 1 is needed")
        if np.isnan(array).any():
            sample, exit_ = np.argwhere(np.isnan(array))[0]
            raise UserError(f"{name}scores hold NaN, first at sample {sample}, exit {exit_ + 1}; the network diverged")
        if np.isinf(array).any():
            raise UserError(f"{name}scores hold infinite values; a confidence is a finite number")
        right = _as_array(correct)
        if right.shape != array.shape:
            raise UserError(f"{name}correct has the shape {right.shape}, and the scores have {array.shape}")
        if right.dtype != np.bool_ and not np.isin(right, (0, 1)).all():
            raise UserError(f"{name}correct is {right.dtype} with values other than 0 and 1; bool is needed")
        probability = None
        if true_class_probability is not None:
            probability = _as_array(true_class_probability).astype(np.float64)
            if probability.shape != array.shape or not ((probability >= 0) & (probability <= 1)).all():
                raise UserError(f"{name}true_class_probability must have shape {array.shape} and values in 0..1")
        return cls(array, right.astype(np.bool_), probability)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        return int(self.scores.shape[1])

    def take(self, places: npt.NDArray[Any]) -> ExitScores:
        """Some of the samples, by index (once or several times each) or by mask."""
        probability = self.true_class_probability
        return ExitScores(
            self.scores[places], self.correct[places], None if probability is None else probability[places]
        )


def _as_array(values: Any) -> npt.NDArray[Any]:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return np.asarray((values.double() if values.is_floating_point() else values).numpy())
