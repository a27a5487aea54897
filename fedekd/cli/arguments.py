"""Arguments of commands on finished training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser

from fedekd.configuration.trained import Trained
from fedekd.data import Samples
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, listed, print_warning, shorten
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork


def add_trained_arguments(parser: ArgumentParser) -> None:
    """Add `RUN` and `--site`, of which a command needs exactly one."""
    parser.add_argument("run", type=str, nargs="?", default="", help="Folder of a finished run.")
    parser.add_argument(
        "--site",
        type=str | None,
        default=None,
        help="In place of RUN, at a site of a finished Flower run: the folder of its --node-config.",
    )


def add_client_argument(parser: ArgumentParser) -> None:
    """Add `--client` of a command for one client."""
    parser.add_argument(
        "--client",
        type=str | None,
        default=None,
        help="Number of the client, or name of its site; optional with one client, and with --site.",
    )


def warn_without_guarantee(trained: Trained, client: Client, policy: ExitPolicy | None) -> None:
    """Warn if a network with exits has no policy, or a policy without guarantee."""
    if policy is not None and policy.has_no_guarantee:
        print_warning(f"the policy was calibrated with mode {policy.mode}, which has no guarantee")
    if policy is not None and policy.is_certified and not policy.unit and client.samples.group is not None:
        print_warning(
            "the exit policy was calibrated as if all samples of a group, such as a patient, were independent, and its"
            f" guarantee is not valid for them; run again: calibrate {trained.argument}"
        )
    if policy is None and isinstance(client.deployed_model, MultiExitNetwork):
        print_warning(
            f"{client.splits.label} has no exit policy, all samples take the last exit; for early exits run: calibrate"
            f" {trained.argument}"
        )


def policy_of_group(policy: ExitPolicy | None, group: str) -> ExitPolicy:
    """Return the exit policy of the group that `--group` names.

    Raises:
        UserError: There is no policy, its thresholds do not depend on a column, or it has no such group.
    """
    if policy is None:
        raise UserError(f"--group: expected none, because no exit policy is used, got {shorten(repr(group))}. Omit it")
    try:
        return policy.for_group(group)
    except UserError as error:
        raise UserError(f"--{error}") from error


def select_clients(clients: Sequence[Client], chosen: str | None) -> Sequence[Client]:
    """Return all clients, or the one with the given number or name of a site.

    Args:
        clients: All clients.
        chosen: Name of a site, else a number from 0. A site whose name is a number comes first.

    Raises:
        UserError: There is no such client.
    """
    if chosen is None:
        return clients
    named = [client for client in clients if client.splits.name == chosen]
    numbered = [client for client in clients if str(client.number) == chosen]
    if not named and not numbered:
        raise UserError(f"--client: expected {client_choices(clients)}, got {shorten(repr(chosen))}")
    return named or numbered


def select_client(trained: Trained, chosen: str | None) -> Client:
    """Return one client; the number or name is optional where there is only one.

    Raises:
        UserError: There is no such client, or several and none is chosen.
    """
    if chosen is None and len(trained.clients) > 1:
        raise UserError(f"--client: expected {client_choices(trained.clients)}, got none")
    [client] = select_clients(trained.clients, chosen)
    return client


def client_choices(clients: Sequence[Client]) -> str:
    """Return the numbers of the clients, and the names of sites, in one line."""
    names = [client.splits.name for client in clients if client.splits.name is not None]
    numbers = f"{clients[0].number}..{clients[-1].number}" if len(clients) > 1 else str(clients[0].number)
    return numbers + (f" or one of {listed(names)}" if names else "")


def require_trained_bits(trained: Samples, has_8_bits: bool) -> None:
    """Check that new images have 8 bits if the model was trained on such.

    The range of wider values is unknown, and an exported model takes 8 bits only.

    Raises:
        UserError: If they have more.
    """
    if trained.inputs.dtype == torch.uint8 and not has_8_bits:
        raise UserError(
            "expected images with 8 bits, as in training, got 16-bit or floating-point values. Convert them"
        )
