"""What a network with exits says of images, once for everything that is asked of it later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedekd.data import scale
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.errors import UserError, nearest
from fedekd.functional import AGREEMENT, SCORES, score_exit, upcast_to_float32
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import eval_mode

#: The splits that training has not touched.
HELD_OUT = ("tuning", "calibration", "holdout", "test")

#: Images at a time; changes no score but in its last bits.
BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class ExitOutputs:
    """All exits' answers to n images.

    Attributes:
        logits: Shape (n, E, C), on the CPU, in at least float32.
        labels: Classes, int64, (n,).
        proxy: What a proxy says of the same images, (n, C), where there is one.
    """

    logits: Tensor
    labels: Tensor
    proxy: Tensor | None = None

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

    @classmethod
    def joined(cls, parts: Sequence[ExitOutputs]) -> ExitOutputs:
        """Those of several splits, in order."""
        proxies = [part.proxy for part in parts if part.proxy is not None]
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat(proxies) if len(proxies) == len(parts) else None,
        )

    def take(self, places: Tensor) -> ExitOutputs:
        """Some of the images, by index or by mask."""
        proxy = None if self.proxy is None else self.proxy[places]
        return ExitOutputs(self.logits[places], self.labels[places], proxy)

    def scored(self, score: str = "max_softmax", gamma: float = 1.0) -> ExitScores:
        """As calibration wants them.

        Args:
            score: A name of `fedekd.functional.SCORES`.
            gamma: Of `agreement`.

        Raises:
            UserError: If the score is not known or lacks its proxy, or the network has diverged.
        """
        if score not in SCORES:
            raise UserError(f"score is {score!r}, which is not known; {nearest(score, SCORES)}")
        if score == AGREEMENT and self.proxy is None:
            raise UserError("score 'agreement' needs a proxy, and this client has none; train with --method FedeKD")
        each = [score_exit(score, logits, self.proxy, gamma) for logits in self.logits.unbind(1)]
        scores = torch.stack(each, dim=1)
        labels = self.labels[:, None, None].expand(-1, self.num_exits, 1)
        true_class = self.logits.softmax(dim=2).gather(2, labels).squeeze(2)
        return ExitScores.checked(scores, self.correct, true_class)


@torch.no_grad()
def exit_outputs(
    network: MultiExitNetwork,
    images: Tensor,
    labels: Tensor,
    batch_size: int = BATCH_SIZE,
    proxy: nn.Module | None = None,
) -> ExitOutputs:
    """Run images through the whole network, all exits evaluated, in the precision of its weights.

    No autocast: a policy that is calibrated on these scores must find the same ones later, on another machine but for
    round-off (a GPU's TF32 included): a score on the very threshold may fall to either side.

    Args:
        network: E exits.
        images: Pixels 0..255, uint8, shape (n, C, H, W), on any device.
        labels: Classes, (n,).
        batch_size: Images at a time.
        proxy: A network that gives a second opinion, if any.
    """
    parts, opinions = [], []
    with eval_mode(network):
        for chosen in torch.split(images, batch_size):
            outputs = network(prepared(network, chosen))
            parts.append(torch.stack([upcast_to_float32(output).cpu() for output in outputs], dim=1))
    if proxy is not None:
        with eval_mode(proxy):
            opinions = [
                upcast_to_float32(proxy(prepared(proxy, each))).cpu() for each in torch.split(images, batch_size)
            ]
    opinion = torch.cat(opinions) if opinions else None
    return ExitOutputs(torch.cat(parts), labels.cpu().to(torch.int64), opinion)


def prepared(network: nn.Module, images: Tensor) -> Tensor:
    """Pixels 0..255 as the network takes them: scaled, on its device, in its precision and channels last."""
    like = next(network.parameters())
    x = scale(images.to(like.device)).to(like.dtype)
    return x.contiguous(memory_format=torch.channels_last)
