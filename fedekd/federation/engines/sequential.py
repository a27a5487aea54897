"""Engine that runs the clients one after another in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedekd.data import FederatedDataModule, close_inputs
from fedekd.do_no_harm.rule import FEDERATED, Comparison, DoNoHarm
from fedekd.do_no_harm.selection import select_model
from fedekd.early_exit.client_tradeoff import exit_tradeoff
from fedekd.errors import UserError
from fedekd.federation.checkpoint import Packed, pack, unpack
from fedekd.federation.compared_models import ComparedModels
from fedekd.federation.engines.base import (
    ClientResult,
    ComparisonRequest,
    Engine,
    EngineConfig,
    PartitionedData,
    RoundRequest,
)
from fedekd.federation.engines.packed_states import PackedStates, client_bytes
from fedekd.federation.local_baseline import (
    LocalBaseline,
    exact_local_model,
    restore_local_baseline,
    train_local_baseline,
)
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.references import Reference, ReferenceScores
from fedekd.federation.wire import from_wire, update_to_wire
from fedekd.methods import Client, FederationSpec, Method
from fedekd.methods.round_selection import select_round, used_splits
from fedekd.methods.serving import CANDIDATE, Candidate
from fedekd.models import MultiExitNetwork, network_flops
from fedekd.seeding import derive_seed


class Sequential(EngineConfig):
    """Clients run one after another in this process.

    Args:
        cache: Megabytes of client states that stay in memory between rounds, at least 0; null keeps all. The states of
            other clients are packed in a file in the folder for temporary files (TMPDIR), until the run ends.

    Raises:
        UserError: If it is out of range.
    """

    def __init__(self, cache: float | None = 750.0) -> None:
        if cache is not None and not 0 <= cache < math.inf:
            raise UserError(f"engine.cache: expected a finite number of at least 0, or null, got {cache}.")
        self.cache = cache

    def threads(self, cores: int, clients: int) -> int:
        """Return all cores."""
        return cores

    def __call__(
        self,
        method: Method,
        data: FederatedDataModule,
        spec: FederationSpec,
        baseline_dir: Path | None,
        observer: Observer,
    ) -> Engine:
        """See `EngineConfig`."""
        budget = None if self.cache is None else int(1e6 * self.cache)
        return SequentialEngine(method, data, spec, baseline_dir, observer, budget)


class SequentialEngine:
    """Runs the clients one after another in this process, on one copy of the data.

    Args:
        method: The method, of which the client's hooks are called.
        data: Data and partition.
        spec: Specification of networks and training.
        baseline_dir: Folder of the local baselines; None stores none.
        observer: Receives events and warnings.
        budget: Bytes of client states that stay in memory between rounds; None keeps all.
    """

    has_seeded_noise = True

    def __init__(
        self,
        method: Method,
        data: PartitionedData,
        spec: FederationSpec,
        baseline_dir: Path | None = None,
        observer: Observer | None = None,
        budget: int | None = None,
    ) -> None:
        self.method, self.spec, self.baseline_dir = method, spec, baseline_dir
        self.observer = observer or SilentObserver()
        device = spec.trainer.torch_device
        self.samples = replace(
            data.samples, inputs=data.samples.inputs.to(device), targets=data.samples.targets.to(device)
        )
        self.splits = data.clients
        self.clients: dict[int, Client] = {}  # those in memory
        self.budget = budget
        self._bytes: dict[int, int] = {}  # by client in memory: bytes of its state
        self._packed: PackedStates | None = None  # states of clients that have left the memory
        self.warned = set[str]()
        self.compared: dict[int, bytes] = {}  # local baselines without a key, for the comparisons

    def _new_client(self, number: int) -> Client:
        return Client(number, self.splits[number], self.samples, self.spec)

    def client(self, number: int) -> Client:
        """Return a client; it is built if it is not in memory."""
        if number not in self.clients:
            client = self._new_client(number)
            client.training_splits = used_splits(self.method, self.spec)
            self.method.init_client(client)
            if self._packed is not None and number in self._packed:
                client.load_state_dict(unpack(self._packed[number]))
            self.clients[number] = client
        return self.clients[number]

    def release(self, number: int) -> None:
        """Free the memory of a client whose state is stored elsewhere."""
        self.clients.pop(number, None)
        self._bytes.pop(number, None)

    def _keep_budget(self, number: int) -> None:
        """Pack the state of a changed client if those in memory exceed the budget.

        The others stay: where all clients take part, the least recently used one is the next to be visited.
        """
        if self.budget is None:
            return
        client = self.clients[number]
        self._bytes[number] = client_bytes(client)
        if sum(self._bytes.values()) > self.budget:
            if self._packed is None:
                self._packed = PackedStates()
            self._packed[number] = pack(client.state_dict())
            self.release(number)

    def client_steps(self, number: int) -> int:
        """Return the training steps of one phase of a client, for the progress display."""
        batches = -(-len(self.splits[number].train) // self.spec.batch_size)
        return batches * self.spec.client.local_epochs

    def local_baselines(self, rounds: Mapping[int, int]) -> dict[int, LocalBaseline]:
        """Train the local baselines, with one client's networks in memory at a time."""
        baselines = {}
        for number, wanted in rounds.items():
            self.observer.phase_started(number, "local")
            warnings: list[str] = []
            with self.spec.trainer.numerics():
                client = self._new_client(number)
                memory = None if self.baseline_dir is None else self.compared
                baseline = train_local_baseline(client, wanted, self.baseline_dir, warnings.append, memory)
            for text in warnings:
                self._warn_once(text)
            baselines[number] = replace(baseline, losses=[])  # per-sample losses stay on the client
            self.observer.phase_finished(number, "local", wanted * self.client_steps(number))
        return baselines

    def train_references(self, references: Mapping[int, Reference]) -> dict[int, ReferenceScores]:
        """See `Engine`."""
        results = {}
        for number, reference in references.items():
            self.observer.phase_started(number, reference.kind)
            with self.spec.trainer.numerics():
                results[number] = reference.train(self._new_client(number), self.method, self.baseline_dir)
            self.observer.phase_finished(number, reference.kind, reference.phases * self.client_steps(number))
        return results

    def _warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.observer.warn(text)

    def baseline_client(self, number: int, rounds: int) -> Client | None:
        """Return a client with its cached local model of `rounds` rounds, or None."""
        client = self._new_client(number)
        return client if restore_local_baseline(client, rounds, self.baseline_dir) else None

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        """Run the participants in the order of the request."""
        for number in request.participants:
            result = self._run_client(number, request)
            self._keep_budget(number)
            yield result

    def _run_client(self, number: int, request: RoundRequest) -> ClientResult:
        # The observer is called between the phases: `numerics` excludes other threads, for which it may wait.
        numerics, round_idx = self.spec.trainer.numerics, request.round_idx
        with numerics():
            client = self.client(number)
        self.observer.phase_started(number, "receive")
        with numerics():
            received = from_wire(request.broadcast.to(number), request.dtypes)
            logs = self.method.receive(client, received, round_idx)
            supervised_rounds = client.supervised_rounds
            if round_idx and self.spec.select_round == "best":
                logs = logs | select_round(client, round_idx, logs, deploy=not request.collect_updates)
            exit_scores, metrics = client.evaluate() if round_idx else ([math.nan], {})
        score = exit_scores[-1]
        if round_idx and isinstance(client.network(client.served_role), MultiExitNetwork):
            name = self.spec.primary.name
            logs = logs | {f"exit_{index}/{name}": value for index, value in enumerate(exit_scores, start=1)}
        if round_idx and all(map(math.isnan, metrics.values())):
            self.observer.warn(f"round {round_idx}: {client.splits.label} has no score; its outputs are not finite")
        self.observer.phase_finished(number, "receive", self.client_steps(number) if round_idx else 0)
        update, tradeoff, comparison = None, None, None
        deployed_metrics: dict[str, float] = {}
        if request.comparison is not None:
            with numerics():
                comparison, deployed_metrics = self._compare(
                    client, request.comparison, final=not request.collect_updates
                )
        if request.collect_updates:
            self.observer.phase_started(number, "update")
            with numerics():
                update = self.method.prepare_update(client, round_idx)
                if request.privacy is not None:
                    seed = derive_seed(self.spec.seed, number, round_idx, "privacy")
                    update = request.privacy.randomise(update, received, seed if request.has_seeded_noise else None)
                update = update_to_wire(update, request.dtypes)
            self.observer.phase_finished(number, "update", self.client_steps(number))
        else:
            with numerics():
                tradeoff = exit_tradeoff(client)
                logs = logs | (_serving_costs(client) if self.method.serves_more else {})
        return ClientResult(
            number, score, supervised_rounds, logs, update, tradeoff, comparison, metrics, deployed_metrics
        )

    def _compare(self, client: Client, request: ComparisonRequest, final: bool) -> tuple[Comparison, dict[str, float]]:
        """Compare the local model with the candidates; `final` deploys one of them.

        Returns:
            The comparison, and all metrics of a named candidate that is chosen on the test split.
        """
        rounds = request.local_rounds(client.number, client.supervised_rounds)
        local = self._new_client(client.number)
        baseline = train_local_baseline(local, rounds, self.baseline_dir, memory=self.compared)
        rule = request.rule
        local_model = cache(partial(exact_local_model, local, partial(self._new_client, client.number), rounds))
        models = ComparedModels(client, rule, baseline, rounds, local_model)
        candidates = _candidates(self.method, client, rule)
        evaluations = {name: partial(models.candidate, candidate) for name, candidate in candidates.items()}
        splits = request.splits
        comparison = select_model(rule, models.local, evaluations, self.spec.task, splits, models.labels(splits))
        chosen, metrics = candidates.get(comparison.deployed), {}
        if chosen is not None:
            with client.trial(chosen):
                metrics = client.evaluate(role=CANDIDATE)[1]
        if final and comparison.is_local:
            client.use_local_model(local_model())
        elif final and chosen is not None:
            client.use_candidate(chosen)
        elif final:
            client.use_local_model(None)
        return comparison, metrics

    def evaluate(self, number: int) -> dict[str, float]:
        """See `Engine`."""
        with self.spec.trainer.numerics():
            metrics = self.client(number).evaluate()[1]
        self._keep_budget(number)
        return metrics

    def evaluate_candidate(self, number: int) -> dict[str, float]:
        """Return all metrics of the candidate that a client deploys; empty without one."""
        with self.spec.trainer.numerics():
            client = self.client(number)
            metrics = {} if client.candidate is None else client.evaluate(role=CANDIDATE)[1]
        self._keep_budget(number)
        return metrics

    def client_state(self, number: int) -> Any:
        """See `Engine`."""
        if self._packed is not None and number in self._packed and number not in self.clients:
            return Packed(self._packed[number])
        return self.client(number).state_dict()

    def load_client_state(self, number: int, state: Any) -> None:
        """See `Engine`."""
        self.client(number).load_state_dict(unpack(state.content) if isinstance(state, Packed) else state)
        self._keep_budget(number)

    def close(self) -> None:
        """End the processes that read inputs, if any."""
        close_inputs(self.samples.inputs)


def _candidates(method: Method, client: Client, rule: DoNoHarm) -> dict[str, Candidate | None]:
    """Return the candidates in the order of the tests; None is what is served."""
    if not rule.candidates:
        return {FEDERATED: None}
    known = method.candidates()
    # An exit of the private model has the label prior with which this model is served.
    serves_one = client.serving is not None and client.serving.members == ("private",)
    exits = client.serving if serves_one else None
    return {name: Candidate(name, known[name](client) if name in known else exits) for name in rule.candidates}


def _serving_costs(client: Client) -> dict[str, float]:
    """Return the FLOPs per sample of the served network and of the private model."""
    shape, roles = client.spec.input_shape, {"flops": client.served_role, "private_flops": "private"}
    return {f"serving/{name}": float(network_flops(client.network(role), shape)) for name, role in roles.items()}
