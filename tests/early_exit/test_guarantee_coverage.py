"""What the calibrated exits of a whole federation come to."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.early_exit import ExitScores, SelectiveRiskCalibrator, check_federated_validity
from fedekd.early_exit.client_calibration import calibrate_client, costs_of
from fedekd.early_exit.client_report import ClientExitReport, client_exit_report
from fedekd.early_exit.guarantee_coverage import ClientCoverage, CoverageOptions, CoverageResult, federation_promises
from fedekd.early_exit.scoring import exit_outputs
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedeKD
from fedekd.models import PrivateCNN
from fedekd.modules import TrainerFactory

LINE = ClientExitReport(0, "private", 3, 2, 0.6, 0.25, 0.05, 0.04, 0.9, 0.91)


@pytest.fixture(scope="module")
def clients() -> Any:
    """Three clients of the digits after a round: good enough to leave early, not good enough for every promise."""
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}
    narrow = {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": 0.25}}
    federation = Orchestrator(
        FedeKD(),
        FederatedDataModule("digits", num_clients=3, alpha=2.0, batch_size=32),
        client=ClientOptions(local_epochs=5, private_model=narrow, optimizer=adam, exits=3),
        trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        rounds=RoundOptions(rounds=1),
    )
    federation.run()
    return [federation.engine.client(number) for number in range(3)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alphas": []}, "promises.alphas is empty; at least one is needed"),
        ({"modes": []}, "promises.modes is empty; at least one is needed"),
        ({"alphas": [0.05, 1.0]}, "promises.alpha"),
        ({"alphas": [0.0]}, "promises.alpha"),
        ({"delta": 0.0}, "promises.delta is 0.0, and must lie between 0 and 1"),
        ({"delta": 1.5}, "promises.delta is 1.5, and must lie between 0 and 1"),
        ({"modes": ["ltt", "plug-in"]}, "promises.mode"),
        ({"draws": 0}, "promises.draws is 0, and must be at least 1"),
    ],
)
def test_bad_options_are_told_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as told:
        CoverageOptions(**values)
    assert str(told.value).startswith(words)
    assert "\n" not in str(told.value)


def test_a_mistaken_rule_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'plug-in', which is not known; did you mean 'empirical'"):
        CoverageOptions(modes=["plug-in"])


def test_every_rule_is_tried_at_every_error_rate() -> None:
    tried = CoverageOptions([0.02, 0.05], 0.2, ["ltt", "path", "crc"]).calibrators()
    assert {(each.alpha, each.mode) for each in tried} == {(a, m) for a in (0.02, 0.05) for m in ("ltt", "path", "crc")}
    assert len(tried) == 6
    assert {each.delta for each in tried} == {0.2}
    assert [(each.alpha, each.delta, each.mode) for each in CoverageOptions().calibrators()] == [
        (0.05, 0.1, "ltt"),
        (0.05, 0.1, "empirical"),
    ]


def promise(*counts: tuple[int, int], draws: int = 10) -> CoverageResult:
    clients = (ClientCoverage(replace(LINE, client=n), *count) for n, count in enumerate(counts))
    return CoverageResult(0.05, 0.1, "ltt", draws, 3, tuple(clients))


def test_shares_are_of_all_clients_and_draws() -> None:
    found = promise((1, 0), (3, 10), (2, 5))
    assert found.own_share == pytest.approx(6 / 30)
    assert found.pooled_share == pytest.approx(15 / 30)
    assert promise((1, 4), draws=40).own_share == pytest.approx(1 / 40)


def test_promises_come_back_from_json_as_they_were() -> None:
    without = replace(LINE, client=1, model="local", certified_risk=None, seen_risk=None, accuracy=0.1 + 0.2)
    kept = CoverageResult(0.05, 0.1, "empirical", 7, 2, (ClientCoverage(LINE, 1, 2), ClientCoverage(without, 0, 7)))
    values = json.loads(json.dumps(kept.as_values()))
    back = CoverageResult.from_values(values)
    assert back == kept
    assert hash(back) == hash(kept)
    assert json.dumps(back.as_values()) == json.dumps(kept.as_values())
    assert CoverageResult.from_values(kept.as_values()) == kept
    assert CoverageResult.from_values(values) == kept  # the values are as they were


def pool_of(client: Any) -> ExitScores:
    """All samples of a client but its training split, split by split."""
    parts = []
    for split in (client.splits.tuning, client.splits.calibration, client.splits.holdout, client.splits.test):
        images = client.images
        parts.append(exit_outputs(client.networks["private"], images.pixels[split], images.labels[split]).scored())
    return ExitScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def test_promises_are_those_of_each_client_and_of_their_pools(clients: Any) -> None:
    options = CoverageOptions([0.1, 0.3], 0.2, ["ltt", "path", "empirical", "released"], draws=12)
    found = federation_promises(clients, options, seed=3)
    rules = [(alpha, mode) for alpha in options.alphas for mode in options.modes]
    assert [(each.alpha, each.mode) for each in found] == rules
    assert {(each.delta, each.draws) for each in found} == {(0.2, 12)}

    pools = [pool_of(client) for client in clients]
    for client, pool in zip(clients, pools, strict=True):
        untouched = len(client.splits.validation) + len(client.splits.test)
        assert len(pool) == untouched == len(client.splits) - len(client.splits.train)
    costs = costs_of(clients[0].networks["private"], clients[0].images)
    calibration, tuning = ([len(getattr(c.splits, name)) for c in clients] for name in ("calibration", "tuning"))
    assert calibration != tuning
    for each in found:
        calibrator = SelectiveRiskCalibrator(each.alpha, 0.2, each.mode)
        lines = [client_exit_report(client, calibrate_client(client, calibrator)) for client in clients]
        assert [client.line for client in each.clients] == lines
        by_hand = check_federated_validity(
            pools, calibrator, calibration, tuning, 12, 3, lambda on: [c / costs.full for c in costs.leaving(on)]
        )
        assert [client.own for client in each.clients] == by_hand.own_violations
        assert [client.pooled for client in each.clients] == by_hand.pooled_violations
        assert each.together == by_hand.together_violations

    own = {(each.alpha, each.mode): [client.own for client in each.clients] for each in found}
    assert max(own[0.1, "empirical"]) > 6 > max(own[0.1, "ltt"])  # so there was something to count
    by_client = [[client.line.client for client in each.clients] for each in found]
    assert by_client == [[0, 1, 2]] * len(found)
    assert any(client.line.leaving > 0 for each in found if each.mode == "ltt" for client in each.clients)
    values = json.loads(json.dumps([each.as_values() for each in found]))
    assert [CoverageResult.from_values(each) for each in values] == found


def changed(client: Any, **values: Any) -> Any:
    names = ("number", "deployed_model", "deployed_role", "networks", "images", "training_splits", "spec", "splits")
    return SimpleNamespace(**{**{name: getattr(client, name) for name in names}, **values})


def test_what_cannot_be_calibrated_is_told_in_one_line(clients: Any) -> None:
    client = clients[1]
    none = client.splits.test[:0]
    bad = {
        "private model of client 1 is a PrivateCNN without exits": {"deployed_model": PrivateCNN(1, 8, 10)},
        "client 1 has 0 tuning": {"splits": replace(client.splits, tuning=none)},
        "tuning and 0 calibration samples": {"splits": replace(client.splits, calibration=none)},
    }
    for words, values in bad.items():
        with pytest.raises(UserError) as told:
            federation_promises([clients[0], changed(client, **values)], CoverageOptions(draws=1))
        assert words in str(told.value)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="there are no clients"):
        federation_promises([], CoverageOptions(draws=1))


def test_of_a_federation_that_has_diverged_nothing_is_promised(clients: Any) -> None:
    diverged = copy.deepcopy(clients[1].deployed_model)
    with torch.no_grad():
        next(diverged.parameters()).fill_(torch.nan)
    assert (
        federation_promises([clients[0], changed(clients[1], deployed_model=diverged)], CoverageOptions(draws=1)) == []
    )
