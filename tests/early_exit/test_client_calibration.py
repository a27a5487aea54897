"""Calibration and statistics of one client."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedekd.cli.calibrate_output import remarks
from fedekd.data import ClientSplits, FederatedDataModule
from fedekd.early_exit import ExitPolicy, SelectiveRiskCalibrator, network_fingerprint
from fedekd.early_exit.client_calibration import (
    _shared_groups,
    calibrate_client,
    count_shared_images,
    exit_network,
    image_costs,
    split_outputs,
    training_indices,
)
from fedekd.early_exit.client_report import exit_statistics, mean_saved
from fedekd.early_exit.policy_files import load_policy, policy_path
from fedekd.early_exit.scoring import exit_outputs, network_input
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedAvg, SafeKD
from fedekd.models import ExitCosts, PrivateCNN
from fedekd.modules import TrainerFactory

INF = math.inf


def run(blobs, method, **options):
    client = ClientOptions(
        local_epochs=2,
        private_model={"class_path": "fedekd.models.ProxyCNN"},
        optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        exits=2,
    )
    federation = Orchestrator(
        method,
        FederatedDataModule(str(blobs), num_clients=2, alpha=50.0, batch_size=16, **options),
        client=client,
        trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        rounds=RoundOptions(rounds=2),
    )
    federation.run()
    return [federation.engine.client(number) for number in range(2)]


@pytest.fixture(scope="module")
def blobs(write_blobs, tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz", num_samples=600)


@pytest.fixture(scope="module")
def clients(blobs):
    return run(blobs, SafeKD())


@pytest.fixture
def client(clients):
    return clients[0]


def test_calibrate_client_uses_tuning_and_calibration_splits(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.1))
    assert policy.samples == len(client.splits.calibration) > 0
    assert policy.tuning_samples == len(client.splits.tuning) > 0
    own = {int(i) for name in ("tuning", "calibration") for i in getattr(client.splits, name)}
    assert not own & {int(i) for i in client.splits.train}
    tuning, calibration = (split_outputs(client, name).to_scores() for name in ("tuning", "calibration"))
    by_hand = SelectiveRiskCalibrator(0.1).fit(calibration.scores, calibration.correct, tuning.scores, tuning.correct)
    assert (policy.thresholds, policy.search_bounds, policy.error_counts) == (
        by_hand.thresholds,
        by_hand.search_bounds,
        by_hand.error_counts,
    )
    assert policy.network == network_fingerprint(client.networks["private"])
    assert calibrate_client(client, SelectiveRiskCalibrator(0.1)) == policy
    assert calibrate_client(client, SelectiveRiskCalibrator(0.1), "margin").score == "margin"


def test_predict_exit_counts_equal_calibration_counts(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.3, 0.7))
    assert policy.exit_counts[0] > 0
    chosen = client.splits.calibration
    outputs = exit_outputs(client.networks["private"], client.samples.inputs[chosen], client.samples.labels[chosen])

    _, exits = policy.predict(
        client.networks["private"], network_input(client.networks["private"], client.samples.inputs[chosen])
    )
    counted = np.bincount(policy.assign(outputs.to_scores().scores), minlength=2)
    assert tuple(counted) == policy.exit_counts == tuple(np.bincount(exits.numpy(), minlength=2))


def held_out(client, indices):
    images = client.samples
    return replace(images, inputs=images.inputs[indices], targets=images.targets[indices])


def test_calibrate_client_held_out_images_replace_both_splits(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=held_out(client, client.splits.test))
    n = len(client.splits.test)
    assert (policy.tuning_samples, policy.samples) == (n // 3, n - n // 3)


def test_calibrate_client_training_images_raise(client):
    mixed = torch.cat([client.splits.test[:5], client.splits.train[:3], client.splits.train[:1]])
    with pytest.raises(
        UserError, match=r"--input: expected unseen images, got 4 of 9 with which the network was trained"
    ) as error:
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=held_out(client, mixed))
    assert "\n" not in str(error.value)


def test_calibrate_client_method_that_uses_the_tuning_split(client, monkeypatch):
    expected = calibrate_client(client, SelectiveRiskCalibrator(0.1))
    monkeypatch.setattr(client, "training_splits", ("train", "tuning"))
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.1))
    assert policy == expected
    assert not [line for line in remarks(policy, client, training_indices(client)) if "pixel by pixel" in line]
    copied = torch.cat([training_indices(client), client.splits.calibration[:2]])
    [line] = [line for line in remarks(policy, client, copied) if "pixel by pixel" in line]
    assert line.startswith(f"warning: 2 of {len(client.splits.calibration)} held-out images")
    mixed = torch.cat([client.splits.test[:5], client.splits.tuning[:3]])
    with pytest.raises(UserError, match=r"--input: expected unseen images, got 3 of 8 .* trained or selected"):
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=held_out(client, mixed))


def test_calibrate_client_other_image_shape_raises(client):
    data = held_out(client, client.splits.test)
    other = replace(data, inputs=data.inputs[..., :7])
    with pytest.raises(UserError, match=r"expected images of \(1, 8, 8\) .* as in training, got \(1, 8, 7\)"):
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=other)


def test_calibrate_client_training_images_of_other_client_raise(blobs):
    averaged = run(blobs, FedAvg())
    theirs = held_out(averaged[0], averaged[1].splits.train)
    all_training = torch.cat([client.splits.train for client in averaged])
    with pytest.raises(UserError, match="network was trained"):
        calibrate_client(averaged[0], SelectiveRiskCalibrator(0.1), held_out=theirs, trained_on=all_training)


def test_calibrate_client_too_few_images_raises(client):
    one = held_out(client, client.splits.test[:1])
    with pytest.raises(UserError, match="client 0: expected at least 1 tuning and 1 calibration sample, got 0 and 1"):
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=one)


@pytest.mark.parametrize(("names", "shared"), [(("p1", "p2", "p3", "p4"), 2), (("p1", "p2", "p1", "p3"), 1)])
def test_shared_groups_of_two_sites_with_equal_names_are_different(names: tuple[str, ...], shared: int):
    samples = SimpleNamespace(group=torch.arange(4), group_names=names)
    client = SimpleNamespace(
        samples=samples, splits=SimpleNamespace(train=torch.tensor([0])), training_splits=("train",)
    )
    other = SimpleNamespace(group=torch.tensor([0, 0, 1, 2]), group_names=("p1", "p3", "p4"))
    assert _shared_groups(client, other, torch.tensor([0, 3])) == shared
    assert _shared_groups(client, SimpleNamespace(group=None), torch.tensor([0, 3])) == 0


def test_exit_network_without_exits_raises():
    splits = ClientSplits(3, *[torch.empty(0, dtype=torch.int64)] * 6)
    client = SimpleNamespace(splits=splits, deployed_name="private", deployed_model=PrivateCNN(1, 8, 3))
    message = r"private model of client 3: expected a network with exits, got a PrivateCNN .*--client.exits 3"
    with pytest.raises(UserError, match=message):
        exit_network(client)


def test_count_shared_images_compares_pixels():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert count_shared_images(images, images) == 6
    assert count_shared_images(torch.cat([images[:2], images[:2]]), images[1:]) == 2
    nearly = images.clone()
    nearly[0, 0, 0, 0] += 1
    assert count_shared_images(nearly, images) == 5
    assert count_shared_images(images.contiguous(memory_format=torch.channels_last), images) == 6
    assert count_shared_images(images[:0], images) == count_shared_images(images, images[:0]) == 0


COSTS = ExitCosts(stages=(100, 200, 300), heads=(10, 20, 40))


def policy_of(thresholds, search_bounds=None, **values):
    thresholds_of_all = (*thresholds, -INF)
    search_bounds = thresholds_of_all if search_bounds is None else (*search_bounds, -INF)
    certified = (*(threshold < INF for threshold in thresholds), False)
    counts = {"samples": 10, "exit_counts": (5, 3, 2), "error_counts": (1, 0, 2), "required_samples": (None,) * 3}
    return ExitPolicy(thresholds_of_all, search_bounds, certified, 0.05, 0.9, "ltt", **{**counts, **values})


def test_exit_statistics_per_exit():
    lines = exit_statistics(policy_of((0.9, 0.8)), COSTS)
    assert [line.exit for line in lines] == [1, 2, 3]
    assert [line.threshold for line in lines] == [0.9, 0.8, None]
    assert [(line.samples, line.errors, line.share) for line in lines] == [(5, 1, 0.5), (3, 0, 0.3), (2, 2, 0.2)]
    assert [line.certified_risk for line in lines] == [0.05, 0.05, None]
    assert [line.saved for line in lines] == pytest.approx([1 - 110 / 640, 1 - 330 / 640, 1 - 670 / 640])
    assert [line.note for line in lines] == [""] * 3


def test_exit_statistics_note_why_an_exit_is_closed():
    far = exit_statistics(policy_of((INF, 0.8), exit_counts=(0, 8, 2), required_samples=(335, None, None)), COSTS)
    assert far[0].note == "closed: at least about 335 calibration samples are needed, there are 10"
    assert (far[0].certified_risk, far[0].threshold) == (None, None)
    assert far[1].saved == pytest.approx(1 - 320 / 640)  # the head of the closed exit is not evaluated
    failed = exit_statistics(policy_of((INF, 0.8), search_bounds=(0.9, 0.8), exit_counts=(0, 8, 2)), COSTS)
    assert failed[0].note == "closed: the first test failed on the calibration samples"
    assert failed[1].saved == pytest.approx(1 - 330 / 640)  # its head is evaluated because of the search bound
    hopeless = exit_statistics(policy_of((INF, 0.8), exit_counts=(0, 8, 2)), COSTS)
    assert "no threshold reaches error rate 0.05" in hopeless[0].note


def test_exit_statistics_ltt_joint_note_failed_test():
    tuning, calibration = np.ones((200, 2)), np.ones((200, 2))
    calibration[::5] = 0
    policy = SelectiveRiskCalibrator(0.05, mode="ltt_joint").fit(
        np.full((200, 2), 0.9), calibration, np.full((200, 2), 0.9), tuning
    )
    [note, _] = [line.note for line in exit_statistics(policy, ExitCosts((1, 1), (1, 1)))]
    assert "failed on the calibration samples" in note


def test_mean_saved_is_mean_over_calibration_samples():
    both = policy_of((0.9, 0.8))
    assert mean_saved(both, COSTS) == pytest.approx(1 - (5 * 110 + 3 * 330 + 2 * 670) / 10 / 640)
    closed = policy_of((INF, INF), exit_counts=(0, 0, 10))
    assert mean_saved(closed, COSTS) == 0.0


def test_image_costs_one_entry_per_exit(client):
    costs = image_costs(client.networks["private"], client.samples)
    assert costs.full > 0
    assert len(costs.stages) == len(costs.heads) == 2


def test_load_policy_reads_policy_path(tmp_path):
    assert policy_path(tmp_path, 7) == tmp_path / "exits" / "client-007.json"
    assert load_policy(tmp_path, 7) is None
    policy_of((0.9, 0.8)).save(policy_path(tmp_path, 7))
    assert load_policy(tmp_path, 7) == policy_of((0.9, 0.8))


def test_calibrate_client_empty_tuning_split_raises(client):
    bare = SimpleNamespace(
        number=5,
        networks=client.networks,
        deployed_model=client.deployed_model,
        deployed_role=client.deployed_role,
        samples=client.samples,
        training_splits=client.training_splits,
        spec=client.spec,
        splits=replace(client.splits, client=5, tuning=client.splits.test[:0]),
        independent_positions=client.independent_positions,
    )
    with pytest.raises(UserError, match="client 5: expected at least 1 tuning and 1 calibration sample, got 0 and"):
        calibrate_client(bare, SelectiveRiskCalibrator(0.1))
