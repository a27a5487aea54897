"""One site: its data, its client state on disk, and its replies to the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from flwr.app import Message, RecordDict

from fedekd.atomic import remove_drafts
from fedekd.configuration.site_parts import SiteParts
from fedekd.configuration.trained import save_site
from fedekd.data import data_warnings
from fedekd.errors import nearest
from fedekd.federation import RoundRequest, SilentObserver
from fedekd.federation.engines.worker import ClientWorker, DamagedStateError, WorkerSetup, resident_array
from fedekd.federation.local_baseline import DRAFT_SECONDS
from fedekd.federation.references import reference_from_json
from fedekd.federation.run_folder import to_json_value
from fedekd.flower.description import describe, shared_config, site_label
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
    dtypes_from_json,
    from_arrays,
    pack,
    values_of,
)
from fedekd.flower.site_errors import SiteError
from fedekd.methods import Broadcast

#: Versions of the client state that a site keeps: the server may resume from a checkpoint older than its newest.
KEPT_VERSIONS = 4


class Site:
    """Client of one site, with its state in a folder.

    Args:
        options: The federation's configuration, as options of `fit`.
        number: The site's number, in [0, sites).
        sites: Number of sites.
        folder: Folder of the client states and the local baseline; a subfolder per site is created.
        data: File or folder of the site's own samples, in any format of `data.sites`; None takes the site's part of
            the configured data set, as in a simulation.
        name: Name of the site; None for a number, or with `data` None for the name in the configured data set.

    Raises:
        UserError: The configuration or the data are invalid.
    """

    def __init__(
        self,
        options: Sequence[str],
        number: int,
        sites: int,
        folder: Path,
        data: str | None = None,
        name: str | None = None,
    ) -> None:
        parts = SiteParts.from_options(options, number, sites, data, name)
        method, spec, samples, splits = parts.method, parts.spec, parts.samples, parts.splits
        folder = folder / f"site-{number:03d}"
        # One folder of states per federation. The trainer is left out: device and threads may change between runs.
        model_spec = {name: value for name, value in spec.hash_dict().items() if name != "trainer"}
        identity = json.dumps(
            [shared_config(method, spec, parts.privacy), to_json_value(model_spec), splits.digest(samples)]
        )
        states = folder / "states" / sha256(identity.encode()).hexdigest()[:16]
        states.mkdir(parents=True, exist_ok=True)
        remove_drafts(states, min_age=DRAFT_SECONDS)
        setup = WorkerSetup.build(method, samples, {number: splits}, spec, folder / "local", states)
        self.parts, self.folder = parts, folder
        self.number, self.samples, self.splits = number, samples, splits
        self.method, self.spec, self.privacy = method, spec, parts.privacy
        self.worker = ClientWorker(setup, resident_array(samples.inputs))

    @property
    def label(self) -> str:
        """Site in messages: `site 2`, or `site 'basel'`."""
        return site_label(self.number, self.splits.name)

    def reply(self, message: Message) -> RecordDict:
        """Return the content of the reply to a message of the server.

        Raises:
            SiteError: The message type is unknown, or the requested version of the state is damaged or not on disk.
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
            raise SiteError(f"{self.label}: unknown message type {message_type!r}. {nearest(message_type, handlers)}")
        try:
            return handlers[message_type](message)
        except DamagedStateError as error:
            raise SiteError(
                f"{self.label}: {error}. Restore the file, or remove the newest checkpoints/manifest-*.json of"
                " the server and start it again: it then repeats the last round."
            ) from error

    def _describe(self, message: Message) -> RecordDict:
        for line in data_warnings(self.samples, [self.splits]):
            SilentObserver().warn(f"{self.label}: {line}")
        return pack(describe(self.method, self.spec, self.samples, self.splits, self.privacy))

    def _baseline(self, message: Message) -> RecordDict:
        if "reference" in values_of(message):
            reference = reference_from_json(values_of(message)["reference"])
            scores, _ = self.worker.reference(self.number, reference)
            return pack({"metrics": by_key(scores.metrics), "choice": scores.choice})
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
        dtypes = dtypes_from_json(values.get("dtypes", {}))
        # The site's own options decide: the server can neither switch the noise off nor know it.
        request = RoundRequest(
            [self.number],
            Broadcast(received),
            int(values["round"]),
            collect_updates,
            comparison,
            dtypes,
            self.privacy,
            has_seeded_noise=False,
        )
        result, _ = self.worker.run_client(self.number, version, request, {})
        if not collect_updates and request.round_idx == self.spec.rounds:
            with self.worker.loaded(self.number, version + 1):
                client = self.worker.engine.client(self.number)
                rounds = None
                if comparison is not None:
                    rounds = comparison.local_rounds(self.number, client.supervised_rounds)
                save_site(self.folder, self.parts, client, result, rounds)
        store = self.worker.store
        for other in store.versions(self.number):
            if not version + 1 - KEPT_VERSIONS < other <= version + 1:
                store.drop(self.number, other)  # too old, or newer than the checkpoint that the server resumed from
        return pack(client_result_to_json(result), None if result.update is None else result.update.state)

    def _require_version(self, version: int) -> None:
        if version and not self.worker.store.has(self.number, version):
            raise SiteError(
                f"{self.label}: version {version} of the client state is not in {self.worker.store.folder}."
                f" Use the folder in which the run was started; only the last {KEPT_VERSIONS} versions are kept."
            )
