"""Validation of the server state that an aggregation gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.data import in_memory_format
from fedekd.functional import all_finite
from fedekd.global_state import isolated_rng
from fedekd.methods import Broadcast, ClientOptions, FederationSpec, StateDict
from fedekd.models import eval_mode
from fedekd.modules import predict
from fedekd.seeding import derive_seed

#: Uniform random images, in addition to a black one, on which an aggregate is evaluated.
_RANDOM_IMAGES = 4


def is_finite(state: Any) -> bool:
    """Return True if all tensors of a nested state are free of NaN and infinity."""
    if isinstance(state, Tensor):
        return all_finite([state])
    if isinstance(state, Mapping):
        return all(map(is_finite, state.values()))
    return not isinstance(state, list | tuple) or all(map(is_finite, state))


def copy_state(state: Any) -> Any:
    """Return a deep copy of a nested state, whose computed tensors have no graph."""
    return copy.deepcopy(state, {id(tensor): tensor.detach().clone() for tensor in _computed(state)})


def _computed(state: Any) -> Iterator[Tensor]:
    """Yield the tensors that have a graph, which `copy.deepcopy` refuses."""
    if isinstance(state, Tensor):
        if not state.is_leaf:
            yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _computed(value)


class AggregateValidator:
    """Rejects aggregates with non-finite values or non-finite outputs.

    A message is loaded into the network, proxy or private model, that has most of its tensors by name and shape; other
    tensors keep their initial weights. A message without such a network is not evaluated. Images for which the initial
    outputs are not finite are not used; if none is left, `warn` is called. Networks are evaluated on the CPU in
    float32, and so need no memory of the training device.

    Args:
        spec: Specification of the networks.
        warn: Receives warnings.
    """

    def __init__(self, spec: FederationSpec, warn: Callable[[str], None] = lambda text: None) -> None:
        # The optimizer is not used, and its option `capturable` would require CUDA.
        client = replace(spec.client, optimizer=ClientOptions().optimizer, scheduler=None)
        self.spec = replace(spec, client=client, trainer=replace(spec.trainer, accelerator="cpu", precision="32-true"))
        self.warn, self._has_warned = warn, False
        self._networks: dict[str, tuple[nn.Module, Tensor] | None] = {}

    def check(self, server_state: Any, broadcast: Broadcast, participants: Sequence[int]) -> str | None:
        """Check a server state and the messages that follow from it.

        Args:
            server_state: State of the method.
            broadcast: Message of the next round.
            participants: Clients of the next round.

        Returns:
            The reason to reject the state; None if it is valid.
        """
        if not is_finite(server_state):
            return "the aggregate has NaN or infinity"
        # Personal messages: one client per architecture, so that the time does not grow with the number of clients.
        clients = {self.spec.architecture_key(number): number for number in reversed(participants)}
        for number in sorted(clients.values()) if broadcast.personal else participants[:1]:
            if not self._gives_finite_outputs(broadcast.to(number), number):
                return "the aggregated network gives no finite outputs"
        return None

    def _gives_finite_outputs(self, message: StateDict, client: int) -> bool:
        probe = self._probe_of(message, client)
        if probe is None:
            return True
        network, images = probe
        known = network.state_dict()
        network.load_state_dict({**known, **{name: message[name] for name in _common(message, known)}})
        return bool(self._are_finite(network, images).all())

    def _probe_of(self, message: StateDict, client: int) -> tuple[nn.Module, Tensor] | None:
        """Return the network with most of a message's tensors and its images, or None."""
        key = self.spec.architecture_key(client)
        if key not in self._networks:
            networks = [self.spec.build_model(role, client) for role in ("proxy", "private")]
            counts = [len(_common(message, network.state_dict())) for network in networks]
            network = networks[counts.index(max(counts))]
            self._networks[key] = self._with_images(network) if any(counts) else None
        return self._networks[key]

    def _with_images(self, network: nn.Module) -> tuple[nn.Module, Tensor] | None:
        """Return a network with the images of finite initial outputs; None without any."""
        images = self._probes()
        images = images[self._are_finite(network, images)]
        if len(images) and bool(self._are_finite(network, images).all()):
            return network, images
        if not self._has_warned:  # one line for all architectures
            self._has_warned = True
            self.warn(
                f"{type(network).__name__}: expected finite outputs of the initial network for random images, got none."
                " Aggregates are accepted without a check of their outputs"
            )
        return None

    @torch.no_grad()
    def _are_finite(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return True for each image, shape (B,), for which a network has finite outputs.

        Raises:
            MemoryError: If memory is insufficient, which does not mean that the network is invalid; PyTorch may raise a
                RuntimeError instead.
        """
        try:
            # A user's network may draw random numbers in evaluation mode, too.
            with isolated_rng(derive_seed("probe")), eval_mode(network):
                exits = predict(network, images).exits
                return torch.stack([exit_.isfinite().reshape(len(images), -1).all(dim=1) for exit_ in exits]).all(dim=0)
        except Exception as error:  # of values that the network cannot compute with, such as an index out of range
            if _is_out_of_memory(error):
                raise
            return torch.zeros(len(images), dtype=torch.bool)

    def _probes(self) -> Tensor:
        """Return the images, in the format in which clients feed a network."""
        generator = torch.Generator().manual_seed(derive_seed("probe images"))
        shape = self.spec.input_shape
        images = torch.cat([torch.rand(_RANDOM_IMAGES, *shape, generator=generator), torch.zeros(1, *shape)])
        return in_memory_format(images, self.spec.trainer.memory_format)


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has an exception of its own for accelerators only.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _common(message: StateDict, state: StateDict) -> list[str]:
    """Return the names of a message's tensors that a network has in the same shape."""
    return [name for name, tensor in message.items() if name in state and state[name].shape == tensor.shape]
