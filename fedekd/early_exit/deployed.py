"""Outputs of the model that a client deploys, by its exit policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import network_input
from fedekd.errors import UserError
from fedekd.functional import max_softmax_confidence
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork, eval_mode


class DeployedOutputs(NamedTuple):
    """Outputs of one batch of B samples.

    Attributes:
        x: Inputs as the network takes them.
        logits: Logits (B, C), or values in the unit of the targets (B, 1).
        exits: Exit of each sample, from 0, shape (B,).
        scores: Confidence score of each sample, shape (B,).
    """

    x: Tensor
    logits: Tensor
    exits: Tensor
    scores: Tensor


@torch.no_grad()
def deployed_outputs(client: Client, policy: ExitPolicy | None, batch: Tensor) -> DeployedOutputs:
    """Run the deployed model of a client on a batch.

    Args:
        client: Client of a finished run.
        policy: Its exit policy; None takes the last exit.
        batch: Images as in `Samples.inputs`, or features, shape (B, ...).

    Raises:
        UserError: If an output is not finite.
    """
    network = client.deployed_model
    x = network_input(network, batch)
    if policy is not None and isinstance(network, MultiExitNetwork):
        logits, exits, scores = policy.predict_with_exits(network, x, client.networks.get("proxy"))
    else:
        outputs = exit_outputs(client, x)
        logits, exits = outputs[-1], torch.full((len(x),), len(outputs) - 1)
        scores = max_softmax_confidence(logits)
    if non_finite := int((~logits.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"{client.splits.label}: expected finite outputs, got NaN or inf for {non_finite} of {len(x)} samples."
            " The training of its network diverged"
        )
    return DeployedOutputs(x, logits, exits, scores)


@torch.no_grad()
def exit_outputs(client: Client, x: Tensor) -> list[Tensor]:
    """Return the outputs of all exits of the deployed model, one without exits.

    Args:
        client: Client of a finished run.
        x: Inputs as the network takes them, see `network_input`.

    Returns:
        Logits (B, C), or values in the unit of the targets (B, 1), of each exit.
    """
    network = client.deployed_model
    with eval_mode(network):
        outputs = network(x)
    return [client.in_target_unit(output) for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]
