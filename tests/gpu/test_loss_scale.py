"""float16's loss scale lasts over phases, rounds and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedekd.federation import Orchestrator, RoundOptions
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, weights

from .conftest import Federate

pytestmark = pytest.mark.gpu

ROUNDS = 3
INTERVAL = 5
#: Doubles every INTERVAL steps; the default would need 2,000.
SCALER = {"scale": 128.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": INTERVAL}


def with_scaler(run: Orchestrator) -> Orchestrator:
    """Set the state of all loss scalers before the first phase."""
    engine: Any = run.engine
    for number in range(run.num_clients):
        engine.client(number).loss_scales = {role: {**SCALER, "_growth_tracker": 0} for role in ("private", "proxy")}
    return run


def loss_scales(run: Orchestrator) -> dict[int, Any]:
    engine: Any = run.engine
    return {number: engine.client(number).loss_scales for number in range(run.num_clients)}


def test_loss_scale_counts_steps_of_all_rounds(federate: Federate) -> None:
    run = with_scaler(federate(None, "16-mixed", rounds=RoundOptions(rounds=ROUNDS)))
    run.run()
    for number, found in loss_scales(run).items():
        steps = ROUNDS * -(-len(run.data.clients[number].train) // run.data.batch_size)
        assert steps > INTERVAL
        for role in ("private", "proxy"):
            assert found[role]["scale"] == SCALER["scale"] * 2 ** (steps // INTERVAL)
            assert found[role]["_growth_tracker"] == steps % INTERVAL


def test_loss_scale_is_the_same_after_resume(federate: Federate, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"precision": "16-mixed", "rounds": RoundOptions(rounds=ROUNDS)}
    whole = with_scaler(federate(**parts))
    whole.run()
    with pytest.raises(StoppedError):
        with_scaler(federate(**parts, output=tmp_path, observer=StopAfter(phases=18))).run()
    again = federate(**parts, output=tmp_path)
    again.run()
    assert loss_scales(again) == loss_scales(whole)
    assert_equal_weights(weights(whole), weights(again))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_have_no_loss_scale(federate: Federate, precision: str) -> None:
    run = federate(None, precision)
    run.run()
    assert all(not found for found in loss_scales(run).values())
