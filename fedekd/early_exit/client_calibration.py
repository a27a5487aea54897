"""A policy for a client's network, from the client's own held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from fedekd.data import ImageData
from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import ExitOutputs, exit_outputs
from fedekd.errors import UserError
from fedekd.functional import AGREEMENT
from fedekd.methods import Client
from fedekd.models import ExitCosts, MultiExitNetwork, exit_costs
from fedekd.seeding import derive_seed


@dataclass(frozen=True)
class ExitLine:
    """What calibration found for one exit.

    Attributes:
        exit: Its number, from 1.
        threshold: At which score images leave; None where it is closed.
        samples: Calibration samples that leave there.
        errors: How many of those are wrong.
        bound: The error rate that is promised; None where nothing is.
        share: Of all calibration samples, how many leave there.
        saved: Share of the full network's FLOPs that an image saves which leaves there.
        note: In words, what else there is to say.
    """

    exit: int
    threshold: float | None
    samples: int
    errors: int
    bound: float | None
    share: float
    saved: float
    note: str


def require_exits(network: object, whose: str) -> MultiExitNetwork:
    """A network as one with exits.

    Raises:
        UserError: If it has none; it says how to get some.
    """
    if not isinstance(network, MultiExitNetwork):
        raise UserError(
            f"{whose} is a {type(network).__name__} without exits; train one with exits: --method SafeKD, or"
            " --client.exits 3 with any other method"
        )
    return network


def exits_of(client: Client) -> MultiExitNetwork:
    """The network that a client keeps.

    Raises:
        UserError: If it has no exits.
    """
    return require_exits(client.deployed_model, f"the {client.deployed_role} model of client {client.number}")


def require_untouched(client: Client) -> None:
    """Hold a client's validation split to be one that its method has not learned from.

    Raises:
        UserError: If it has.
    """
    if "validation" in client.training_splits:
        raise UserError(
            f"client {client.number} was trained by a method that learns from its validation samples: nothing can be"
            " promised on them, only on labelled images that it has never seen (calibrate --input)"
        )


def learned_from(client: Client) -> Tensor:
    """Which images a client's method has trained on, as indices."""
    return torch.cat([getattr(client.splits, split) for split in client.training_splits])


def costs_of(network: MultiExitNetwork, images: ImageData, proxy: nn.Module | None = None) -> ExitCosts:
    """FLOPs of one image of a data set, in the network and in the proxy whose opinion is asked."""
    return exit_costs(network, (images.in_channels, *images.image_size), proxy)


def calibrate_client(
    client: Client,
    calibrator: SelectiveRiskCalibrator,
    score: str = "max_softmax",
    held_out: ImageData | None = None,
    trained_on: Tensor | None = None,
    gamma: float = 1.0,
) -> ExitPolicy:
    """A policy for one client's network.

    The order of the tests is decided on the tuning split and the tests are made on the calibration split; training
    has touched neither.

    Args:
        client: A trained client.
        calibrator: The rule.
        score: Which confidence, a name of `fedekd.functional.SCORES`; `agreement` asks the client's proxy, too.
        held_out: Other labelled images in place of both splits: a third of them tunes, the others calibrate.
        trained_on: Images that the network has learned from or was chosen by, as indices, where that is more than the
            client's own training: a federated network has learned from everybody's.
        gamma: Of `agreement`.

    Raises:
        UserError: If the network has no exits, there are no samples, it has learned from the client's own splits or
            from images of `held_out`, or `held_out` repeats itself.
    """
    if client.spec.task == "regression":
        raise UserError("exits are calibrated by whether a class is right, and this is a regression run")
    network = exits_of(client)
    if held_out is None:
        require_untouched(client)
        tuning, calibration = (split_outputs(client, split) for split in ("tuning", "calibration"))
    else:
        _require_apart(client, held_out, learned_from(client) if trained_on is None else trained_on)
        outputs = exit_outputs(network, held_out.pixels, held_out.labels, proxy=client.networks.get("proxy"))
        # Shuffled: a file may be sorted by class.
        generator = torch.Generator().manual_seed(derive_seed(client.spec.seed, client.number, "held out"))
        order = torch.randperm(len(outputs), generator=generator)
        tuning, calibration = (outputs.take(part) for part in order.tensor_split([len(order) // 3]))
    if not len(tuning) or not len(calibration):
        raise UserError(
            f"client {client.number} has {len(tuning)} tuning and {len(calibration)} calibration samples; at least 1 of"
            f" each is needed ({'data.fractions, data.min_samples' if held_out is None else 'more images in --input'})"
        )
    proxy = client.networks.get("proxy")
    costs = costs_of(network, client.images, proxy)
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
    """A policy from what a network said of tuning and of calibration samples.

    Raises:
        UserError: If the rule cannot use the score.
    """
    if calibrator.mode == "released" and score != "max_softmax":
        raise UserError(f"mode 'released' compares probabilities, and the score is {score!r}; use max_softmax")
    uses_proxy = score == AGREEMENT and proxy is not None
    policy = calibrator.fit_scored(
        calibration.scored(score, gamma),
        tuning.scored(score, gamma),
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
    """All exits' answers to one of a client's splits."""
    network = exits_of(client)
    indices = getattr(client.splits, split).to(client.images.pixels.device)
    if not len(indices):
        classes = client.spec.num_outputs
        return ExitOutputs(torch.empty(0, network.num_exits, classes), torch.empty(0, dtype=torch.int64))
    images, labels = client.images.pixels[indices], client.images.labels[indices]
    return exit_outputs(network, images, labels, proxy=client.networks.get("proxy"))


def exit_lines(policy: ExitPolicy, costs: ExitCosts) -> list[ExitLine]:
    """A policy exit by exit, the last included."""
    shares = costs.shares(policy.evaluated, policy.uses_proxy)
    lines = []
    for place in range(policy.num_exits):
        last = place == policy.num_exits - 1
        is_open = last or policy.thresholds[place] < float("inf")
        lines.append(
            ExitLine(
                exit=place + 1,
                threshold=policy.thresholds[place] if is_open and not last else None,
                samples=policy.leaving[place],
                errors=policy.errors[place],
                bound=policy.alpha if policy.certified[place] else None,
                share=policy.leaving[place] / policy.samples,
                saved=1.0 - shares[place],
                note="" if is_open else _why_closed(policy, place),
            )
        )
    return lines


def share_saved(policy: ExitPolicy, exits: Sequence[int] | Tensor, costs: ExitCosts) -> float:
    """Share of the full network's FLOPs that is saved by images that left at these exits."""
    shares = torch.tensor(costs.shares(policy.evaluated, policy.uses_proxy), dtype=torch.float64)
    return 1.0 - float(shares[torch.as_tensor(exits)].mean())


def _why_closed(policy: ExitPolicy, place: int) -> str:
    needed = policy.needed[place]
    if needed is not None and needed > policy.samples:
        return f"closed: about {needed} calibration samples would open it, and there are {policy.samples}"
    if policy.mode == "path" and any(policy.certified):
        return "closed: the cheapest certified thresholds keep it closed"
    if policy.search_bounds[place] < float("inf") or needed is not None:
        return "closed: its first test failed on the calibration samples"
    if MODES[policy.mode].promises:
        return f"closed: however sure it is, it is wrong too often for alpha {policy.alpha:g}, or nobody comes here"
    return "closed: no threshold keeps what the rule asks for"


def shared_images(images: Tensor, others: Tensor) -> int:
    """How many of `images` are, pixel by pixel, among `others`; both uint8, (n, C, H, W)."""
    known = {_content(image) for image in others}
    return sum(_content(image) in known for image in images)


def _content(image: Tensor) -> bytes:
    return blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest()


def _require_apart(client: Client, held_out: ImageData, trained_on: Tensor) -> None:
    if held_out.pixels.shape[1:] != client.images.pixels.shape[1:]:
        given, own = tuple(held_out.pixels.shape[1:]), tuple(client.images.pixels.shape[1:])
        raise UserError(
            f"--input has images of {given}, and the network was trained on {own} (channels, height, width)"
        )
    train = client.images.pixels[trained_on.to(client.images.pixels.device)]
    if shared := shared_images(held_out.pixels, train):
        raise UserError(
            f"--input: {shared} of {len(held_out)} images are among those that the network was trained on"
            " or chosen by; a promise made from them would be worth nothing"
        )
    if repeats := len(held_out) - len({_content(image) for image in held_out.pixels}):
        raise UserError(
            f"--input: {repeats} of {len(held_out)} images repeat another one, pixel by pixel; a promise counts each as"
            " evidence of its own, so each may be there once"
        )
