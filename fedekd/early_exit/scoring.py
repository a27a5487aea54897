"""Outputs of all exits on a set of images, and their confidence scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedekd.data import Inputs, in_memory_format, scale, split_inputs
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.errors import UserError, require_choice
from fedekd.functional import AGREEMENT, SCORES, score_exit, upcast_to_float32
from fedekd.models import MultiExitNetwork, eval_mode

#: Splits that training does not use.
HELD_OUT = ("tuning", "calibration", "holdout", "test")

#: Images per forward pass; affects the last bits of scores only.
BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class ExitOutputs:
    """Logits of all E exits for n images.

    Attributes:
        logits: Shape (n, E, C), on the CPU, at least float32.
        labels: Class indices, int64, shape (n,).
        proxy: Logits of a proxy for the same images, shape (n, C), or None.
        groups: Name of the group of each image in a column of the data, shape (n,), or None.
    """

    logits: Tensor
    labels: Tensor
    proxy: Tensor | None = None
    groups: npt.NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_exits(self) -> int:
        """Number of exits E, the last included."""
        return self.logits.shape[1]

    @property
    def correct(self) -> Tensor:
        """True where the prediction of an exit is correct, bool, shape (n, E)."""
        return self.logits.argmax(dim=2) == self.labels[:, None]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each exit over all images."""
        return self.correct.double().mean(dim=0).tolist()

    @classmethod
    def concatenate(cls, parts: Sequence[ExitOutputs]) -> ExitOutputs:
        """Concatenate outputs in order; proxy logits and groups only if all have them."""
        proxies = [part.proxy for part in parts if part.proxy is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat(proxies) if len(proxies) == len(parts) else None,
            np.concatenate(groups) if len(groups) == len(parts) else None,
        )

    def take(self, indices: Tensor) -> ExitOutputs:
        """Select images by index or by mask."""
        proxy = None if self.proxy is None else self.proxy[indices]
        groups = None if self.groups is None else self.groups[indices.cpu().numpy()]
        return ExitOutputs(self.logits[indices], self.labels[indices], proxy, groups)

    def to_scores(self, score: str = "max_softmax", gamma: float = 1.0) -> ExitScores:
        """Compute the confidence score of each exit.

        Args:
            score: A key of `fedekd.functional.SCORES`.
            gamma: Weight of the disagreement in the score `agreement`.

        Raises:
            UserError: The score is unknown or its proxy is missing, or scores are not finite.
        """
        require_choice("score", score, SCORES)
        if score == AGREEMENT and self.proxy is None:
            raise UserError(
                "score: expected a score that needs no proxy, got 'agreement'. Train with --method FedeKD to have one"
            )
        scores = torch.stack([score_exit(score, logits, self.proxy, gamma) for logits in self.logits.unbind(1)], dim=1)
        labels = self.labels[:, None, None].expand(-1, self.num_exits, 1)
        true_class = self.logits.softmax(dim=2).gather(2, labels).squeeze(2)
        return ExitScores.from_arrays(scores, self.correct, true_class)


@torch.no_grad()
def exit_outputs(
    network: MultiExitNetwork,
    images: Inputs,
    labels: Tensor,
    batch_size: int = BATCH_SIZE,
    proxy: nn.Module | None = None,
) -> ExitOutputs:
    """Run images through all exits in the precision of the network's weights.

    Without autocast, so that a policy calibrated on these scores finds the same scores at deployment up to round-off
    (TF32 on a GPU included); a score equal to the threshold may fall on either side.

    Args:
        network: Network with E exits.
        images: Pixels 0..255, uint8, shape (n, C, H, W), on any device; stored ones are read in batches.
        labels: Class indices, shape (n,).
        batch_size: Images per forward pass.
        proxy: Second network for the score `agreement`.
    """
    with eval_mode(network):
        logits = [
            torch.stack([upcast_to_float32(output).cpu() for output in network(network_input(network, batch))], dim=1)
            for batch in split_inputs(images, batch_size)
        ]
    proxy_logits = None
    if proxy is not None:
        with eval_mode(proxy):
            parts = [
                upcast_to_float32(proxy(network_input(proxy, batch))).cpu()
                for batch in split_inputs(images, batch_size)
            ]
        proxy_logits = torch.cat(parts)
    return ExitOutputs(torch.cat(logits), labels.cpu().to(torch.int64), proxy_logits)


def network_input(network: nn.Module, images: Tensor) -> Tensor:
    """Return scaled inputs in the network's dtype; images are channels last."""
    like = next(network.parameters())
    x = scale(images.to(like.device)).to(like.dtype)
    return in_memory_format(x, torch.channels_last)
