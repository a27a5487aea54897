"""Results of a client's local model and candidates on its compared samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fedekd.do_no_harm.evidence import METRICS, HeldOut, Labels, labels_of
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.methods import Client
from fedekd.methods.serving import CANDIDATE, Candidate


class ComparedModels:
    """Evaluates the models of one client on held-out samples, for `select_model`.

    Args:
        client: The client after the round.
        rule: Metric, and unit of the compared samples.
        baseline: Results of the client's local baseline.
        rounds: Rounds of local training of the local model.
        local_model: Returns a client with the local model.
    """

    def __init__(
        self,
        client: Client,
        rule: DoNoHarm,
        baseline: LocalBaseline,
        rounds: int,
        local_model: Callable[[], Client],
    ) -> None:
        self.client, self.rule = client, rule
        self.baseline, self.rounds, self.local_model = baseline, rounds, local_model
        self.metric = METRICS[rule.metric]
        # A baseline stores only the scores of two classes: those of all would be C numbers per sample and round.
        self.with_classes = self.metric.ranks and client.spec.num_outputs > 2

    def labels(self, splits: tuple[str, ...]) -> Labels | None:
        """Return the targets of the compared samples; None if the metric needs none."""
        if self.metric.test is None:
            return None
        return labels_of(
            self._joined({split: self.client.targets(split) for split in splits}), self.client.targets("train")
        )

    def local(self, splits: tuple[str, ...]) -> HeldOut:
        """Return the results of the local model."""
        if self.with_classes:
            return self._held_out({split: self.local_model().held_out(split, with_classes=True) for split in splits})
        baseline, rounds = self.baseline, self.rounds
        return self._held_out(
            {split: (baseline.losses_after(rounds, split), baseline.scores_after(rounds, split)) for split in splits}
        )

    def candidate(self, candidate: Candidate | None, splits: tuple[str, ...]) -> HeldOut:
        """Return the results of a candidate, or of what is served."""
        role = None if candidate is None else CANDIDATE
        with nullcontext() if candidate is None else self.client.trial(candidate):
            return self._held_out({split: self.client.held_out(split, role, self.with_classes) for split in splits})

    def _held_out(self, rows: dict[str, tuple[Tensor, Tensor]]) -> HeldOut:
        losses, scores = ({split: row[column] for split, row in rows.items()} for column in (0, 1))
        return HeldOut(self._joined(losses), self._joined(scores))

    def _joined(self, parts: dict[str, Tensor]) -> Tensor:
        """Join the values of the compared samples: with groups one of each group."""
        values = []
        for split, part in parts.items():
            part = part.cpu()
            # Most tasks have no scores.
            is_drawn = self.rule.unit == "group" and len(part)
            values.append(part[self.client.independent_positions(split)] if is_drawn else part)
        return torch.cat(values)
