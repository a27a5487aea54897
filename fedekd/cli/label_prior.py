"""Option `--label_prior`: the label prior to which served outputs are corrected."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from fedekd.errors import UserError, nearest, require, shorten
from fedekd.functional import estimate_label_prior
from fedekd.methods import Client

TRAIN, UNIFORM, ESTIMATED = "train", "uniform", "estimated"
_NAMES = (TRAIN, UNIFORM, ESTIMATED)

#: Largest deviation of the sum of a given prior from 1.
_SUM_TOLERANCE = 1e-6

#: Pseudo-inputs per class that shrink the estimated prior. Chosen on one tuning seed: with 1 per
#: class, an estimate from inputs without a shift lowered the accuracy.
_STRENGTH_PER_CLASS = 10.0

LabelPrior = str | tuple[float, ...]
"""`train`, `uniform`, `estimated`, or one probability per class."""


def parse_label_prior(text: str) -> LabelPrior:
    """Parse the option; the number of classes is checked by `check_label_prior`.

    Raises:
        UserError: If the text is neither a name nor a list of probabilities with sum 1.
    """
    if not text.lstrip().startswith("["):
        expected = "a list of one probability per class, or a name"
        require(text in _NAMES, "--label_prior", expected, text, nearest(text, _NAMES))
        return text
    expected = "numbers from 0 to 1, as in [0.2, 0.8]"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--label_prior: expected {expected}, got {shorten(repr(text))}") from error
    require(len(values) > 0, "--label_prior", "one probability per class", values, "The list is empty.")
    is_valid = all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    require(is_valid, "--label_prior", expected, text)
    total = math.fsum(values)
    require(abs(total - 1) <= _SUM_TOLERANCE, "--label_prior", "probabilities with sum 1", round(total, 9))
    return tuple(map(float, values))


def check_label_prior(client: Client, label_prior: LabelPrior) -> None:
    """Check that a client can be served under a label prior other than `train`.

    Raises:
        UserError: In regression, or for another number of probabilities than classes.
    """
    value = label_prior if isinstance(label_prior, str) else list(label_prior)
    require(client.spec.task == "classification", "--label_prior", f"{TRAIN} for a run of regression", value)
    if not isinstance(label_prior, str):
        classes = client.spec.num_outputs
        require(len(label_prior) == classes, "--label_prior", f"{classes} probabilities", len(label_prior))


def network_label_prior(client: Client) -> Tensor:
    """Return the label prior of a client's deployed network, shape (C,), float64.

    It is the mean of the predicted probabilities on the validation split, in which the training prior counts as one
    more sample. It differs from the training prior where the network is not calibrated. EM then finds no shift where
    there is none.
    """
    logits = client.predict(client.deployed_role, "validation", mixed=False).output.cpu().double()
    return (logits.softmax(dim=1).sum(dim=0) + client.label_prior) / (len(logits) + 1)


def resolve_label_prior(label_prior: LabelPrior, logits: Tensor, source: Tensor) -> Tensor:
    """Return the prior to which outputs are corrected, shape (C,), float64.

    Args:
        label_prior: As `parse_label_prior` returns it.
        logits: Uncorrected outputs of all inputs, shape (n, C); `estimated` uses them.
        source: Prior of the network, shape (C,).
    """
    if not isinstance(label_prior, str):
        return torch.tensor(label_prior, dtype=torch.float64)
    if label_prior == TRAIN:
        return source  # equal priors: no correction
    if label_prior == UNIFORM:
        return torch.full_like(source, 1 / len(source))
    return estimate_label_prior(logits.double().softmax(dim=1), source, strength=_STRENGTH_PER_CLASS * len(source))
