"""Calibration of one client's network on the client's own held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedekd.data import Inputs, Samples, split_inputs, take_inputs
from fedekd.data.raw import sorted_texts
from fedekd.early_exit.calibration.calibrator import SelectiveRiskCalibrator
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.grouping import CLASSES, PREDICTED_CLASS, Grouping, class_numbers
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE, ExitOutputs, exit_outputs
from fedekd.errors import UserError, shorten
from fedekd.functional import AGREEMENT
from fedekd.methods import Client
from fedekd.models import ExitCosts, MultiExitNetwork, exit_costs
from fedekd.seeding import derive_seed

#: Largest number of groups of a calibration.
MAX_GROUPS = 100


@dataclass(frozen=True, eq=False)
class GroupColumn:
    """Groups for the calibration of a client.

    Args:
        by: `true_class`, `predicted_class`, or the name of a column of the data.
        is_shared: True for one threshold per exit that holds for each group.
        values: Value of each sample in the column, in the order of the client's samples or of those that replace them;
            None for classes.
    """

    by: str
    is_shared: bool
    values: npt.NDArray[np.str_] | None = None

    def grouping(self, client: Client, *parts: ExitOutputs) -> Grouping:
        """Return the grouping: all classes, or the classes or values of the samples.

        Thresholds per predicted class are those of all classes. Shared ones are tested for the classes that some exit
        predicts for a tuning sample: a class that only calibration samples have would make the list of tests depend on
        them. True classes and values of a column are those of all samples: given the group of each sample, the tests
        are those of a fixed list.

        Args:
            client: The client.
            *parts: Outputs of the tuning samples, then of the calibration samples.

        Raises:
            UserError: The column has too many values.
        """
        if self.by in CLASSES:
            classes, titles = list(range(client.spec.num_outputs)), client.samples.class_names
            if self.is_shared:
                used = parts[:1] if self.by == PREDICTED_CLASS else parts
                classes = sorted({int(number) for part in used for number in np.unique(class_numbers(self.by, part))})
            return Grouping(self.by, tuple(titles[number] for number in classes), self.is_shared, tuple(classes))
        names = sorted_texts({str(name) for part in parts for name in (() if part.groups is None else part.groups)})
        if len(names) > MAX_GROUPS:
            raise UserError(
                f"groups: expected a column with at most {MAX_GROUPS} values, got {len(names)} in {shorten(self.by)!r}."
                " Add a column with ranges of its values, such as age bands"
            )
        return Grouping(self.by, tuple(names), self.is_shared)


def exit_network(client: Client) -> MultiExitNetwork:
    """Return the client's deployed network.

    Raises:
        UserError: The network has no exits.
    """
    network = client.deployed_model
    if not isinstance(network, MultiExitNetwork):
        raise UserError(
            f"{client.deployed_name} model of {client.splits.label}: expected a network with exits, got a"
            f" {type(network).__name__} without exits. Train with --method SafeKD, or with --client.exits 3 and any"
            " other method"
        )
    return network


def require_unused_validation(client: Client, remedy: str = "Give other labelled images: calibrate --input") -> None:
    """Check that the client's method does not train on its validation split.

    Args:
        client: A trained client.
        remedy: What to do otherwise, a sentence.

    Raises:
        UserError: It does.
    """
    if "validation" in client.training_splits:
        raise UserError(
            f"{client.splits.label}: expected a method that does not train on validation samples, because a"
            f" guarantee needs unseen samples. {remedy}"
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
    groups: GroupColumn | None = None,
    unit: str = "group",
) -> ExitPolicy:
    """Calibrate the exits of one client's network.

    The sequence of tests is fixed on the tuning split, and the tests are made on the calibration split. Training does
    not use the calibration split. It may use the tuning split, which only orders the tests: the guarantee still holds.

    If the samples have groups such as patients, whose samples depend on each other, one sample per patient is drawn for
    the tests: these are independent draws, and all tests stay exact. The target is the error rate of a random sample of
    a random patient. Tests of the mean error per patient would break the independence of the survivors between exits.

    Args:
        client: A trained client.
        calibrator: The rule.
        score: A key of `fedekd.functional.SCORES`; `agreement` uses the client's proxy.
        held_out: Other labelled images in place of both splits: a third is used for tuning, the rest for calibration.
        trained_on: Indices of all images with which the network was trained or selected (default: the client's training
            splits). A federated network depends on the training images of all clients.
        gamma: Weight of the disagreement in the score `agreement`.
        groups: Groups whose error rates are bounded, all at once. Default: one bound for all samples.
        unit: Name of what `Samples.group` numbers, for the policy.

    Raises:
        UserError: The network has no exits, there are no samples, samples were used for training, `held_out` contains
            repeated images, or there are too many groups.
    """
    if client.spec.task == "regression":
        raise UserError("task: expected classification, got regression. Exits are calibrated on the error rate")
    network, proxy = exit_network(client), client.networks.get("proxy")
    if held_out is None:
        require_unused_validation(client)
        tuning, calibration = (
            split_outputs(client, split, independent=split == "calibration") for split in ("tuning", "calibration")
        )
        if groups is not None and groups.values is not None:
            indices = {"tuning": client.splits.tuning, "calibration": independent_indices(client, "calibration")}
            tuning, calibration = (
                replace(part, groups=groups.values[indices[split].cpu().numpy()])
                for split, part in (("tuning", tuning), ("calibration", calibration))
            )
    else:
        _require_unseen(client, held_out, training_indices(client) if trained_on is None else trained_on)
        outputs = exit_outputs(network, held_out.inputs, held_out.labels, proxy=proxy)
        if groups is not None and groups.values is not None:
            outputs = replace(outputs, groups=groups.values)
        seed = derive_seed(client.spec.seed, client.number, "unit")
        outputs = outputs.take(held_out.one_per_group(torch.arange(len(outputs)), seed))
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
    grouping = None if groups is None else groups.grouping(client, tuning, calibration)
    policy = fit_policy(calibrator, network, costs, tuning, calibration, score, gamma, proxy, grouping)
    is_grouped = (client.samples if held_out is None else held_out).group is not None
    return replace(policy, unit=unit) if is_grouped else policy


def fit_policy(
    calibrator: SelectiveRiskCalibrator,
    network: MultiExitNetwork,
    costs: ExitCosts,
    tuning: ExitOutputs,
    calibration: ExitOutputs,
    score: str = "max_softmax",
    gamma: float = 1.0,
    proxy: nn.Module | None = None,
    grouping: Grouping | None = None,
) -> ExitPolicy:
    """Calibrate a network from its outputs on tuning and calibration samples.

    The calibration samples must be independent.

    Raises:
        UserError: The rule cannot use the score.
    """
    if calibrator.mode == "safekd_code" and score != "max_softmax":
        raise UserError(f"score: expected max_softmax for mode 'safekd_code', got {score!r}")
    uses_proxy = score == AGREEMENT and proxy is not None
    calibrated, tuned = (
        replace(part.to_scores(score, gamma), groups=None if grouping is None else grouping.index(part))
        for part in (calibration, tuning)
    )
    cost = costs.shares([True] * network.num_exits, uses_proxy)
    policy = calibrator.fit_scores(calibrated, tuned, cost, grouping)
    return replace(
        policy,
        score=score,
        network=network_fingerprint(network),
        gamma=gamma,
        proxy=network_fingerprint(proxy) if uses_proxy and proxy is not None else "",
    )


def split_outputs(client: Client, split: str, independent: bool = False) -> ExitOutputs:
    """Compute the outputs of all exits on one of a client's splits.

    Args:
        client: The client.
        split: Name of the split.
        independent: Take one sample of each group, see `independent_indices`. Default: all samples.
    """
    network = exit_network(client)
    indices = independent_indices(client, split) if independent else getattr(client.splits, split)
    indices = indices.to(client.samples.inputs.device)
    if not len(indices):
        classes = client.spec.num_outputs
        return ExitOutputs(torch.empty(0, network.num_exits, classes), torch.empty(0, dtype=torch.int64))
    images, labels = take_inputs(client.samples.inputs, indices), client.samples.labels[indices]
    return exit_outputs(network, images, labels, proxy=client.networks.get("proxy"))


def independent_indices(client: Client, split: str) -> Tensor:
    """Return a split's samples, one of each group such as a patient, drawn uniformly."""
    indices: Tensor = getattr(client.splits, split)
    return indices[client.independent_positions(split)]


def count_shared_images(images: Inputs, others: Inputs) -> int:
    """Count the images that occur, pixel by pixel, among others.

    Stored ones are read in batches.

    Args:
        images: uint8, shape (n, C, H, W).
        others: uint8, shape (m, C, H, W).
    """
    known = set(input_digests(others))
    return sum(digest in known for digest in input_digests(images))


def input_digests(inputs: Inputs) -> Iterator[str]:
    """Yield the hash of each input, 32 hexadecimal digits (BLAKE2b).

    Args:
        inputs: Images or features, shape (n, ...), as in `Samples.inputs`; stored ones are read in batches.
    """
    for batch in split_inputs(inputs, BATCH_SIZE):
        for sample in batch:
            yield blake2b(sample.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _shared_groups(client: Client, held_out: Samples, trained_on: Tensor) -> int:
    """Count the groups of other images that were used in training.

    Equal names at two sites are different groups: if there are any, only groups of the client's own training count.
    """
    samples = client.samples
    if held_out.group is None or samples.group is None or not samples.group_names:
        return 0
    is_unique = len(set(samples.group_names)) == len(samples.group_names)
    used = trained_on if is_unique else training_indices(client)
    known = {samples.group_names[number] for number in set(samples.group[used.cpu()].tolist())}
    return len(known.intersection(held_out.group_names[number] for number in set(held_out.group.tolist())))


def _require_unseen(client: Client, held_out: Samples, trained_on: Tensor) -> None:
    pixels = client.samples.inputs
    if held_out.inputs.shape[1:] != pixels.shape[1:]:
        raise UserError(
            f"--input: expected images of {tuple(pixels.shape[1:])} (channels, height, width) as in training, got"
            f" {tuple(held_out.inputs.shape[1:])}"
        )
    if patients := _shared_groups(client, held_out, trained_on):
        raise UserError(
            f"--input: expected images of groups, such as patients, that training has not used, got {patients} groups"
            " of training or selection. A guarantee from them would be invalid"
        )
    if shared := count_shared_images(held_out.inputs, take_inputs(pixels, trained_on.to(pixels.device))):
        raise UserError(
            f"--input: expected unseen images, got {shared} of {len(held_out)} with which the network was trained or"
            " selected. A guarantee from them would be invalid"
        )
    if repeats := len(held_out) - len(set(input_digests(held_out.inputs))):
        raise UserError(
            f"--input: expected independent images, got {repeats} of {len(held_out)} that repeat another one pixel by"
            " pixel. Remove the copies"
        )
