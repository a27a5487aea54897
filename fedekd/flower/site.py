"""One site: its data, its networks on its own disk, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from fedekd.configuration.options import parts_of
from fedekd.data import ClientSplits, FederatedDataModule, split_client
from fedekd.errors import UserError, nearest
from fedekd.federation.engines.base import RoundRequest
from fedekd.federation.engines.remote import without_images, without_server_state
from fedekd.federation.engines.worker import ClientWorker, WorkerSetup
from fedekd.federation.run_folder import to_json_value
from fedekd.federation.shared_specification import shared_specification
from fedekd.flower.description import describe, recipe
from fedekd.flower.messages import (
    ABSORB,
    HELLO,
    REFERENCE,
    SCORE,
    VISIT,
    from_arrays,
    look_from_json,
    note_of,
    packed,
    state_of,
    visit_to_json,
)
from fedekd.methods import Broadcast

#: Versions of its state that a site keeps: the server may go on from a checkpoint before its newest.
KEPT_VERSIONS = 4


#: In a simulation one process is one site after another, of the same options and data; nobody changes the parts.
_parts_of = lru_cache(maxsize=1)(parts_of)


class Site:
    """What runs at one hospital.

    Args:
        options: The federation's configuration, as options of `fit`.
        number: The site's number, from 0.
        sites: How many sites there are.
        folder: Where it keeps its networks and what Local came to; nobody else's.
        data: The site's own images, .npz in MedMNIST's layout; None takes its part of the configured data set, as in
            a simulation.

    Raises:
        UserError: If the configuration or the data are not valid.
    """

    def __init__(self, options: Sequence[str], number: int, sites: int, folder: Path, data: str | None = None) -> None:
        # Data that were dealt beforehand are not dealt again.
        own = [] if data is None else [f"--data.dataset={data}", "--data.num_clients=1"]
        parts = _parts_of((*options, *own, "--logger=null"))
        module: FederatedDataModule = parts["data"]
        splits = self._splits(module, number, sites, data)
        method, images = parts["method"], module.images
        spec = shared_specification(
            method, module, parts["client"], parts["trainer"], parts["rounds"], parts["seed"], sites
        )
        folder = folder / f"site-{number:03d}"
        # Another federation in the same folder has other states; the same one again makes the same.
        # On another device, or with other threads, they are the same federation's.
        network = {name: value for name, value in spec.hash_dict().items() if name != "trainer"}
        what = json.dumps([recipe(method, spec), to_json_value(network), splits.digest(images)])
        states = folder / "states" / sha256(what.encode()).hexdigest()[:16]
        states.mkdir(parents=True, exist_ok=True)
        share = WorkerSetup(
            without_server_state(method),
            without_images(images),
            {number: splits},
            spec,
            folder / "local",
            states,
        )
        self.number, self.images, self.splits = number, images, splits
        self.method, self.spec = method, spec
        self.host = ClientWorker(share, np.ascontiguousarray(images.pixels.numpy()))

    @staticmethod
    def _splits(module: FederatedDataModule, number: int, sites: int, data: str | None) -> ClientSplits:
        if data is not None:
            everything = np.arange(len(module.images), dtype=np.int64)
            return split_client(number, everything, module.fractions, module.seed)
        if module.num_clients != sites:
            raise UserError(f"data.num_clients is {module.num_clients}, and there are {sites} sites")
        return module.clients[number]

    def answer(self, message: Message) -> RecordDict:
        """What the site says to a message of the server.

        Raises:
            UserError: If the message asks for something unknown, or for a state that is not there.
        """
        answers = {
            HELLO: self._hello,
            REFERENCE: self._reference,
            SCORE: self._score,
            VISIT: self._visit,
            ABSORB: self._visit,
        }
        asked = message.metadata.message_type
        if asked not in answers:
            raise UserError(f"site {self.number} is asked {asked!r}, which it does not know; {nearest(asked, answers)}")
        return answers[asked](message)

    def _hello(self, message: Message) -> RecordDict:
        return packed(describe(self.method, self.spec, self.images, self.splits))

    def _reference(self, message: Message) -> RecordDict:
        reference, _ = self.host.local_baseline(self.number, int(note_of(message)["rounds"]))
        return packed({"scores": list(reference.scores)})

    def _score(self, message: Message) -> RecordDict:
        version = int(note_of(message)["version"])
        self._require_version(version)
        score, _ = self.host.score(self.number, version)
        return packed({"score": score})

    def _visit(self, message: Message) -> RecordDict:
        note, upload = note_of(message), message.metadata.message_type == VISIT
        version = int(note["version"])
        self._require_version(version)
        received = from_arrays(state_of(message))
        comparison = look_from_json(note["look"])
        request = RoundRequest([self.number], Broadcast(received), int(note["round"]), upload, comparison)
        visit, _ = self.host.run_client(self.number, version, request, {})
        store = self.host.store
        for other in store.versions(self.number):
            if not version + 1 - KEPT_VERSIONS < other <= version + 1:
                store.drop(self.number, other)  # too old, or of a time that the server has gone back from
        return packed(visit_to_json(visit), None if visit.update is None else visit.update.state)

    def _require_version(self, version: int) -> None:
        if version and not self.host.store.has(self.number, version):
            raise UserError(
                f"site {self.number} has no version {version} of its networks in {self.host.store.folder}; the run was"
                " begun in another folder, or long ago"
            )
