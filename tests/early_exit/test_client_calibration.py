"""A client's policy from the client's own held-out samples."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.early_exit import ExitPolicy, SelectiveRiskCalibrator, network_fingerprint
from fedekd.early_exit.client_calibration import (
    calibrate_client,
    costs_of,
    exit_lines,
    require_exits,
    share_saved,
    shared_images,
    split_outputs,
)
from fedekd.early_exit.policies import load_policy, policy_path
from fedekd.early_exit.scoring import exit_outputs, prepared
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.methods import ClientOptions, FedAvg, SafeKD
from fedekd.models import ExitCosts, PrivateCNN
from fedekd.modules import TrainerFactory

INF = math.inf


def run(file, method, **options):
    client = ClientOptions(
        local_epochs=2,
        private_model={"class_path": "fedekd.models.ProxyCNN"},
        optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        exits=2,
    )
    federation = Orchestrator(
        method,
        FederatedDataModule(str(file), num_clients=2, alpha=50.0, batch_size=16, **options),
        client=client,
        trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        rounds=RoundOptions(rounds=2),
    )
    federation.run()
    return [federation.engine.client(number) for number in range(2)]


@pytest.fixture(scope="module")
def file(write_blobs, tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz", num_samples=600)


@pytest.fixture(scope="module")
def clients(file):
    return run(file, SafeKD())


@pytest.fixture
def client(clients):
    return clients[0]


def test_tuning_is_the_selection_split_and_tests_are_on_the_calibration_split(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.1))
    assert policy.samples == len(client.splits.calibration) > 0
    assert policy.tuning_samples == len(client.splits.tuning) > 0
    own = {int(i) for name in ("tuning", "calibration") for i in getattr(client.splits, name)}
    assert not own & {int(i) for i in client.splits.train}
    tuning, calibration = (split_outputs(client, name).scored() for name in ("tuning", "calibration"))
    by_hand = SelectiveRiskCalibrator(0.1).fit(calibration.scores, calibration.correct, tuning.scores, tuning.correct)
    assert (policy.thresholds, policy.search_bounds, policy.errors) == (
        by_hand.thresholds,
        by_hand.search_bounds,
        by_hand.errors,
    )
    assert policy.network == network_fingerprint(client.networks["private"])
    assert calibrate_client(client, SelectiveRiskCalibrator(0.1)) == policy
    assert calibrate_client(client, SelectiveRiskCalibrator(0.1), "margin").score == "margin"


def test_what_leaves_in_inference_is_what_was_counted(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.3, 0.3))
    assert policy.leaving[0] > 0
    chosen = client.splits.calibration
    outputs = exit_outputs(client.networks["private"], client.images.pixels[chosen], client.images.labels[chosen])

    _, exits = policy.predict(
        client.networks["private"], prepared(client.networks["private"], client.images.pixels[chosen])
    )
    counted = np.bincount(policy.assign(outputs.scored().scores), minlength=2)
    assert tuple(counted) == policy.leaving == tuple(np.bincount(exits.numpy(), minlength=2))


def held_out(client, indices):
    images = client.images
    return replace(images, pixels=images.pixels[indices], targets=images.targets[indices], splits={"all": len(indices)})


def test_other_labelled_images_take_the_place_of_both_splits(client):
    policy = calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=held_out(client, client.splits.test))
    n = len(client.splits.test)
    assert (policy.tuning_samples, policy.samples) == (n // 3, n - n // 3)


def test_images_that_were_trained_on_are_counted_and_refused(client):
    mixed = torch.cat([client.splits.test[:5], client.splits.train[:3], client.splits.train[:1]])
    with pytest.raises(
        UserError, match=r"--input: 4 of 9 images are among those that the network was trained on"
    ) as told:
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=held_out(client, mixed))
    assert "\n" not in str(told.value)


def test_images_of_another_shape_are_refused(client):
    data = held_out(client, client.splits.test)
    other = replace(data, pixels=data.pixels[..., :7])
    with pytest.raises(UserError, match=r"images of \(1, 8, 7\), and the network was trained on \(1, 8, 8\)"):
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=other)


def test_images_that_another_client_trained_a_shared_model_on_are_refused(file):
    averaged = run(file, FedAvg())
    theirs = held_out(averaged[0], averaged[1].splits.train)
    everybodys = torch.cat([client.splits.train for client in averaged])
    with pytest.raises(UserError, match="trained on"):
        calibrate_client(averaged[0], SelectiveRiskCalibrator(0.1), held_out=theirs, trained_on=everybodys)


def test_no_samples_are_told(client):
    one = held_out(client, client.splits.test[:1])
    with pytest.raises(UserError, match="client 0 has 0 tuning and 1 calibration samples; at least 1 of each"):
        calibrate_client(client, SelectiveRiskCalibrator(0.1), held_out=one)


def test_a_network_without_exits_is_told_how_to_get_some():
    with pytest.raises(UserError, match=r"private model of client 3 is a PrivateCNN without exits.*--client.exits 3"):
        require_exits(PrivateCNN(1, 8, 3), "the private model of client 3")


def test_shared_images_are_counted_pixel_by_pixel():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert shared_images(images, images) == 6
    assert shared_images(torch.cat([images[:2], images[:2]]), images[1:]) == 2
    nearly = images.clone()
    nearly[0, 0, 0, 0] += 1
    assert shared_images(nearly, images) == 5
    assert shared_images(images.contiguous(memory_format=torch.channels_last), images) == 6
    assert shared_images(images[:0], images) == shared_images(images, images[:0]) == 0


COSTS = ExitCosts(stages=(100, 200, 300), heads=(10, 20, 40))


def policy_of(thresholds, search_bounds=None, **values):
    bounds = (*thresholds, -INF)
    search_bounds = bounds if search_bounds is None else (*search_bounds, -INF)
    certified = (*(threshold < INF for threshold in thresholds), False)
    counts = {"samples": 10, "leaving": (5, 3, 2), "errors": (1, 0, 2), "needed": (None,) * 3}
    return ExitPolicy(bounds, search_bounds, certified, 0.05, 0.1, "ltt", **{**counts, **values})


def test_lines_tell_what_each_exit_does():
    lines = exit_lines(policy_of((0.9, 0.8)), COSTS)
    assert [line.exit for line in lines] == [1, 2, 3]
    assert [line.threshold for line in lines] == [0.9, 0.8, None]
    assert [(line.samples, line.errors, line.share) for line in lines] == [(5, 1, 0.5), (3, 0, 0.3), (2, 2, 0.2)]
    assert [line.bound for line in lines] == [0.05, 0.05, None]
    assert [line.saved for line in lines] == pytest.approx([1 - 110 / 640, 1 - 330 / 640, 1 - 670 / 640])
    assert [line.note for line in lines] == [""] * 3


def test_lines_say_why_an_exit_is_closed():
    far = exit_lines(policy_of((INF, 0.8), leaving=(0, 8, 2), needed=(335, None, None)), COSTS)
    assert far[0].note == "closed: about 335 calibration samples would open it, and there are 10"
    assert (far[0].bound, far[0].threshold) == (None, None)
    assert far[1].saved == pytest.approx(1 - 320 / 640)  # the closed head is not paid for
    failed = exit_lines(policy_of((INF, 0.8), search_bounds=(0.9, 0.8), leaving=(0, 8, 2)), COSTS)
    assert failed[0].note == "closed: its first test failed on the calibration samples"
    assert failed[1].saved == pytest.approx(1 - 330 / 640)  # and here it is
    hopeless = exit_lines(policy_of((INF, 0.8), leaving=(0, 8, 2)), COSTS)
    assert "wrong too often for alpha 0.05" in hopeless[0].note


def test_lines_say_of_a_path_whose_tests_failed_that_they_failed():
    tuning, calibration = np.ones((200, 2)), np.ones((200, 2))
    calibration[::5] = 0
    policy = SelectiveRiskCalibrator(0.05, mode="path").fit(
        np.full((200, 2), 0.9), calibration, np.full((200, 2), 0.9), tuning
    )
    [note, _] = [line.note for line in exit_lines(policy, ExitCosts((1, 1), (1, 1)))]
    assert "failed on the calibration samples" in note


def test_shares_saved_are_means_over_images():
    both = policy_of((0.9, 0.8))
    assert share_saved(both, [0, 0, 2], COSTS) == pytest.approx(1 - (110 + 110 + 670) / 3 / 640)
    closed = policy_of((INF, INF), leaving=(0, 0, 10))
    assert share_saved(closed, torch.tensor([2, 2]), COSTS) == 0.0


def test_costs_are_those_of_one_image(client):
    costs = costs_of(client.networks["private"], client.images)
    assert costs.full > 0
    assert len(costs.stages) == len(costs.heads) == 2


def test_policies_lie_beside_the_run(tmp_path):
    assert policy_path(tmp_path, 7) == tmp_path / "exits" / "client-007.json"
    assert load_policy(tmp_path, 7) is None
    policy_of((0.9, 0.8)).save(policy_path(tmp_path, 7))
    assert load_policy(tmp_path, 7) == policy_of((0.9, 0.8))


def test_a_client_of_nothing_but_training_samples_is_told(client):
    bare = SimpleNamespace(
        number=5,
        networks=client.networks,
        deployed_model=client.deployed_model,
        deployed_role=client.deployed_role,
        images=client.images,
        training_splits=client.training_splits,
        spec=client.spec,
        splits=replace(client.splits, tuning=client.splits.test[:0]),
    )
    with pytest.raises(UserError, match="client 5 has 0 tuning and"):
        calibrate_client(bare, SelectiveRiskCalibrator(0.1))
