"""The round loop of a federation, and nothing that a method, an engine or a file format could know better."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation.engines.base import ComparisonRequest, Engine, EngineConfig, RoundRequest
from fedekd.federation.engines.sequential import Sequential, SequentialEngine
from fedekd.federation.interrupts import Interrupted, Interrupts
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.options import RoundOptions
from fedekd.federation.participation import lost_updates, participants
from fedekd.federation.progress import Progress
from fedekd.federation.run_folder import RunFolder, to_json_value
from fedekd.federation.summary import summarize
from fedekd.federation.update_validation import UpdateValidator
from fedekd.methods import Broadcast, Client, ClientOptions, ClientUpdate, FederationSpec, Method
from fedekd.methods.base import state_dict_bytes
from fedekd.methods.client import has_batch_norm
from fedekd.models import check_model
from fedekd.modules import TrainerFactory
from fedekd.modules.trainer_factory import usable_cores
from fedekd.reporting import Tracker

EngineFactory = Callable[[Method, FederatedDataModule, FederationSpec, Path | None, Observer], Engine]


class Orchestrator:
    """Runs a federation: `Orchestrator(FedeKD(), FederatedDataModule("digits")).run()`.

    Every random choice is drawn from (seed, client, round, phase): the order in which clients run, the engine, and
    a stop and resume change no number.

    Args:
        method: What is federated.
        data: Whose data.
        client: What a client trains.
        trainer: On which device, in what precision, on how many threads.
        rounds: How many rounds, and who takes part.
        seed: Seeds everything but the partition, which `data.seed` seeds.
        output: The run's folder; None writes nothing at all.
        baseline_dir: Where Local's references are kept for all runs; None trains them anew.
        loggers: Lightning loggers; each gets one call a round.
        observer: Is told what happens.
        config: What the run was configured with; kept beside the results and compared on resume.
        do_no_harm: When a client takes the federated model; None has it take it always.
        engine: Where clients run: `Sequential()`, which is the default, `MultiProcess(2)`, or whatever makes an engine.

    Raises:
        UserError: If the parts do not fit together, or the device is not there.
    """

    def __init__(
        self,
        method: Method,
        data: FederatedDataModule,
        client: ClientOptions | None = None,
        trainer: TrainerFactory | None = None,
        rounds: RoundOptions | None = None,
        seed: int = 0,
        output: str | Path | None = None,
        baseline_dir: str | Path | None = None,
        loggers: Sequence[Logger] = (),
        observer: Observer | None = None,
        config: Mapping[str, Any] | None = None,
        engine: EngineConfig | EngineFactory | None = None,
        do_no_harm: DoNoHarm | None = None,
    ) -> None:
        self.method, self.options, self.seed = method, rounds or RoundOptions(), seed
        self.do_no_harm = do_no_harm
        self.observer = observer or SilentObserver()
        data.prepare_data()
        data.setup()
        self.data, self.task = data, data.task
        self.num_clients = len(data.clients)
        in_a_round = len(participants(self.options, self.num_clients, seed, 0))
        if self.options.quorum > in_a_round:
            raise UserError(f"quorum is {self.options.quorum}, but only {in_a_round} clients take part in a round")
        placement = engine if engine is not None else Sequential()
        trainer = trainer or TrainerFactory()
        if trainer.threads == "auto" and isinstance(placement, EngineConfig):
            trainer = replace(trainer, threads=placement.threads(usable_cores(), self.num_clients))
        client = client or ClientOptions()
        self.adds_exits = method.exits is not None and client.exits is None
        self.spec = FederationSpec.from_parts(
            data,
            client,
            trainer,
            rounds=self.options.rounds,
            seed=seed,
            num_clients=self.num_clients,
            default_exits=method.exits,
        )
        self._require_models_that_fit()
        self._require_comparable()
        references = None if baseline_dir is None else Path(baseline_dir)
        self.engine = placement(method, data, self.spec, references, self.observer)
        self.guard = UpdateValidator(self.options.max_update_norm)
        output = None if output is None else Path(output)
        self.folder = RunFolder(output, config or {}) if output is not None else None
        self.tracker = Tracker(loggers, output)
        self.progress = Progress()
        self.interrupts = Interrupts()

    def _require_comparable(self) -> None:
        """There must be two models to compare, and samples for it that training has not seen."""
        if self.do_no_harm is None:
            return
        name, looks = type(self.method).__name__, self.do_no_harm.looks
        if self.method.is_local_baseline:
            raise UserError(f"do_no_harm compares a method with Local, and the method is {name}")
        if "validation" in self.method.training_splits:
            raise UserError(
                f"do_no_harm compares models on a part of the validation split, from which method {name} learns"
            )
        if self.task == "classification" and self.do_no_harm.margin >= 1:
            raise UserError(f"do_no_harm.margin is {self.do_no_harm.margin}, and accuracies differ by less than 1")
        if looks > self.options.rounds:
            raise UserError(f"do_no_harm.looks is {looks}, and there are {self.options.rounds} rounds")
        for splits in self.data.clients:
            if not len(getattr(splits, self.do_no_harm.split)):
                raise UserError(
                    f"do_no_harm compares on the {self.do_no_harm.split} split, and client {splits.client} has no"
                    " sample in it; raise data.min_samples or the second of data.fractions"
                )

    def _require_models_that_fit(self) -> None:
        """Try each model on two images, and say now, not in the middle of a round, what it cannot do."""
        smallest = min(self.data.clients, key=lambda splits: len(splits.train))
        single = self.data.batch_size == 1 or len(smallest.train) == 1
        # One client of each kind is enough.
        owners = {self.spec.architecture_key(number): number for number in reversed(range(self.num_clients))}.values()
        for role, owner in [*(("private", owner) for owner in owners), ("proxy", 0)]:
            network = self.spec.build_model(role, owner)
            check_model(
                network.float().cpu(),
                in_channels=self.spec.in_channels,
                image_size=self.spec.image_size,
                num_outputs=self.spec.num_outputs,
                flag=f"client.{role}_model",
            )
            # BatchNorm cannot train on one sample.
            if single and has_batch_norm(network):
                raise UserError(
                    f"client.{role}_model has BatchNorm, which cannot train on batches of one sample:"
                    f" data.batch_size is {self.data.batch_size}, and client {smallest.client} has"
                    f" {len(smallest.train)} training samples; raise data.batch_size or data.min_samples"
                )

    def run(self) -> dict[str, Any]:
        """Run, or go on from the newest whole checkpoint, to the end.

        Returns:
            The summary, as `summary.json` holds it.

        Raises:
            UserError: If the checkpoint belongs to another configuration or other data, or another process is at work
                in the folder.
            Interrupted: On Ctrl-C; what was finished is kept.
        """
        with self.interrupts, self.folder.lock() if self.folder is not None else nullcontext():
            began = time.monotonic()
            try:
                self.method.init_server(self.spec)
                self._resume()
                self._start_logging()
                self._train_references()
                for round_idx in range(self.progress.round, self.options.rounds + 1):
                    changed = self._run_round(round_idx)
                    self.progress.seconds += time.monotonic() - began
                    began = time.monotonic()
                    self._checkpoint(round_idx, changed)
                summary = summarize(self)
                self._finish(summary)
            except BaseException as error:
                self.tracker.close("interrupted" if isinstance(error, Interrupted) else "failed")
                raise
            finally:
                self.engine.close()
        return summary

    def load_clients(self) -> list[Client]:
        """The clients of a finished run as they are after the last round, in this process.

        Raises:
            UserError: If there is no whole checkpoint of a finished run, or clients do not run in this process.
        """
        if not isinstance(self.engine, SequentialEngine):
            raise UserError(f"clients are given by the engine Sequential, and this is {type(self.engine).__name__}")
        self.method.init_server(self.spec)
        self._restore_finished()
        return [self.engine.client(number) for number in range(self.num_clients)]

    def baseline_clients(self) -> list[Client | None]:
        """The clients as Local left them after this run's rounds; None for those that are not kept.

        Raises:
            UserError: If clients do not run in this process.
        """
        if not isinstance(self.engine, SequentialEngine):
            raise UserError(f"clients are given by the engine Sequential, and this is {type(self.engine).__name__}")
        return [self.engine.baseline_client(number, self.options.rounds) for number in range(self.num_clients)]

    def _restore_finished(self) -> None:
        complaints = self._restore()
        if self.progress.round <= self.options.rounds:
            folder = shlex.quote(str(self.folder.folder)) if self.folder is not None else "RUN"
            again = f"fit --resume {folder} makes it again"
            if complaints:
                raise UserError(f"{folder}: {complaints[0]}; {again}")
            raise UserError(f"{folder}: there is no checkpoint of the last round; without summary.json, {again}")

    def evaluate_checkpoint(self) -> dict[str, Any]:
        """Score the clients of a finished run again, from its checkpoint.

        Returns:
            The summary that the scores give; nothing is written.

        Raises:
            UserError: If there is no whole checkpoint of a finished run.
        """
        try:
            self.method.init_server(self.spec)
            self._restore_finished()
            self._train_references()
            for number in range(self.num_clients):
                self.progress.records[number].score = self.engine.score(number)
            return summarize(self)
        finally:
            self.engine.close()

    def _run_round(self, round_idx: int) -> list[int]:
        """Broadcast aggregate `round_idx`; let participants absorb, be scored and upload; aggregate what is accepted.

        Returns:
            The clients that have changed: the participants, but for those that did not answer.
        """
        last = round_idx == self.options.rounds
        self.observer.round_started(round_idx)
        taking_part = participants(self.options, self.num_clients, self.seed, round_idx)
        broadcast = self.method.broadcast(taking_part, round_idx)
        updates, visited = [], []
        comparison = None
        if self.do_no_harm is not None and self.do_no_harm.compares_at(round_idx, self.options.rounds):
            comparison = ComparisonRequest(self.do_no_harm, self._reference_rounds())
        request = RoundRequest(taking_part, broadcast, round_idx, collect_updates=not last, comparison=comparison)
        for result in self.engine.run_clients(request):
            visited.append(result.client)
            self.progress.add_bytes_down(state_dict_bytes(broadcast.to(result.client)))
            if round_idx > 0:
                self.progress.add_result(result)
            if result.update is not None:
                updates.append(result.update)
        if round_idx > 0 and self.progress.records:  # nobody may have answered yet
            self.progress.row(round_idx, self.task)
        if not last:
            self._aggregate(updates, broadcast, round_idx)
        self.progress.round = round_idx + 1
        gc.collect()  # Trainers hold on to each other, and to what they trained
        return visited

    def _aggregate(self, updates: Sequence[ClientUpdate], broadcast: Broadcast, round_idx: int) -> None:
        """Hand the method the updates that arrived and are sound, in the order of their clients."""
        lost = lost_updates(self.options, self.num_clients, self.seed, round_idx)
        accepted = []
        for update in sorted(updates, key=lambda update: update.client):
            if update.client in lost and update.state:
                self.observer.warn(f"round {round_idx + 1}: the update of client {update.client} was lost")
                continue
            self.progress.add_bytes_up(state_dict_bytes(update.state))
            if reason := self.guard.objection(update.state, broadcast.to(update.client)):
                self.observer.warn(f"round {round_idx + 1}: refused the update of client {update.client}: {reason}")
                continue
            accepted.append(update)
        self.progress.traffic.updates = len(accepted)
        if len(accepted) >= self.options.quorum:
            self.method.aggregate(accepted, round_idx)
        else:
            self.observer.warn(
                f"round {round_idx + 1}: {len(accepted)} updates are fewer than the quorum of {self.options.quorum};"
                " the server keeps its state"
            )

    def _train_references(self) -> None:
        """Local, before round 0: for each client as many rounds as it will be trained for at most."""
        if not self.progress.local:
            references = self.engine.local_baselines(self._reference_rounds())
            self.progress.local = {number: reference.scores for number, reference in sorted(references.items())}

    def _reference_rounds(self) -> dict[int, int]:
        """How many rounds of Local each client is measured against at most."""
        if self.method.is_local_baseline:
            return {}
        visits = [participants(self.options, self.num_clients, self.seed, r) for r in range(self.options.rounds)]
        return {
            number: min(self.options.rounds, 1 + sum(number in taking_part for taking_part in visits))
            for number in range(self.num_clients)
        }

    def _resume(self) -> None:
        """Take up what there is of the run; one that was finished is finished no more where its end is damaged."""
        complaints = self._restore()
        where = f"going on from round {self.progress.round}" if self.progress.round else "starting anew"
        for complaint in complaints:
            self.observer.warn(f"{complaint}; {where}")
        if complaints and self.folder is not None:
            self.folder.reopen()

    def _restore(self) -> list[str]:
        """Take up the newest whole checkpoint, if there is one; gives what is wrong with those that are newer."""
        if self.folder is None:
            return []
        checkpoint, complaints = self.folder.restore(self._identity())
        if checkpoint is None:
            return complaints
        self.progress = Progress.from_json(checkpoint.notes["progress"])
        self.method.server_state = checkpoint.server
        for number, state in checkpoint.clients.items():
            self.engine.load_client_state(number, state)
        self._require_compared()
        return complaints

    def _require_compared(self) -> None:
        """A run that finished without do_no_harm has compared nothing, and cannot tell what is kept."""
        finished = self.progress.round > self.options.rounds
        if finished and self.do_no_harm is not None and not any(r.comparison for r in self.progress.records.values()):
            raise UserError("do_no_harm was not asked for when this run was made, and it is finished; run it anew")

    def _checkpoint(self, round_idx: int, changed: Sequence[int]) -> None:
        """Make the round count: checkpoint first, then everything that can be written again from it."""
        if self.folder is not None:
            with self.interrupts.shield():
                self.folder.keep(
                    self.progress,
                    self.method.server_state,
                    ((number, self.engine.client_state(number)) for number in changed),
                    self._identity(),
                )
        if round_idx > 0 and self.progress.history:
            self.tracker.log_round(self.progress.history[-1])
            self.observer.round_finished(self.progress.history[-1])

    def _finish(self, summary: Mapping[str, Any]) -> None:
        """Say what is left to say; the run counts as finished only when everybody has heard it."""
        if self.folder is not None:
            self.folder.draw(summary, self.progress.history, self.data)
            self.tracker.log_artifacts(self.folder.checkpoints.folder)
        self.tracker.log_summary(summary)
        self.tracker.close()
        if self.folder is not None:
            self.folder.conclude(summary, self.progress.history)
        self.observer.finished()

    def _start_logging(self) -> None:
        """Tell the display how much there is to do, and the loggers what they may have missed."""
        if self.adds_exits:
            self.observer.warn(
                f"method {type(self.method).__name__} needs exits: client.private_model is cut into"
                f" {self.method.exits} stages with an exit each (--client.exits says how many)"
            )
        if self.folder is not None:
            self.tracker.log_config(self.folder.config)
        self.tracker.replay(self.progress.history)
        steps = [-(-len(splits.train) // self.data.batch_size) for splits in self.data.clients]
        epochs = self.spec.client.local_epochs
        local = epochs * sum(steps[number] * rounds for number, rounds in self._reference_rounds().items())
        total, done = local, local if self.progress.local else 0
        for round_idx in range(self.options.rounds + 1):
            phases = (round_idx > 0) + (round_idx < self.options.rounds)
            taking_part = participants(self.options, self.num_clients, self.seed, round_idx)
            cost = phases * epochs * sum(steps[number] for number in taking_part)
            total += cost
            done += cost if round_idx < self.progress.round else 0
        self.observer.started(self.options.rounds, total, done)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with, beyond the configuration."""
        settings = {name: value for name, value in vars(self.method).items() if name != "server_state"}
        return {
            "method": {type(self.method).__name__: to_json_value(settings)},
            "rounds": to_json_value(self.options),
            **({} if self.do_no_harm is None else {"do_no_harm": to_json_value(self.do_no_harm)}),
            "spec": to_json_value(self.spec.hash_dict()),
            "data": [splits.digest(self.data.images) for splits in self.data.clients],
        }
