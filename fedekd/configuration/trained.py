"""Finished training that can be used: of all clients of a run, or of one site."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

import fedekd
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.site_parts import SiteParts
from fedekd.data import FederatedDataModule
from fedekd.data.stored import StoredInputs
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_files import load_policy
from fedekd.errors import UserError, describe_error, listed, print_warning, shorten_path
from fedekd.federation import ClientResult, SequentialEngine
from fedekd.federation.checkpoint import Checkpoint, CheckpointStore
from fedekd.federation.local_baseline import read_local_baseline, restore_local_baseline, train_local_model
from fedekd.federation.results import ClientRecord
from fedekd.methods import Client, FederationSpec, Method
from fedekd.methods.serving import LOCAL

#: Folder of the finished training within the folder of a site.
_TRAINED = "trained"


@dataclass(frozen=True, eq=False)
class Trained:
    """Clients of a finished training; the networks are those after the last round.

    `client.deployed_model` is the network in use: the local model where do-no-harm chose it, or the ensemble of a
    method that serves one.

    Attributes:
        folder: Folder whose subfolder `exits` has the exit policies: that of the run, or of the site.
        argument: Argument of a command that opens the same training: `runs/NAME`, or `--site FOLDER`.
        clients: All clients of a run, or the one of a site.
        data: Data module, loaded. Its `read_options` decide how a new file is read.
        method: The method.
        spec: How networks are built.
        do_no_harm: Rule by which a client deploys the federated model; None deploys it always.
        records: By client number, the stored result of the last round: metrics of the served network on the test split,
            and the do-no-harm comparison.
        local_metrics: By client number, stored metrics of the local baseline after as many supervised rounds; empty
            where they are not known.
        local_rounds: By client number, the rounds of the local model that do-no-harm compares; empty without the rule.
        baseline_dir: Folder of the cached local baselines; None without one.
    """

    folder: Path
    argument: str
    clients: Sequence[Client]
    data: FederatedDataModule
    method: Method
    spec: FederationSpec
    do_no_harm: DoNoHarm | None
    records: Mapping[int, ClientRecord]
    local_metrics: Mapping[int, Mapping[str, float]]
    local_rounds: Mapping[int, int]
    baseline_dir: Path | None

    def policy(self, client: Client) -> ExitPolicy | None:
        """Load the exit policy of a client; None before `calibrate`.

        Raises:
            UserError: The file is not a valid policy.
        """
        return load_policy(self.folder, client.number)

    def local_model(self, client: Client) -> nn.Module:
        """Return the local model with which do-no-harm compares the federated one.

        If the cache of local baselines does not have it, it is trained again, and one line is printed. With the
        versions and on the device of the run, the result is the same. It is cached only in a folder that exists.
        """
        if client.deployed_role == LOCAL:
            return client.networks[LOCAL]
        folder = self.baseline_dir if self.baseline_dir is not None and self.baseline_dir.is_dir() else None
        rounds, parts = self.local_rounds[client.number], (client.number, client.splits, client.samples, client.spec)
        local = Client(*parts)
        if not restore_local_baseline(local, rounds, folder):
            print_warning(
                f"the local model of {client.splits.label} is trained again: {shorten_path(self.baseline_dir)}"
                " does not have it"
            )
            local = train_local_model(lambda: Client(*parts), rounds, folder)
        return local.networks["private"]


def require_one_source(command: str, run: str, site: str | None) -> None:
    """Check that a command has exactly one of RUN and --site.

    Raises:
        UserError: If it has none or both.
    """
    if bool(run) == bool(site):
        given = "both" if run else "none"
        raise UserError(
            f"{command}: expected RUN or --site FOLDER, got {given}. Example: {command} runs/NAME; at a site of a"
            f" Flower run: {command} --site FOLDER"
        )


def open_trained(command: str, run: str, site: str | None) -> Trained:
    """Load a run, or a site where one is given.

    Args:
        command: Name of the calling command, for error messages.
        run: Folder of a finished run; empty for a site.
        site: Folder of a site of a Flower run; None for a run.

    Raises:
        UserError: If the training is not finished or damaged, or its data cannot be loaded.
    """
    return open_site(command, Path(site)) if site else open_run(command, Path(run))


def open_run(command: str, folder: Path) -> Trained:
    """Load the clients of a finished run into this process.

    Args:
        command: Name of the calling command, for error messages.
        folder: Folder of the run.

    Raises:
        UserError: If the folder holds no run, the run is not finished or damaged, or its data cannot be loaded.
    """
    orchestrator, options, _ = open_finished(command, folder, in_process=True)
    clients = orchestrator.load_clients()
    progress, spec = orchestrator.progress, orchestrator.spec
    rule = orchestrator.do_no_harm
    request = None if rule is None else orchestrator.comparison_request(rule)
    return Trained(
        folder=folder,
        argument=shlex.quote(str(folder)),
        clients=clients,
        data=orchestrator.data,
        method=orchestrator.method,
        spec=spec,
        do_no_harm=rule,
        records=progress.records,
        local_metrics={number: progress.local_values(number) for number in progress.records},
        local_rounds={}
        if request is None
        else {client.number: request.local_rounds(client.number, client.supervised_rounds) for client in clients},
        baseline_dir=Path(options.baseline_dir),
    )


def open_site(command: str, folder: Path) -> Trained:
    """Load the client of a site from its folder; needs no Flower.

    Args:
        command: Name of the calling command, for error messages.
        folder: The `folder` of --node-config, or its subfolder `site-000`.

    Raises:
        UserError: If the folder has no finished training, the training is damaged, or the data of the site cannot be
            loaded or have changed.
    """
    folder = site_folder(command, folder)
    checkpoint = _load(command, folder)
    notes = checkpoint.notes
    number, label = notes["number"], f"{command}: --site: {shorten_path(folder)}"
    parts = SiteParts.from_config(notes["config"], number, notes["sites"], notes["data"], notes["name"])
    if parts.splits.digest(parts.samples) != notes["samples"]:
        is_stored = isinstance(parts.samples.inputs, StoredInputs)
        others = "others, or files with other modification times" if is_stored else "others"
        raise UserError(
            f"{label}: expected the samples of the training, got {others}. Restore {_source(parts)}, or train again"
        )
    engine = SequentialEngine(parts.method, parts, parts.spec, folder / "local")
    try:
        engine.load_client_state(number, checkpoint.clients[number])
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    except Exception as error:  # torch and methods raise various errors for a state of other networks
        raise UserError(
            f"{label}: expected the code and the version of fedekd ({notes['fedekd']}) of the training; its state does"
            f" not fit: {describe_error(error)}"
        ) from error
    return Trained(
        folder=folder,
        argument=f"--site {shlex.quote(str(folder))}",
        clients=[engine.client(number)],
        data=parts.data,
        method=parts.method,
        spec=parts.spec,
        do_no_harm=parts.do_no_harm,
        records={number: ClientRecord.from_json(notes["record"])},
        local_metrics={number: notes["local_metrics"]},
        local_rounds={} if parts.do_no_harm is None else {number: notes["local_rounds"]},
        baseline_dir=folder / "local",
    )


def save_site(folder: Path, parts: SiteParts, client: Client, result: ClientResult, local_rounds: int | None) -> None:
    """Write the finished training of a site; replaces an earlier one atomically.

    A process that is killed at any moment leaves the earlier training or this one.

    Args:
        folder: Folder of the site, such as `site-000`.
        parts: Its data, method and specification.
        client: The client after the last round.
        result: Its result of the last round.
        local_rounds: Rounds of the local model that do-no-harm compared; None without the rule.
    """
    record = ClientRecord(
        *(result.score, result.supervised_rounds, result.logs, result.tradeoff, result.comparison, result.metrics),
        parts.spec.rounds,
        result.deployed_metrics,
    )
    notes = {
        "fedekd": fedekd.__version__,
        "number": parts.number,
        "sites": parts.sites,
        "name": parts.splits.name,
        "data": parts.own_data,
        "samples": parts.splits.digest(parts.samples),
        "config": parts.config,
        "record": asdict(record),
        "local_metrics": _local_metrics(folder, parts, client, result),
        "local_rounds": local_rounds,
    }
    store = CheckpointStore(folder / _TRAINED)
    store.save(store.newest + 1, notes, None, [(client.number, client.state_dict())])


def _local_metrics(folder: Path, parts: SiteParts, client: Client, result: ClientResult) -> dict[str, float]:
    """Return metrics of the deployed local model or the cached baseline, if any."""
    if client.deployed_role == LOCAL:
        with client.spec.trainer.numerics():
            return client.evaluate(role=LOCAL)[1]
    if parts.method.is_local_baseline:
        return result.metrics
    untrained = Client(client.number, client.splits, client.samples, client.spec)
    return read_local_baseline(untrained, folder / "local").metrics_after(result.supervised_rounds)


def _source(parts: SiteParts) -> str:
    return shorten_path(parts.data.samples.name if parts.own_data is None else parts.config["data"]["dataset"])


def site_folder(command: str, folder: Path) -> Path:
    """Return the folder `site-000` of a site: the given one, or the only one in it.

    Raises:
        UserError: If there is none, or more than one.
    """
    if (folder / _TRAINED).is_dir() or (folder / "states").is_dir():
        return folder
    sites = sorted(path for path in folder.glob("site-*") if path.is_dir())
    if not sites:
        raise UserError(
            f"{command}: --site: expected the folder of a site of a Flower run, got {shorten_path(folder)}. It is"
            " `folder` in the --node-config of the site"
        )
    if len(sites) > 1:
        raise UserError(
            f"{command}: --site: expected the folder of one site, got {shorten_path(folder)} with"
            f" {listed([path.name for path in sites])}. Give one of them"
        )
    return sites[0]


def state_digest(folder: Path, number: int) -> str | None:
    """Return the SHA-256 of a client's stored state; None without a training.

    Args:
        folder: Folder of a run or of a site, as `Trained.folder`.
        number: Number of the client.
    """
    trained = folder / _TRAINED
    digests = CheckpointStore(trained if trained.is_dir() else folder / "checkpoints").digests()
    return digests.get(f"client-{number:03d}")


def _load(command: str, folder: Path) -> Checkpoint:
    """Load the newest training of a site.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    checkpoint, messages = CheckpointStore(folder / _TRAINED).load()
    if messages:  # an earlier training would be another model
        raise UserError(
            f"{command}: --site: {shorten_path(folder / _TRAINED)} is damaged: {messages[0]}. Restore the file, or"
            " repeat the last round: start the server again with an earlier checkpoint, or a new run"
        )
    if checkpoint is None:
        raise UserError(
            f"{command}: --site: expected a site of a finished run, got an unfinished one in {shorten_path(folder)}."
            " Resume the run: start the server and the sites again"
        )
    return checkpoint
