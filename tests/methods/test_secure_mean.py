"""supports_secure_mean: replacing every update by the mean of the updates does not change the server state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedekd.federation import ClientResult, RoundOptions, RoundRequest, SequentialEngine
from fedekd.functional import average_state_dicts

from .conftest import Federate
from .test_methods import METHODS, small_client

#: Methods that aggregate by a median or by samples, mix heads or average submodels, or exchange nothing.
OTHERS = {
    *(
        "local",
        "safekd",
        "fedavg-samples",
        "fedavg-median",
        "fedekd-trimmed",
        "proxy-ensemble",
        "cafedistill-personal",
        "cafedistill-paper",
        "cafedistill-trunk",
    ),
    *("depthfl", "depthfl-different-depths", "scalefl", "scalefl-different-depths"),
}


class AveragingEngine(SequentialEngine):
    """Replaces every update by the mean of the updates."""

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        visits = list(super().run_clients(request))
        updates = [visit.update for visit in visits if visit.update is not None]
        for visit in visits:
            if visit.update is None:
                yield visit
            else:
                mean = average_state_dicts([update.state for update in updates])
                yield replace(visit, update=replace(visit.update, state=mean))


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of a nested state with their paths."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name}/{key}")


def after_a_round(federate: Federate, name: str, **parts: Any) -> dict[str, torch.Tensor]:
    method = METHODS[name]()
    federate(method, client=small_client(name), rounds=RoundOptions(rounds=1), precision="64-true", **parts).run()
    return dict(tensors(method.server_state))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_supports_secure_mean_holds_for_server_state(name: str, federate: Federate) -> None:
    supported = METHODS[name]().supports_secure_mean
    assert supported is (name not in OTHERS)
    if supported:
        plain, averaged = after_a_round(federate, name), after_a_round(federate, name, engine=AveragingEngine)
        assert plain.keys() == averaged.keys()
        assert plain
        for key, tensor in plain.items():
            torch.testing.assert_close(averaged[key], tensor, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["fedavg-samples", "fedavg-median", "cafedistill-paper"])
def test_supports_secure_mean_false_if_mean_changes_server_state(name: str, federate: Federate) -> None:
    plain, averaged = after_a_round(federate, name), after_a_round(federate, name, engine=AveragingEngine)
    assert max(float((averaged[key] - tensor).abs().max()) for key, tensor in plain.items()) > 1e-5
