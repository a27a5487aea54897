"""Round loop of a federated run."""

from __future__ import annotations

import copy
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation.aggregate_validation import AggregateValidator, copy_state
from fedekd.federation.checks import (
    check_do_no_harm,
    check_models,
    check_privacy,
    check_required_splits,
    check_round_selection,
    check_schedule,
)
from fedekd.federation.engines.base import ComparisonRequest, Engine, EngineConfig, RoundRequest
from fedekd.federation.engines.sequential import Sequential, SequentialEngine
from fedekd.federation.interrupts import Interrupted, Interrupts, block_signals
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.options import BaselineOptions, RoundOptions, lost_updates, participants
from fedekd.federation.references import Reference, check_baselines, plan_references, tuned_rounds
from fedekd.federation.result_warnings import result_warnings
from fedekd.federation.results import Progress, ReportedMetrics
from fedekd.federation.run_folder import ARTIFACT_FILES, RUNTIME_OPTIONS, RunFolder, to_json_value
from fedekd.federation.summary import artifact_metadata, summarize
from fedekd.federation.update_validation import (
    Change,
    ResultValidator,
    UpdateValidator,
    is_value,
    out_of_proportion,
    structure_problem,
    with_plain_logs,
)
from fedekd.federation.wire import to_wire, updates_from_wire
from fedekd.global_state import exclusive
from fedekd.methods import Broadcast, Client, ClientOptions, ClientUpdate, FederationSpec, Method
from fedekd.methods.base import state_dict_bytes
from fedekd.methods.round_selection import used_splits
from fedekd.metrics import computed_metrics, metric_keys
from fedekd.modules import TrainerFactory
from fedekd.modules.trainer_factory import collect_trainers, usable_threads
from fedekd.privacy import GaussianMechanism
from fedekd.reporting import Tracker

EngineFactory = Callable[[Method, FederatedDataModule, FederationSpec, Path | None, Observer], Engine]


class Orchestrator:
    """Runs a federation.

    R rounds are R + 1 passes of the loop. Pass 0 only loads the initial message and prepares updates; pass R only
    receives::

        round   0            1                        ...  R-1                       R
        server  broadcast 0  aggregate, broadcast 1        aggregate, broadcast R-1  aggregate, broadcast R
        client  load         receive  score                receive  score            receive  score  -> final Delta
                update       update                        update                    (no update; do-no-harm decides)

    Every random draw is seeded from (seed, client, round, phase): the order of clients, the engine, and a stop and
    resume change no result.

    Args:
        method: Federated method.
        data: Data and partition; loaded on first use.
        client: Models and training of a client.
        trainer: Device, precision and threads.
        rounds: Number of rounds, participation, and acceptance of updates.
        seed: Seed of everything except the partition, whose seed is `data.seed`.
        output: Run folder; None writes nothing.
        baseline_dir: Folder of local baselines, shared by runs; None trains them for this run.
        loggers: Lightning loggers, called once per round.
        observer: Receives events and warnings.
        config: Configuration of the run; saved with the results and compared on resume.
        engine: Where clients run, such as `Sequential()` (the default), `MultiProcess(2)` or any engine factory.
        do_no_harm: Rule by which a client deploys the federated model; None deploys it always.
        metrics: Names of the reported metrics. The first is the score, by which Delta is computed. Default: those of
            the task.
        baseline: What the run is compared with besides the local baseline.
        privacy: Clips each update and adds noise, with an account of epsilon in the summary; None sends updates
            unchanged.

    Raises:
        UserError: If the parts do not fit together, the data cannot be loaded, or the device is missing.
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
        metrics: Sequence[str] | None = None,
        baseline: BaselineOptions | None = None,
        privacy: GaussianMechanism | None = None,
    ) -> None:
        self.baseline = baseline or BaselineOptions()
        self.method, self.options, self.seed = method, rounds or RoundOptions(), seed
        self.do_no_harm, self.privacy = do_no_harm, privacy
        self.observer = observer or SilentObserver()
        self.data, self.task = data, data.task
        self.num_clients = len(data.clients)
        per_round = len(self._participants(0))
        if self.options.quorum > per_round:
            raise UserError(
                f"quorum: expected at most {per_round} (clients per round), got {self.options.quorum}."
                " Lower --quorum or raise --participation."
            )
        engine = engine if engine is not None else Sequential()
        trainer = trainer or TrainerFactory()
        if trainer.threads == "auto" and isinstance(engine, EngineConfig):
            trainer = replace(trainer, threads=engine.threads(usable_threads(), self.num_clients))
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
            metrics=metrics,
            select_round=self.options.select_round,
        )
        self.metrics = ReportedMetrics(metrics, data.samples)
        check_models(self.spec, data.clients)
        check_baselines(self.baseline, method, self.spec)
        tuned = tuned_rounds(self.baseline, self.spec) * self.spec.client.local_epochs
        check_schedule(self.spec, data.clients, max(method.scheduled_epochs(self.spec), tuned))
        check_round_selection(self.spec, data.clients)
        check_required_splits(method, data.clients)
        if do_no_harm is not None:
            check_do_no_harm(do_no_harm, method, data, self.spec, self.observer.warn)
        self.engine = engine(
            method, data, self.spec, None if baseline_dir is None else Path(baseline_dir), self.observer
        )
        computed = computed_metrics(self.task, data.samples.num_classes)
        self.results = ResultValidator(
            metric_keys(computed, data.samples.num_classes), self.metrics.primary, data.clients
        )
        self.validator = UpdateValidator(self.options.max_update_norm)
        self.aggregates = AggregateValidator(self.spec, self.observer.warn)
        output = None if output is None else Path(output)
        self.folder = RunFolder(output, config or {}) if output is not None else None
        self.tracker = Tracker(loggers, output, self.observer.warn)
        self.names = [splits.name for splits in data.clients if splits.name is not None]
        self.progress = Progress(names=self.names)
        self.interrupts = Interrupts()
        self._unsaved: set[int] = set()  # clients whose state has changed since the last checkpoint
        self._logged = 0  # rows of the history that the loggers have
        self._saved_at = -math.inf  # time of the last checkpoint of this process

    def run(self) -> dict[str, Any]:
        """Run to the end, from the newest valid checkpoint if there is one.

        Returns:
            The summary, the content of `summary.json`.

        Raises:
            UserError: If the checkpoint is of another configuration or other data, or the folder is locked.
            Interrupted: On SIGINT or SIGTERM; the run resumes from the last saved round.
        """
        with self.interrupts, self.folder.lock() if self.folder is not None else nullcontext():
            try:
                self.method.init_server(self.spec)
                if self.privacy is not None:
                    check_privacy(self.privacy, self.method, self._participants(0))
                self._resume()
                self._start_logging()
                self._train_baselines()
                self._train_references()
                start = time.monotonic()
                for round_idx in range(self.progress.round, self.options.rounds + 1):
                    changed = self._run_round(round_idx)
                    self.progress.seconds += time.monotonic() - start
                    start = time.monotonic()
                    self._end_round(round_idx, changed)
                summary = summarize(self)
                for line in result_warnings(self):
                    self.observer.warn(line)
                self._finish(summary)
            except BaseException as error:
                self.tracker.close("interrupted" if isinstance(error, Interrupted) else "failed")
                raise
            finally:
                self.engine.close()
        return summary

    def load_clients(self) -> list[Client]:
        """Load the clients of a finished run into this process.

        Raises:
            UserError: If the last checkpoint is missing or corrupt, or the engine is not sequential.
        """
        engine = self._sequential_engine()
        self.method.init_server(self.spec)
        self._restore_finished()
        return [engine.client(number) for number in range(self.num_clients)]

    def baseline_clients(self) -> list[Client | None]:
        """Load the local baselines of each client's rounds; None where none is cached.

        Raises:
            UserError: If the engine is not sequential.
        """
        engine = self._sequential_engine()
        rounds = self._baseline_rounds()
        numbers = range(self.num_clients)
        return [engine.baseline_client(number, rounds.get(number, self.options.rounds)) for number in numbers]

    def comparison_request(self, rule: DoNoHarm) -> ComparisonRequest:
        """Return the request to compare local and federated models by a rule."""
        splits = rule.compared_splits(self.spec.task, used_splits(self.method, self.spec))
        return ComparisonRequest(rule, self._baseline_rounds(), splits)

    def evaluate_checkpoint(self) -> dict[str, Any]:
        """Score the clients of a finished run from its checkpoint, and write nothing.

        Returns:
            The summary of these scores.

        Raises:
            UserError: If the last checkpoint is missing or corrupt.
        """
        try:
            self.method.init_server(self.spec)
            self._restore_finished()
            self._train_baselines()
            self._train_references()
            for number in range(self.num_clients):
                metrics = self._require_metrics(number, self.engine.evaluate(number))
                record = self.progress.records[number]
                record.score = metrics[self.metrics.primary.name]
                record.metrics = metrics if record.metrics else {}
                if isinstance(self.engine, SequentialEngine):  # other engines keep the stored values
                    record.deployed_metrics = self.engine.evaluate_candidate(number)
            return summarize(self)
        finally:
            self.engine.close()

    def _run_round(self, round_idx: int) -> list[int]:
        """Broadcast aggregate `round_idx`, run the participants, aggregate updates.

        Returns:
            The clients whose state changed: the participants that answered.

        Raises:
            UserError: If several results are all invalid, as by a mistake in the method, or one is in the last round.
        """
        is_last = round_idx == self.options.rounds
        self.observer.round_started(round_idx)
        numbers = self._participants(round_idx)
        broadcast, dtypes = to_wire(self.method.broadcast(numbers, round_idx), self.options.wire_dtype)
        comparison = None
        if self.do_no_harm is not None and self.do_no_harm.compares_at(round_idx, self.options.rounds):
            comparison = self.comparison_request(self.do_no_harm)
        request = RoundRequest(numbers, broadcast, round_idx, not is_last, comparison, dtypes, self.privacy)
        updates: list[ClientUpdate] = []
        changed: list[int] = []
        rejected: list[str] = []
        answers = 0
        for result in map(with_plain_logs, self.engine.run_clients(request)):
            answers += 1
            if reason := self.results.check(result, request, changed):
                self._reject(reason, round_idx)
                rejected.append(reason)
                # Its state has changed as well: a resumed run must continue from there.
                if isinstance(result.client, int) and result.client in numbers and result.client not in changed:
                    changed.append(result.client)
                continue
            changed.append(result.client)
            self.progress.add_bytes_down(state_dict_bytes(broadcast.to(result.client)))
            if round_idx > 0:
                self.progress.add_result(result, round_idx)
            if result.update is not None:
                updates.append(result.update)
        if len(rejected) == answers > 1:  # a single site must not end the run
            raise UserError(f"round {round_idx}: rejected all results; {rejected[-1]}. Correct what the method returns")
        if round_idx > 0 and self.progress.records:  # empty until a client has answered
            self.progress.add_row(round_idx, self.metrics)
        if not is_last:
            self._aggregate(updates, request)
        self.progress.round = round_idx + 1
        collect_trainers()
        return changed

    def _reject(self, reason: str, round_idx: int) -> None:
        """Leave a client with an invalid result out of the round, as an absent one.

        Raises:
            UserError: In the last round, which needs all clients.
        """
        text = f"round {round_idx}: rejected a result: {reason}"
        if round_idx == self.options.rounds:
            raise UserError(f"{text}. The last round needs every client: repair that client and repeat the command.")
        self.observer.warn(f"{text}; left out of this round")

    def _aggregate(self, updates: Sequence[ClientUpdate], request: RoundRequest) -> None:
        """Aggregate the updates that arrived and are valid, ordered by client."""
        round_idx = request.round_idx
        accepted = updates_from_wire(self._valid_updates(updates, request.broadcast, round_idx), request.dtypes)
        self.progress.traffic.updates = len(accepted)
        if len(accepted) < self.options.quorum:
            reason: str | None = f"{len(accepted)} updates are below the quorum of {self.options.quorum}"
        else:
            reason = self._replace_server_state(accepted, round_idx)
        if reason is not None:
            self.observer.warn(f"round {round_idx + 1}: {reason}; the server keeps its state")

    def _valid_updates(
        self, updates: Sequence[ClientUpdate], broadcast: Broadcast, round_idx: int
    ) -> list[ClientUpdate]:
        """Return the updates that were not lost and are valid; warn of the others."""
        lost = lost_updates(self.options, self.num_clients, self.seed, round_idx)
        prefix = f"round {round_idx + 1}: update of"
        labels = [splits.label for splits in self.data.clients]
        candidates, changes = [], []
        for update in sorted(updates, key=lambda update: update.client):
            sent = broadcast.to(update.client)
            if update.client in lost and sent:
                self.observer.warn(f"{prefix} {labels[update.client]} was lost")
                continue
            if not (reason := structure_problem(update.state, sent)):
                self.progress.add_bytes_up(state_dict_bytes(update.state))
                reason = self.validator.check(update.state, sent) or self.results.check_samples(update)
            if reason:
                self.observer.warn(f"{prefix} {labels[update.client]} rejected: {reason}")
                continue
            candidates.append(update)
            changes.append(Change.of(update.state, sent, self._steps(update.client)))
        reasons = out_of_proportion(changes)
        for position, reason in reasons.items():
            self.observer.warn(f"{prefix} {labels[candidates[position].client]} rejected: {reason}")
        return [update for position, update in enumerate(candidates) if position not in reasons]

    def _replace_server_state(self, updates: Sequence[ClientUpdate], round_idx: int) -> str | None:
        """Aggregate updates; restore the server state if the result is not usable.

        Returns:
            The reason why the state is the previous one; None if the aggregate is valid.
        """
        before = copy_state(self.method.server_state)  # an aggregation may change tensors in place
        self.method.aggregate(updates, round_idx)
        reason = self._server_problem(round_idx + 1)
        if reason is not None:
            self.method.server_state = before
        return reason

    def _server_problem(self, round_idx: int) -> str | None:
        """Return why the server state cannot be sent in a round; None if it can."""
        numbers = self._participants(round_idx)
        method = copy.copy(self.method)
        method.server_state = copy_state(method.server_state)  # a broadcast may change it, and runs again in the round
        try:
            broadcast, _ = to_wire(method.broadcast(numbers, round_idx), self.options.wire_dtype)
        except UserError as error:  # beyond the range of float16
            return str(error)
        return self.aggregates.check(method.server_state, broadcast, numbers)

    def _steps(self, number: int) -> int:
        """Return the training steps of a client in an epoch."""
        return -(-len(self.data.clients[number].train) // self.data.batch_size)

    def _participants(self, round_idx: int) -> list[int]:
        return participants(self.options, self.num_clients, self.seed, round_idx)

    def _train_baselines(self) -> None:
        """Train the local baselines, unless the checkpoint has their scores."""
        if not self.progress.local:
            for number, baseline in sorted(self.engine.local_baselines(self._baseline_rounds()).items()):
                name = self.metrics.primary.name
                if baseline.metrics:
                    metrics = [self._require_metrics(number, values) for values in baseline.metrics]
                    self.progress.local_metrics[number] = metrics
                    self.progress.local[number] = [values[name] for values in metrics]
                else:  # an engine of a user may report scores only
                    self.progress.local[number] = baseline.scores
                    if invalid := [score for score in baseline.scores if not is_value(self.metrics.primary, score)]:
                        label = self.data.clients[number].label
                        raise UserError(f"{label}: score: expected a value of {name}, got {str(invalid[0])[:60]}")

    def _planned_references(self) -> dict[str, dict[int, Reference]]:
        planned = [self._participants(round_idx) for round_idx in range(self.options.rounds + 1)]
        return plan_references(self.baseline, self.method, self.spec, planned)

    def _train_references(self) -> None:
        """Train the further references, unless the checkpoint has their scores."""
        for kind, references in self._planned_references().items():
            if kind not in self.progress.references:
                scores = self.engine.train_references(references)
                for number, reference in scores.items():
                    for values in reference.metrics:
                        self._require_metrics(number, values)
                self.progress.references[kind] = dict(sorted(scores.items()))

    def _require_metrics(self, number: int, metrics: dict[str, float]) -> dict[str, float]:
        """Return metrics that a client reports outside of the rounds, if valid.

        Raises:
            UserError: If one is not in the range of its metric.
        """
        if problem := self.results.metrics_problem(metrics):
            raise UserError(f"{self.data.clients[number].label}: {problem}")
        return metrics

    def _baseline_rounds(self) -> dict[int, int]:
        """Return each client's most supervised rounds; empty for Local itself."""
        if self.method.is_local_baseline:
            return {}
        rounds = [self._participants(round_idx) for round_idx in range(self.options.rounds)]
        return {
            number: min(self.options.rounds, 1 + sum(number in numbers for numbers in rounds))
            for number in range(self.num_clients)
        }

    def _resume(self) -> None:
        """Resume from the newest valid checkpoint.

        A finished run whose final checkpoint is corrupt or missing is reopened.
        """
        messages = self._restore()
        action = f"continuing from round {self.progress.round}" if self.progress.round else "starting from round 0"
        for message in messages:
            self.observer.warn(f"{message}; {action}")
        if self.folder is not None and (messages or self.progress.round <= self.options.rounds):
            self.folder.reopen()

    def _restore(self) -> list[str]:
        """Load the newest valid checkpoint, and return messages on corrupt ones."""
        if self.folder is None:
            return []
        checkpoint, messages = self.folder.restore(self._identity())
        if checkpoint is None:
            return messages
        self.progress = Progress.from_json(checkpoint.notes["progress"])
        self.method.server_state = checkpoint.server
        for number, state in checkpoint.clients.items():
            self.engine.load_client_state(number, state)
        return messages

    def _restore_finished(self) -> None:
        messages = self._restore()
        if self.progress.round <= self.options.rounds:
            folder = shlex.quote(str(self.folder.folder)) if self.folder is not None else "RUN"
            repeat = f"repeats it: fit --resume {folder}"
            if messages:
                raise UserError(f"{folder}: {messages[0]}. This {repeat}")
            raise UserError(f"{folder}: no checkpoint of the last round. Without summary.json, this {repeat}")

    def _sequential_engine(self) -> SequentialEngine:
        if not isinstance(self.engine, SequentialEngine):
            raise UserError(f"engine: expected Sequential to load clients, got {type(self.engine).__name__}.")
        return self.engine

    def _end_round(self, round_idx: int, changed: Sequence[int]) -> None:
        """Save the round if it is due, and report it."""
        self._unsaved.update(changed)
        now = time.monotonic()
        is_last = round_idx == self.options.rounds
        if is_last or self.folder is None or self.options.is_save_due(now - self._saved_at):
            self._saved_at = now
            self._save()
        if round_idx > 0 and self.progress.history:
            self.observer.round_finished(self.progress.history[-1])

    def _save(self) -> None:
        """Save the rounds since the last save: the checkpoint, then the logs."""
        if self.folder is not None:
            with block_signals():
                states = ((number, self.engine.client_state(number)) for number in sorted(self._unsaved))
                self.folder.save(self.progress, self.method.server_state, states, self._identity())
        self._unsaved.clear()
        for row in self.progress.history[self._logged :]:
            self.tracker.log_round(row)
        self._logged = len(self.progress.history)

    def _finish(self, summary: Mapping[str, Any]) -> None:
        """Write figures and summary.json, then log the summary and close the loggers.

        The rounds are logged before. An upload that stalls, or a kill while it does, leaves a finished run.
        """
        if self.folder is not None:
            with exclusive():  # matplotlib is not thread-safe
                self.folder.write_figures(summary, self.progress.history, self.data)
            self.folder.finalize(summary, self.progress.history)
            metadata = partial(artifact_metadata, self, summary)
            self.tracker.log_artifacts(self.folder.folder, ARTIFACT_FILES, metadata)
        self.tracker.log_summary(summary)
        self.tracker.close()
        self.observer.finished()

    def _start_logging(self) -> None:
        """Log the configuration and earlier rounds, and report the training steps."""
        if self.adds_exits:
            self.observer.warn(
                f"method {type(self.method).__name__} needs exits: client.private_model is split into"
                f" {self.method.exits} stages with one exit each (set by --client.exits)"
            )
        for line in self.data.warnings():
            self.observer.warn(line)
        if self.folder is not None:
            # Without the options of loggers: the credentials of one are not for the others.
            self.tracker.log_config({name: value for name, value in self.folder.config.items() if name != "logger"})
        self.tracker.replay(self.progress.history)
        self._logged = len(self.progress.history)
        for url in self.tracker.urls():
            self.observer.logged_at(url)
        steps = [self._steps(number) for number in range(self.num_clients)]
        epochs = self.spec.client.local_epochs
        local = epochs * sum(steps[number] * rounds for number, rounds in self._baseline_rounds().items())
        total, done = local, local if self.progress.local else 0
        for kind, references in self._planned_references().items():
            cost = epochs * sum(steps[number] * reference.phases for number, reference in references.items())
            total += cost
            done += cost if kind in self.progress.references else 0
        for round_idx in range(self.options.rounds + 1):
            phases = (round_idx > 0) + (round_idx < self.options.rounds)
            cost = phases * epochs * sum(steps[number] for number in self._participants(round_idx))
            total += cost
            done += cost if round_idx < self.progress.round else 0
        self.observer.started(self.options.rounds, total, done)

    @cached_property
    def data_digests(self) -> list[str]:
        """SHA-256 (hex) of the samples of each client."""
        return [splits.digest(self.data.samples) for splits in self.data.clients]

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with, in addition to the configuration."""
        settings = {name: value for name, value in vars(self.method).items() if name != "server_state"}
        rounds = {name: value for name, value in vars(self.options).items() if name not in RUNTIME_OPTIONS}
        return {
            "method": {type(self.method).__name__: to_json_value(settings)},
            "rounds": {
                "class": type(self.options).__name__,
                **to_json_value(rounds),
                "baseline": to_json_value(vars(self.baseline)),
            },
            **({} if self.do_no_harm is None else {"do_no_harm": to_json_value(self.do_no_harm)}),
            **({} if self.privacy is None else {"privacy": to_json_value(self.privacy)}),
            "spec": to_json_value(self.spec.hash_dict()),
            "metric": self.metrics.primary.name,
            "data": self.data_digests,
            **({"sites": self.names} if self.names else {}),
        }
