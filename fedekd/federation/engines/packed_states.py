"""Serialized states of clients that do not fit into memory."""

from __future__ import annotations

import tempfile
from weakref import finalize

import torch

from fedekd.atomic import name_in_errors
from fedekd.methods import Client

#: Room that a state gets in the file, as a multiple of its size: it can grow in place.
_ROOM = 1.25


class PackedStates:
    """States by client number in one temporary file.

    The file has no name: it is removed with this object, and at the end of the process, also by a kill.

    A state replaces the one before in its place. A state that has outgrown its place gets a new one of 1.25 times its
    size at the end of the file, so that places which are no longer used stay a bounded part of the file.

    Example:
        >>> states = PackedStates()
        >>> states[3] = b"state"
        >>> 3 in states, states[3]
        (True, b'state')
    """

    def __init__(self) -> None:
        self._folder = tempfile.gettempdir()
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        finalize(self, self._file.close)
        self._places: dict[int, tuple[int, int, int]] = {}  # by client: start, size and room
        self._end = 0

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __setitem__(self, number: int, content: bytes) -> None:
        start, _, room = self._places.get(number, (0, 0, -1))
        if len(content) > room:
            start, room = self._end, int(_ROOM * len(content))
            self._end += room
        with name_in_errors(self._folder):
            self._file.seek(start)
            self._file.write(content)
            self._file.flush()
        self._places[number] = start, len(content), room

    def __getitem__(self, number: int) -> bytes:
        start, size, _ = self._places[number]
        self._file.seek(start)
        return self._file.read(size)


def client_bytes(client: Client) -> int:
    """Return the bytes of a client's tensors in memory.

    Its state can be smaller: that omits frozen pretrained tensors.
    """
    networks = [network.state_dict() for network in client.networks.values()]
    carried = [client.optimizer_states, client.scheduler_states, client.method_state, client.selected]
    return tensor_bytes([*networks, *carried])


def tensor_bytes(state: object) -> int:
    """Return the bytes of the tensors in a nested state of dicts and sequences.

    Example:
        >>> tensor_bytes({"step": 3, "moments": [torch.zeros(2), torch.zeros(3)]})
        20
    """
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0
