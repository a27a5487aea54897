"""Coverage of the exit guarantees in a finished federation."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.early_exit import ExitScores, SelectiveRiskCalibrator, check_federated_validity
from fedekd.early_exit.client_calibration import calibrate_client, image_costs
from fedekd.early_exit.client_report import client_exit_report
from fedekd.early_exit.guarantee_coverage import CoverageOptions, federation_coverage
from fedekd.early_exit.scoring import exit_outputs
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import Client, ClientOptions, FedeKD
from fedekd.models import PrivateCNN
from fedekd.modules import TrainerFactory


@pytest.fixture(scope="module")
def clients() -> Any:
    """Three clients on the digits after one round: accurate enough to exit early, but not at every target."""
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
        ({"target_risks": []}, "coverage.target_risks: expected at least 1 entry"),
        ({"modes": []}, "coverage.modes: expected at least 1 entry"),
        ({"target_risks": [0.05, 1.0]}, "coverage.target_risks: expected a number in (0, 1), got 1.0"),
        ({"target_risks": [0.0]}, "coverage.target_risks: "),
        ({"confidence": 0.0}, "coverage.confidence: expected a number in (0, 1), got 0.0"),
        ({"confidence": 1.5}, "coverage.confidence: expected a number in (0, 1), got 1.5"),
        ({"modes": ["ltt", "emprical"]}, "coverage.modes: "),
        ({"draws": 0}, "coverage.draws: expected at least 1, got 0"),
    ],
)
def test_options_invalid_value_raises_one_line_error(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        CoverageOptions(**values)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_options_unknown_mode_suggests_nearest() -> None:
    with pytest.raises(UserError, match=r"got 'emprical'. Did you mean 'empirical'"):
        CoverageOptions(modes=["emprical"])


def test_calibrators_cover_every_rule_and_target_risk() -> None:
    calibrators = CoverageOptions([0.02, 0.05], 0.8, ["ltt", "ltt_joint", "crc"]).calibrators()
    assert {(each.target_risk, each.mode) for each in calibrators} == {
        (a, m) for a in (0.02, 0.05) for m in ("ltt", "ltt_joint", "crc")
    }
    assert len(calibrators) == 6
    assert {each.confidence for each in calibrators} == {0.8}
    assert [(each.target_risk, each.confidence, each.mode) for each in CoverageOptions().calibrators()] == [
        (0.05, 0.9, "ltt"),
        (0.05, 0.9, "empirical"),
    ]


def population_of(client: Any) -> ExitScores:
    """Concatenate all samples of a client that training does not use."""
    parts = []
    for split in (client.splits.tuning, client.splits.calibration, client.splits.holdout, client.splits.test):
        images = client.samples
        parts.append(exit_outputs(client.networks["private"], images.inputs[split], images.labels[split]).to_scores())
    return ExitScores.concatenate(parts)


@pytest.mark.slow
def test_federation_coverage_equals_separate_computations(clients: Any) -> None:
    options = CoverageOptions([0.1, 0.3], 0.8, ["ltt", "ltt_joint", "empirical", "safekd_code"], draws=12)
    results = federation_coverage(clients, options, seed=3)
    rules = [(alpha, mode) for alpha in options.target_risks for mode in options.modes]
    assert [(each.target_risk, each.mode) for each in results] == rules
    assert {(each.confidence, each.draws) for each in results} == {(0.8, 12)}

    populations = [population_of(client) for client in clients]
    for client, population in zip(clients, populations, strict=True):
        untouched = len(client.splits.validation) + len(client.splits.test)
        assert len(population) == untouched == len(client.splits) - len(client.splits.train)
    costs = image_costs(clients[0].networks["private"], clients[0].samples)
    calibration, tuning = ([len(getattr(c.splits, name)) for c in clients] for name in ("calibration", "tuning"))
    assert calibration != tuning
    for each in results:
        calibrator = SelectiveRiskCalibrator(each.target_risk, 0.8, each.mode)
        reports = [client_exit_report(client, calibrate_client(client, calibrator)) for client in clients]
        assert [client.report for client in each.clients] == reports
        by_hand = check_federated_validity(
            populations,
            calibrator,
            calibration,
            tuning,
            12,
            3,
            lambda on: [c / costs.full for c in costs.flops_at_exits(on)],
        )
        assert [client.violations for client in each.clients] == by_hand.client_violations
        assert [client.pooled_violations for client in each.clients] == by_hand.pooled_violations
        assert each.union_violations == by_hand.union_violations

    own = {(each.target_risk, each.mode): [client.violations for client in each.clients] for each in results}
    assert max(own[0.1, "empirical"]) > 6 > max(own[0.1, "ltt"])  # both counts are informative
    by_client = [[client.report.client for client in each.clients] for each in results]
    assert by_client == [[0, 1, 2]] * len(results)
    assert any(client.report.early_share > 0 for each in results if each.mode == "ltt" for client in each.clients)
    rows = json.loads(json.dumps([each.as_values() for each in results]))
    assert [row["clients"][0]["report"]["client"] for row in rows] == [0] * len(results)


def changed(client: Any, **values: Any) -> Any:
    names = ("number", "deployed_model", "deployed_name", "networks", "samples", "training_splits", "spec", "splits")
    other = SimpleNamespace(**{**{name: getattr(client, name) for name in names}, **values})
    other.independent_positions = partial(Client.independent_positions, other)
    return other


@pytest.mark.slow
def test_federation_coverage_invalid_client_raises_one_line_error(clients: Any) -> None:
    client = clients[1]
    none = client.splits.test[:0]
    bad = {
        "private model of client 1: expected a network with exits, got a PrivateCNN": {
            "deployed_model": PrivateCNN(1, 8, 10)
        },
        "client 1: expected at least 1 tuning and 1 calibration sample, got 0": {
            "splits": replace(client.splits, tuning=none)
        },
        "and 0. Change data.fractions": {"splits": replace(client.splits, calibration=none)},
    }
    for words, values in bad.items():
        with pytest.raises(UserError) as error:
            federation_coverage([clients[0], changed(client, **values)], CoverageOptions(draws=1))
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="clients: expected at least 1"):
        federation_coverage([], CoverageOptions(draws=1))


@pytest.mark.slow
def test_federation_coverage_diverged_network_returns_nothing(clients: Any) -> None:
    diverged = copy.deepcopy(clients[1].deployed_model)
    with torch.no_grad():
        next(diverged.parameters()).fill_(torch.nan)
    assert (
        federation_coverage([clients[0], changed(clients[1], deployed_model=diverged)], CoverageOptions(draws=1)) == []
    )
