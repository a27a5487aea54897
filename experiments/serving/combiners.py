"""Combinations of an ensemble's members, as functions of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fedekd.functional import (
    combine_log_linear,
    fit_log_linear_weights,
    fit_sample_weights,
    kl_energy,
    sample_weights,
    trust_weights,
)

EQUAL = "equal weights"
FITTED = "fitted weights"
FITTED_ENTROPY = "fitted weights with entropy"

#: Held-out samples below which weights are equal, as in ProxyEnsemble.
MIN_SAMPLES = 10

#: Random permutations of the gate's weights, over which accuracy is averaged.
SHUFFLES = 20


def combiners(
    log_probs_tuning: Tensor, y_tuning: Tensor, log_probs_test: Tensor, ridge: float = 10.0, seed: int = 0
) -> dict[str, Tensor]:
    """Predict the test samples with each combination of the members.

    No combination has access to test labels. The gate is FedeKD's (beta 1) over the test samples as one batch: the
    weight of each proxy falls with its disagreement with the private model, the first member.

    Args:
        log_probs_tuning: Log-probabilities of M members, the private model first, shape (M, n, C).
        y_tuning: Their classes, shape (n,).
        log_probs_test: Shape (M, B, C).
        ridge: Ridge of the fitted weights towards equal ones.
        seed: Seed of the shuffled gate.

    Returns:
        Predicted classes by name, shape (B,), or (`SHUFFLES`, B) for the shuffled gate.
    """
    members, samples, _ = log_probs_test.shape
    probabilities = log_probs_test.exp()
    entropy = -(probabilities * log_probs_test.clamp_min(-100)).sum(dim=2)
    most_confident = probabilities.amax(dim=2).argmax(dim=0)

    private, *proxies = log_probs_test
    energies = torch.stack([kl_energy(private, proxy) for proxy in proxies])
    gate = torch.stack([trust_weights(energy) for energy in energies])
    reverse = 1 - gate  # beta -1
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(samples, generator=generator) for _ in range(SHUFFLES)]

    def predict(weights: Tensor) -> Tensor:
        return combine_log_linear(log_probs_test, weights).argmax(dim=1)

    def gated(weights: Tensor) -> Tensor:
        # The mean weight of the gate is 1/2, so that on average all members count equally.
        return predict(torch.cat([torch.ones(1, samples), 2 * weights]))

    fitted = fit_log_linear_weights(log_probs_tuning, y_tuning, ridge, MIN_SAMPLES)
    coefficients = fit_sample_weights(log_probs_tuning, y_tuning, ridge, MIN_SAMPLES)
    return {
        EQUAL: predict(torch.full((members,), 1 / members)),
        FITTED: predict(fitted),
        FITTED_ENTROPY: predict(sample_weights(log_probs_test, coefficients)),
        "mean of probabilities": probabilities.mean(dim=0).argmax(dim=1),
        "weights by exp(-entropy)": predict((-entropy).softmax(dim=0)),
        "most confident member": log_probs_test[most_confident, torch.arange(samples)].argmax(dim=1),
        "FedeKD's gate": gated(gate),
        "gate, shuffled": torch.stack([gated(gate[:, order]) for order in permutations]),
        "gate, reversed": gated(reverse),
    }
