"""What secure aggregation comes to, in one process: the mean of the changes that would be masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedekd.federation import ClientResult, SequentialEngine
from fedekd.flower.secure import SecureAggregation
from fedekd.methods import Broadcast


class RoundedEngine(SequentialEngine):
    """Clients one after another, of whose updates no more is given than a sum on the grid would tell."""

    secure = SecureAggregation()

    def run_clients(
        self, participants: Sequence[int], broadcast: Broadcast, *arguments: Any, **options: Any
    ) -> Iterator[ClientResult]:
        """The participants; each update is the mean of all."""
        visits = list(super().run_clients(participants, broadcast, *arguments, **options))
        changes = [self.secure.changes(visit.update.state, broadcast.shared) for visit in visits if visit.update]
        means = [np.sum(parts, axis=0) / len(parts) for parts in zip(*changes, strict=True)]
        mean = self.secure.changed(broadcast.shared, means) if means else {}
        for visit in visits:
            yield visit if visit.update is None else replace(visit, update=replace(visit.update, state=mean))
