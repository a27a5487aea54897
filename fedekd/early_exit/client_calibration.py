"""Calibration of one client's network on the client's own held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from fedekd.data import Inputs, Samples, split_inputs, take_inputs
from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE, ExitOutputs, exit_outputs
from fedekd.errors import UserError
from fedekd.functional import AGREEMENT
from fedekd.methods import Client
from fedekd.models import ExitCosts, MultiExitNetwork, exit_costs
from fedekd.seeding import derive_seed


def exit_network(client: Client) -> MultiExitNetwork:
    """Return the client's deployed network.

    Raises:
        UserError: The network has no exits.
    """
    network = client.deployed_model
    if not isinstance(network, MultiExitNetwork):
        raise UserError(
            f"{client.deployed_role} model of {client.splits.label}: expected a network with exits, got a"
            f" {type(network).__name__} without exits. Train with --method SafeKD, or with --client.exits 3 and any"
            " other method"
        )
    return network


def require_unused_validation(client: Client) -> None:
    """Check that the client's method does not train on its validation split.

    Raises:
        UserError: It does.
    """
    if "validation" in client.training_splits:
        raise UserError(
            f"{client.splits.label}: expected a method that does not train on validation samples, because a"
            " guarantee needs unseen samples. Give other labelled images: calibrate --input"
        )


def training_indices(client: Client) -> Tensor:
    """Return the indices of the images that the client's method used in training."""
    return torch.cat([getattr(client.splits, split) for split in client.training_splits])


def image_costs(network: MultiExitNetwork, samples: Samples, proxy: nn.Module | None = None) -> ExitCosts:
    """Count the FLOPs per image of a data set in the network and in the proxy."""
    return exit_costs(network, samples.input_shape, proxy)


def calibrate_client(
    client: Client,
    calibrator: SelectiveRiskCalibrator,
    score: str = "max_softmax",
    held_out: Samples | None = None,
    trained_on: Tensor | None = None,
    gamma: float = 1.0,
) -> ExitPolicy:
    """Calibrate the exits of one client's network.

    The sequence of tests is fixed on the tuning split, and the tests are made on the calibration split. Training does
    not use the calibration split. It may use the tuning split, which only orders the tests: the guarantee still holds.

    Args:
        client: A trained client.
        calibrator: The rule.
        score: A key of `fedekd.functional.SCORES`; `agreement` uses the client's proxy.
        held_out: Other labelled images in place of both splits: a third is used for tuning, the rest for calibration.
        trained_on: Indices of all images with which the network was trained or selected (default: the client's training
            splits). A federated network depends on the training images of all clients.
        gamma: Weight of the disagreement in the score `agreement`.

    Raises:
        UserError: The network has no exits, there are no samples, samples were used for training, or `held_out`
            contains repeated images.
    """
    if client.spec.task == "regression":
        raise UserError("task: expected classification, got regression. Exits are calibrated on the error rate")
    network, proxy = exit_network(client), client.networks.get("proxy")
    if held_out is None:
        require_unused_validation(client)
        tuning, calibration = (split_outputs(client, split) for split in ("tuning", "calibration"))
    else:
        _require_unseen(client, held_out, training_indices(client) if trained_on is None else trained_on)
        outputs = exit_outputs(network, held_out.inputs, held_out.labels, proxy=proxy)
        # Shuffled, because a file may be sorted by class.
        generator = torch.Generator().manual_seed(derive_seed(client.spec.seed, client.number, "held out"))
        order = torch.randperm(len(outputs), generator=generator)
        tuning, calibration = (outputs.take(part) for part in order.tensor_split([len(order) // 3]))
    if not len(tuning) or not len(calibration):
        remedy = "Change data.fractions or data.min_samples" if held_out is None else "Give more images in --input"
        raise UserError(
            f"{client.splits.label}: expected at least 1 tuning and 1 calibration sample, got {len(tuning)} and"
            f" {len(calibration)}. {remedy}"
        )
    costs = image_costs(network, client.samples, proxy)
    return fit_policy(calibrator, network, costs, tuning, calibration, score, gamma, proxy)


def fit_policy(
    calibrator: SelectiveRiskCalibrator,
    network: MultiExitNetwork,
    costs: ExitCosts,
    tuning: ExitOutputs,
    calibration: ExitOutputs,
    score: str = "max_softmax",
    gamma: float = 1.0,
    proxy: nn.Module | None = None,
) -> ExitPolicy:
    """Calibrate a network from its outputs on tuning and calibration samples.

    Raises:
        UserError: The rule cannot use the score.
    """
    if calibrator.mode == "safekd_code" and score != "max_softmax":
        raise UserError(f"score: expected max_softmax for mode 'safekd_code', got {score!r}")
    uses_proxy = score == AGREEMENT and proxy is not None
    policy = calibrator.fit_scores(
        calibration.to_scores(score, gamma),
        tuning.to_scores(score, gamma),
        costs.shares([True] * network.num_exits, uses_proxy),
    )
    return replace(
        policy,
        score=score,
        network=network_fingerprint(network),
        gamma=gamma,
        proxy=network_fingerprint(proxy) if uses_proxy and proxy is not None else "",
    )


def split_outputs(client: Client, split: str) -> ExitOutputs:
    """Compute the outputs of all exits on one of a client's splits."""
    network = exit_network(client)
    indices = getattr(client.splits, split).to(client.samples.inputs.device)
    if not len(indices):
        classes = client.spec.num_outputs
        return ExitOutputs(torch.empty(0, network.num_exits, classes), torch.empty(0, dtype=torch.int64))
    images, labels = take_inputs(client.samples.inputs, indices), client.samples.labels[indices]
    return exit_outputs(network, images, labels, proxy=client.networks.get("proxy"))


def count_shared_images(images: Inputs, others: Inputs) -> int:
    """Count the images that occur, pixel by pixel, among others.

    Stored ones are read in batches.

    Args:
        images: uint8, shape (n, C, H, W).
        others: uint8, shape (m, C, H, W).
    """
    known = set(_digests(others))
    return sum(digest in known for digest in _digests(images))


def _digests(images: Inputs) -> Iterator[bytes]:
    for batch in split_inputs(images, BATCH_SIZE):
        for image in batch:
            yield blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest()


def _require_unseen(client: Client, held_out: Samples, trained_on: Tensor) -> None:
    pixels = client.samples.inputs
    if held_out.inputs.shape[1:] != pixels.shape[1:]:
        raise UserError(
            f"--input: expected images of {tuple(pixels.shape[1:])} (channels, height, width) as in training, got"
            f" {tuple(held_out.inputs.shape[1:])}"
        )
    if shared := count_shared_images(held_out.inputs, take_inputs(pixels, trained_on.to(pixels.device))):
        raise UserError(
            f"--input: expected unseen images, got {shared} of {len(held_out)} with which the network was trained or"
            " selected. A guarantee from them would be invalid"
        )
    if repeats := len(held_out) - len(set(_digests(held_out.inputs))):
        raise UserError(
            f"--input: expected independent images, got {repeats} of {len(held_out)} that repeat another one pixel by"
            " pixel. Remove the copies"
        )
