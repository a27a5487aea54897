"""One site: its data, its client state on disk, and its replies to the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from fedekd.atomic import remove_drafts
from fedekd.configuration.options import parts_of
from fedekd.data import ClientSplits, FederatedDataModule, Samples, data_warnings
from fedekd.errors import UserError, nearest
from fedekd.federation import RoundRequest, SilentObserver
from fedekd.federation.checks import check_models
from fedekd.federation.engines.worker import ClientWorker, DamagedStateError, WorkerSetup
from fedekd.federation.local_baseline import DRAFT_SECONDS
from fedekd.federation.run_folder import to_json_value
from fedekd.flower.description import describe, shared_config
from fedekd.flower.messages import (
    BASELINE,
    DESCRIBE,
    LAST_ROUND,
    ROUND,
    SCORE,
    arrays_of,
    by_key,
    client_result_to_json,
    comparison_request_from_json,
    from_arrays,
    pack,
    values_of,
)
from fedekd.methods import Broadcast, FederationSpec

#: Versions of the client state that a site keeps: the server may resume from a checkpoint older than its newest.
KEPT_VERSIONS = 4

#: In a simulation one process runs many sites with equal options; the parts are read-only.
_parts_of = lru_cache(maxsize=1)(parts_of)


class Site:
    """Client of one site, with its state in a folder.

    Args:
        options: The federation's configuration, as options of `fit`.
        number: The site's number, in [0, sites).
        sites: Number of sites.
        folder: Folder of the client states and the local baseline; a subfolder per site is created.
        data: The site's own images or table; None takes the site's part of the configured data set,
            as in a simulation.

    Raises:
        UserError: The configuration or the data are invalid.
    """

    def __init__(self, options: Sequence[str], number: int, sites: int, folder: Path, data: str | None = None) -> None:
        # The site's own file is one client: it is not partitioned again.
        data_options = [] if data is None else [f"--data.dataset={data}", "--data.num_clients=1"]
        parts = _parts_of((*options, *data_options, "--logger=null"))
        module: FederatedDataModule = parts["data"]
        samples, splits = self._samples(module, number, sites, data)
        method = parts["method"]
        spec = FederationSpec.from_parts(
            module,
            parts["client"],
            parts["trainer"],
            rounds=parts["rounds"].rounds,
            seed=parts["seed"],
            num_clients=sites,
            default_exits=method.exits,
            metrics=parts["metrics"],
        )
        check_models(spec, [splits])
        folder = folder / f"site-{number:03d}"
        # One folder of states per federation. The trainer is left out: device and threads may change between runs.
        model_spec = {name: value for name, value in spec.hash_dict().items() if name != "trainer"}
        identity = json.dumps([shared_config(method, spec), to_json_value(model_spec), splits.digest(samples)])
        states = folder / "states" / sha256(identity.encode()).hexdigest()[:16]
        states.mkdir(parents=True, exist_ok=True)
        remove_drafts(states, min_age=DRAFT_SECONDS)
        setup = WorkerSetup.build(method, samples, {number: splits}, spec, folder / "local", states)
        self.number, self.samples, self.splits = number, samples, splits
        self.method, self.spec = method, spec
        self.worker = ClientWorker(setup, np.ascontiguousarray(samples.inputs.numpy()))

    @staticmethod
    def _samples(
        module: FederatedDataModule, number: int, sites: int, data: str | None
    ) -> tuple[Samples, ClientSplits]:
        if data is not None:
            return module.as_one_client(number)
        if module.num_clients != sites:
            raise UserError(
                f"data.num_clients: expected {sites} (sites), got {module.num_clients}."
                " Set both to the same number, or data in --node-config to the site's own file."
            )
        return module.samples, module.clients[number]

    def reply(self, message: Message) -> RecordDict:
        """Return the content of the reply to a message of the server.

        Raises:
            UserError: The message type is unknown, or the requested version of the state is damaged or not on disk.
        """
        handlers = {
            DESCRIBE: self._describe,
            BASELINE: self._baseline,
            SCORE: self._score,
            ROUND: self._round,
            LAST_ROUND: self._round,
        }
        message_type = message.metadata.message_type
        if message_type not in handlers:
            raise UserError(
                f"site {self.number}: unknown message type {message_type!r}. {nearest(message_type, handlers)}"
            )
        try:
            return handlers[message_type](message)
        except DamagedStateError as error:
            raise UserError(
                f"site {self.number}: {error}. Restore the file, or remove the newest checkpoints/manifest-*.json of"
                " the server and start it again: it then repeats the last round."
            ) from error

    def _describe(self, message: Message) -> RecordDict:
        for line in data_warnings(self.samples, [self.splits]):
            SilentObserver().warn(f"site {self.number}: {line}")
        return pack(describe(self.method, self.spec, self.samples, self.splits))

    def _baseline(self, message: Message) -> RecordDict:
        baseline, _ = self.worker.local_baseline(self.number, int(values_of(message)["rounds"]))
        return pack({"metrics": by_key(baseline.metrics)})

    def _score(self, message: Message) -> RecordDict:
        version = int(values_of(message)["version"])
        self._require_version(version)
        metrics, _ = self.worker.evaluate(self.number, version)
        return pack({"metrics": metrics})

    def _round(self, message: Message) -> RecordDict:
        values, collect_updates = values_of(message), message.metadata.message_type == ROUND
        version = int(values["version"])
        self._require_version(version)
        received = from_arrays(arrays_of(message))
        comparison = comparison_request_from_json(values["comparison"])
        request = RoundRequest([self.number], Broadcast(received), int(values["round"]), collect_updates, comparison)
        result, _ = self.worker.run_client(self.number, version, request, {})
        store = self.worker.store
        for other in store.versions(self.number):
            if not version + 1 - KEPT_VERSIONS < other <= version + 1:
                store.drop(self.number, other)  # too old, or newer than the checkpoint that the server resumed from
        return pack(client_result_to_json(result), None if result.update is None else result.update.state)

    def _require_version(self, version: int) -> None:
        if version and not self.worker.store.has(self.number, version):
            raise UserError(
                f"site {self.number}: version {version} of the client state is not in {self.worker.store.folder}."
                f" Use the folder in which the run was started; only the last {KEPT_VERSIONS} versions are kept."
            )
