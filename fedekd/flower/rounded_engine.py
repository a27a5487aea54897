"""What secure aggregation comes to, in one process: the mean of the changes that would be masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedekd.federation import ClientResult, RoundRequest, SequentialEngine
from fedekd.flower.secure import SecureAggregation


class RoundedEngine(SequentialEngine):
    """Clients one after another, of whose updates no more is given than a sum on the grid would tell."""

    secure = SecureAggregation()

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """The participants; each update is the mean of all."""
        visits = list(super().run_clients(request))
        changes = [
            self.secure.changes(visit.update.state, request.broadcast.shared) for visit in visits if visit.update
        ]
        means = [np.sum(parts, axis=0) / len(parts) for parts in zip(*changes, strict=True)]
        mean = self.secure.changed(request.broadcast.shared, means) if means else {}
        for visit in visits:
            yield visit if visit.update is None else replace(visit, update=replace(visit.update, state=mean))
