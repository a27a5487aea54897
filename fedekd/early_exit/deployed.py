"""Outputs of the model that a client deploys, by its exit policy."""

from __future__ import annotations

from collections.abc import Sequence
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
def deployed_outputs(
    client: Client, policy: ExitPolicy | None, batch: Tensor, groups: Sequence[str | None] | None = None
) -> DeployedOutputs:
    """Run the deployed model of a client on a batch.

    Args:
        client: Client of a finished run.
        policy: Its exit policy; None takes the last exit.
        batch: Images as in `Samples.inputs`, or features, shape (B, ...).
        groups: Value of each sample in the column of the policy, if its thresholds depend on it. Samples without a
            value, or of a group that the policy does not have, take the last exit; by default all do.

    Raises:
        UserError: If an output is not finite.
    """
    if policy is not None and policy.needs_group and groups is not None:
        return _by_group(client, policy, batch, groups)
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


def _by_group(client: Client, policy: ExitPolicy, batch: Tensor, groups: Sequence[str | None]) -> DeployedOutputs:
    """Run the samples of each group with the policy of the group."""
    known = {group.name for group in policy.groups}
    names = [group if group in known else None for group in groups]
    parts, rows = [], []
    for name in dict.fromkeys(names):
        index = torch.tensor([row for row, other in enumerate(names) if other == name])
        part = policy if name is None else policy.for_group(name)
        parts.append(deployed_outputs(client, part, batch[index.to(batch.device)]))
        rows.append(index)
    order = torch.cat(rows).argsort()
    return DeployedOutputs(*(torch.cat(tensors)[order.to(tensors[0].device)] for tensors in zip(*parts, strict=True)))


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
