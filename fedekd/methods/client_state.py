"""State of a client as plain tensors, numbers and dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedekd.errors import require
from fedekd.methods.serving import LOCAL, Candidate, Serving
from fedekd.models.digest import tensors_fingerprint
from fedekd.models.freezing import frozen_names

if TYPE_CHECKING:
    from fedekd.methods.client import Client


def client_state(client: Client) -> dict[str, Any]:
    """Return the state of a client, see `Client.state_dict`."""
    return {
        **_network_states(client, client.networks),
        "optimizer_states": client.optimizer_states,
        "loss_scales": client.loss_scales,
        "method_state": client.method_state,
        "supervised_epochs": client.supervised_epochs,
        **({"scheduler_states": client.scheduler_states} if client.scheduler_states else {}),
        **({} if client.selected is None else {"selected": client.selected}),
        **({} if client.candidate is None else {"candidate": client.candidate.to_state()}),
        **_serving_state(client),
    }


def load_client_state(client: Client, state: Mapping[str, Any]) -> None:
    """Restore the state that `client_state` returned."""
    client.use_local_model(None)
    for role, network_state in state["networks"].items():
        if role == LOCAL:
            client.networks[role] = client.spec.build_model("private", client.number)
        _load_network(client, role, network_state, state)
    client.optimizer_states = state["optimizer_states"]
    client.scheduler_states = state.get("scheduler_states", {})
    client.loss_scales = state["loss_scales"]
    client.method_state = state["method_state"]
    client.supervised_epochs = state["supervised_epochs"]
    client.selected = state.get("selected")
    if "candidate" in state:
        client.candidate = Candidate.from_state(state["candidate"])
    _load_serving(client, state)


def served_state(client: Client) -> dict[str, Any]:
    """Return the state of what is served: its networks, and how they are combined."""
    roles = ("private",) if client.serving is None else client.serving.members
    return {**_network_states(client, roles), **_serving_state(client)}


def load_served_state(client: Client, state: Mapping[str, Any]) -> None:
    """Serve what `served_state` returned."""
    for role, network_state in state["networks"].items():
        _load_network(client, role, network_state, state)
    _load_serving(client, state)


def _network_states(client: Client, roles: Iterable[str]) -> dict[str, Any]:
    """Return the states of networks without those of the frozen base.

    The tensors of `FederationSpec.frozen_base` are omitted, and `base_sha256` is their digest; without omitted tensors
    there is no digest. A network whose frozen tensors differ from the base is stored in full.
    """
    networks = {role: client.networks[role].state_dict() for role in roles}
    base = client.spec.frozen_base(client.number)
    if base is None:
        return {"networks": networks}
    omitted, has_omitted = set(base.names), False
    for role, state in networks.items():
        if omitted <= frozen_names(client.networks[role]) and base.sha256 == tensors_fingerprint(
            {name: state[name] for name in base.names}
        ):
            networks[role] = {name: tensor for name, tensor in state.items() if name not in omitted}
            has_omitted = True
    return {"networks": networks, **({"base_sha256": base.sha256} if has_omitted else {})}


def _load_network(client: Client, role: str, stored: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Load a network of `_network_states`.

    Args:
        client: The client.
        role: Role of the network, which has its initial weights or the same frozen tensors.
        stored: Its stored tensors.
        state: Result of `_network_states` with `stored`.

    Raises:
        UserError: If the network has other frozen tensors than those that were omitted.
    """
    network = client.networks[role]
    if "base_sha256" in state:
        own, base = network.state_dict(), client.spec.frozen_base(client.number)
        names = () if base is None or set(base.names) & stored.keys() else base.names
        omitted = {name: own[name] for name in names if name in own}
        actual = tensors_fingerprint(omitted)
        require(
            not omitted or actual == state["base_sha256"],
            "client.private_model" if client.spec.client.private_weights is None else "client.private_weights",
            f"the pretrained weights of the training, SHA-256 {state['base_sha256'][:12]}",
            actual[:12],
            "Restore their file, and the versions of torchvision or timm that trained",
        )
        stored = {**stored, **omitted}
    network.load_state_dict(stored)


def _serving_state(client: Client) -> dict[str, Any]:
    """Return `serving` as plain values; empty for the private model."""
    return {} if client.serving is None else {"serving": client.serving.to_state()}


def _load_serving(client: Client, state: Mapping[str, Any]) -> None:
    client.serving = Serving.from_state(state["serving"]) if "serving" in state else None
