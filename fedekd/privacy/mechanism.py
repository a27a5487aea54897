"""Gaussian mechanism for the update of a client."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import ndtri

from fedekd.errors import require, shorten
from fedekd.methods.base import ClientUpdate, StateDict
from fedekd.privacy.accounting import mean_epsilon, update_epsilon


@dataclass(frozen=True)
class GaussianMechanism:
    r"""Clip the update of each client and add Gaussian noise to it.

    The change d of the tensors that a client received is sent as

    $$\tilde d = d \cdot \min\big(1, C / \lVert d \rVert_2\big) + N(0, \sigma^2 C^2 I),$$

    with one norm over all tensors. A change that is not finite counts as 0. The client adds the noise itself, so the
    server need not be trusted. `update_epsilon` and `mean_epsilon` state the guarantee against each adversary.

    In a simulation the noise is seeded, so that a run can be repeated: a reader of the seed can subtract it. At Flower
    sites it is drawn from the operating system.

    Args:
        noise_multiplier: sigma, standard deviation of the noise per clipping norm, at least 0. With 0, updates are
            clipped only, and epsilon is infinite.
        clipping_norm: C, largest 2-norm of a change, above 0.
        delta: Probability of the account of epsilon, in (0, 1).

    Raises:
        UserError: If a value is out of range.

    Reference:
        McMahan et al., Learning differentially private recurrent language models, ICLR 2018 (arXiv 1710.06963):
        clipping; noise per client as in Kairouz et al., ICML 2021 (arXiv 2102.06387), Sec. 1.
    """

    noise_multiplier: float = 1.0
    clipping_norm: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        noise, norm = self.noise_multiplier, self.clipping_norm
        require(0 <= noise < math.inf, "privacy.noise_multiplier", "a finite number of at least 0", noise)
        require(0 < norm < math.inf, "privacy.clipping_norm", "a finite number above 0", norm)
        require(0 < self.delta < 1, "privacy.delta", "a probability in (0, 1)", self.delta)

    def randomise(self, update: ClientUpdate, received: StateDict, seed: int | None) -> ClientUpdate:
        """Return an update with clipped change and noise; the given one is unchanged.

        Args:
            update: Update of a client, floating-point tensors.
            received: Tensors of the same names and shapes, from which the client started.
            seed: Seed of the noise, for simulations; None draws it from the operating system.
        """
        changes = {
            name: tensor.detach().cpu().double() - received[name].detach().cpu().double()
            for name, tensor in update.state.items()
        }
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        factor = min(1.0, self.clipping_norm / norm) if norm else 1.0
        noise = torch.from_numpy(_standard_normal(sum(change.numel() for change in changes.values()), seed))
        noise = noise * (self.noise_multiplier * self.clipping_norm)
        state, start = {}, 0
        for name, change in changes.items():
            clipped = change * factor if math.isfinite(norm) else torch.zeros_like(change)
            part = noise[start : start + change.numel()].reshape(change.shape)
            start += change.numel()
            sent = received[name].detach().cpu().double() + clipped + part
            state[name] = sent.to(update.state[name])
        return replace(update, state=state)

    def require_supported(self, message: StateDict, method: str) -> None:
        """Check that the message of a method can carry noise.

        Args:
            message: Tensors that a client receives and sends back.
            method: Name of the method, for the error.

        Raises:
            UserError: If it has no tensors, or one that is not floating-point.
        """
        require(bool(message), "privacy", "a method whose clients send tensors", method, "Omit --privacy.")
        whole = [name for name, tensor in message.items() if not tensor.is_floating_point()]
        require(
            not whole,
            "privacy",
            "a message of floating-point tensors",
            shorten(", ".join(whole)),
            "Choose a method and a model without integers in the message (BatchNorm, for example, counts batches).",
        )

    def account(
        self, rounds: Sequence[Sequence[int]], clients: int, is_mean: bool, has_seeded_noise: bool
    ) -> dict[str, object]:
        """Return the account of epsilon per client over all rounds, for the summary.

        Args:
            rounds: Clients of each round in which updates are sent.
            clients: Number of clients.
            is_mean: True if only the uniform mean of the updates reaches the other clients.
            has_seeded_noise: True if the noise is drawn from the seed of the run. Then epsilon is what the same run
                would have with secret noise; the updates are not protected.

        Returns:
            Parameters, `noise` (`seeded`, or `operating system`), `updates` per client, `epsilon` per client against
            the server, and `epsilon_of_mean` per client against those who see the global model only (None if it is not
            a mean). None stands for infinity.
        """
        sizes = {number: [len(members) for members in rounds if number in members] for number in range(clients)}
        epsilon = [update_epsilon(self.noise_multiplier, len(of_client), self.delta) for of_client in sizes.values()]
        of_mean = [mean_epsilon(self.noise_multiplier, of_client, self.delta) for of_client in sizes.values()]
        return {
            "mechanism": "gaussian",
            "noise_multiplier": self.noise_multiplier,
            "clipping_norm": self.clipping_norm,
            "rounds": len(rounds),
            "delta": self.delta,
            "noise": "seeded" if has_seeded_noise else "operating system",
            "updates": [len(of_client) for of_client in sizes.values()],
            "epsilon": [value if math.isfinite(value) else None for value in epsilon],
            "epsilon_of_mean": [value if math.isfinite(value) else None for value in of_mean] if is_mean else None,
        }


def _standard_normal(size: int, seed: int | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return independent standard normal numbers, shape (size,)."""
    if seed is not None:
        return np.random.default_rng(seed).standard_normal(size)
    # Generators of NumPy and PyTorch can be predicted from their output: zero changes show it.
    words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
    return np.asarray(ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53))
