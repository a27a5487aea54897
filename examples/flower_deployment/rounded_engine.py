"""Sequential engine with the result of secure aggregation, without the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedekd.federation import ClientResult, RoundRequest, SequentialEngine
from fedekd.flower.secure.aggregation import SecureAggregation


class RoundedEngine(SequentialEngine):
    """Sequential engine in which each update is the mean of all quantized updates."""

    secure = SecureAggregation()

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """Run the participants and yield their results with the mean as update."""
        results, sent = list(super().run_clients(request)), request.broadcast.shared
        changes = [self.secure.quantize(result.update.state, sent) for result in results if result.update]
        means = [np.sum(parts, axis=0) / len(parts) for parts in zip(*changes, strict=True)]
        mean = self.secure.apply(sent, means) if means else {}
        for result in results:
            yield result if result.update is None else replace(result, update=replace(result.update, state=mean))
