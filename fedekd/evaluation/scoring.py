"""What a network with exits says of images, once for everything that is asked of it later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedekd.certificates import ScoredExits
from fedekd.data import scale
from fedekd.errors import UserError, nearest
from fedekd.functional import CONFIDENCES, at_least_float32
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import evaluating

#: Images at a time; changes no score but in its last bits.
BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class ExitOutputs:
    """All exits' answers to n images.

    Attributes:
        logits: Shape (n, E, C), on the CPU, in at least float32.
        labels: Classes, int64, (n,).
    """

    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        return self.logits.shape[1]

    @property
    def correct(self) -> Tensor:
        """Whether each exit is right, bool, (n, E)."""
        return self.logits.argmax(dim=2) == self.labels[:, None]

    @property
    def accuracies(self) -> list[float]:
        """Of each exit, over all images."""
        return self.correct.double().mean(dim=0).tolist()

    def take(self, places: Tensor) -> ExitOutputs:
        """Some of the images, by index or by mask."""
        return ExitOutputs(self.logits[places], self.labels[places])

    def scored(self, score: str = "max_softmax") -> ScoredExits:
        """As calibration wants them.

        Args:
            score: A name of `fedekd.functional.CONFIDENCES`.

        Raises:
            UserError: If the score is not known, or the network has diverged.
        """
        if score not in CONFIDENCES:
            raise UserError(f"score is {score!r}, which is not known; {nearest(score, CONFIDENCES)}")
        scores = torch.stack([CONFIDENCES[score](logits) for logits in self.logits.unbind(1)], dim=1)
        labels = self.labels[:, None, None].expand(-1, self.num_exits, 1)
        true_class = self.logits.softmax(dim=2).gather(2, labels).squeeze(2)
        return ScoredExits.checked(scores, self.correct, true_class)


@torch.no_grad()
def exit_outputs(
    network: MultiExitNetwork, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE
) -> ExitOutputs:
    """Run images through the whole network, all exits evaluated, in the precision of its weights.

    No autocast: a policy that is calibrated on these scores must find the same ones later, on whatever machine.

    Args:
        network: E exits.
        images: Pixels 0..255, uint8, shape (n, C, H, W), on any device.
        labels: Classes, (n,).
        batch_size: Images at a time.
    """
    parts = []
    with evaluating(network):
        for chosen in torch.split(images, batch_size):
            outputs = network(prepared(network, chosen))
            parts.append(torch.stack([at_least_float32(output).cpu() for output in outputs], dim=1))
    return ExitOutputs(torch.cat(parts), labels.cpu().to(torch.int64))


def prepared(network: nn.Module, images: Tensor) -> Tensor:
    """Pixels 0..255 as the network takes them: scaled, on its device, in its precision and channels last."""
    like = next(network.parameters())
    x = scale(images.to(like.device)).to(like.dtype)
    return x.contiguous(memory_format=torch.channels_last)
