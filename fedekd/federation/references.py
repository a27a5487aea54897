"""References of a client besides its local baseline: control, tuned training.

Both references are trained on the client's own data, and nothing that another client sent is read.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fedekd.atomic import digest
from fedekd.errors import UserError, require
from fedekd.federation.baseline_key import baseline_key, is_own
from fedekd.federation.local_baseline import WriteInterval, read_cached, train_local_baseline, write_cached
from fedekd.federation.object_state import StateReader
from fedekd.federation.options import BaselineOptions
from fedekd.federation.source_code import SourceUnavailableError, code_of, modules_of, package_code
from fedekd.methods import Client, FederationSpec, Method
from fedekd.methods.round_selection import select_round, used_splits

#: Code that a control runs besides that of the local baseline.
_METHOD_CODE = ("federation/references.py", "methods", "models", "modules")


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of a reference of one client.

    Attributes:
        rounds: Round of the federation after which each entry of `metrics` counts, ascending.
        metrics: All metrics on the test split by key.
        choice: What was chosen on the tuning split, such as `lr`; empty without a choice.
    """

    rounds: tuple[int, ...]
    metrics: list[dict[str, float]]
    choice: dict[str, float] = field(default_factory=dict)

    def after(self, round_idx: int) -> dict[str, float]:
        """Return the metrics after a round of the federation, clipped to those trained."""
        position = sum(trained <= round_idx for trained in self.rounds)
        return self.metrics[max(position, 1) - 1] if self.metrics else {}


class Reference(Protocol):
    """How a reference of one client is trained."""

    kind: ClassVar[str]

    @property
    def scored_rounds(self) -> tuple[int, ...]:
        """Rounds of the federation after which it has scores, `ReferenceScores.rounds`."""
        ...

    @property
    def phases(self) -> int:
        """Training phases of `client.local_epochs` each, for the progress display."""
        ...

    def train(self, client: Client, method: Method, folder: Path | None) -> ReferenceScores:
        """Train and score the reference.

        Args:
            client: Client in its initial state, without what the method adds; it is changed.
            method: Method of the run; it is not changed.
            folder: Folder of the local baselines, in which finished rounds are cached; None caches nothing.
        """
        ...


@dataclass(frozen=True)
class Control:
    """Compute-matched local control: the method, run by a single client.

    Models, epochs, learning rate, serving and the selection of the round are those of the method; the server aggregates
    the updates of this client only. The surplus of the federation is the score of the method minus that of its control.
    No message leaves the process: messages are neither rounded (`wire_dtype`) nor lost, and get no noise (`privacy`).

    Args:
        rounds: Rounds in which the client takes part, ascending; the last is that of the run.
    """

    kind: ClassVar[str] = "control"

    rounds: tuple[int, ...]

    @property
    def scored_rounds(self) -> tuple[int, ...]:
        """All of them but round 0."""
        return tuple(number for number in self.rounds if number > 0)

    @property
    def phases(self) -> int:
        """One per reception after round 0, and one per update."""
        return len(self.scored_rounds) + len(self.rounds) - 1

    def train(self, client: Client, method: Method, folder: Path | None) -> ReferenceScores:
        """See `Reference`; cached every `WRITE_SECONDS` and at the end."""
        settings = {name: value for name, value in vars(method).items() if name != "server_state"}
        method = copy.copy(method)
        method.init_server(client.spec)
        path = None if folder is None else self._path(client, method, settings, folder)
        method.restrict_to_one_client()
        client.training_splits = used_splits(method, client.spec)
        method.init_client(client)
        cached = read_cached(path) or {"metrics": [], "done": 0}
        if "client" in cached:
            client.load_state_dict(cached["client"])
            method.server_state = cached["server"]
        metrics, interval = list(cached["metrics"]), WriteInterval()
        for done, round_idx in enumerate(self.rounds[cached["done"] :], start=cached["done"] + 1):
            broadcast = method.broadcast([client.number], round_idx)
            logs = method.receive(client, broadcast.to(client.number), round_idx)
            if round_idx > 0 and client.spec.select_round == "best":
                select_round(client, round_idx, logs, deploy=done == len(self.rounds))
            if round_idx > 0:
                metrics.append(client.evaluate()[1])
            if done < len(self.rounds):
                method.aggregate([method.prepare_update(client, round_idx)], round_idx)
            # A finished control is never continued: only its scores are kept.
            is_finished = done == len(self.rounds)
            if is_finished or interval.is_over():
                state = {} if is_finished else {"client": client.state_dict(), "server": method.server_state}
                write_cached(path, {"metrics": metrics, "done": done, **state})
        return ReferenceScores(self.scored_rounds, metrics)

    def _path(self, client: Client, method: Method, settings: Mapping[str, Any], folder: Path) -> Path | None:
        """Return the file of the control; None if its code cannot be compared."""
        spec = client.spec
        reader = StateReader(spec.build_model("proxy", "server"))
        try:
            values = {
                "baseline": baseline_key(client),
                "method": f"{type(method).__module__}.{type(method).__qualname__}",
                "settings": reader.read(settings),
                "server": reader.read(method.server_state),
                "proxy": spec.client.proxy_model,
                "attributes": reader.attributes(),
                "rounds": [spec.rounds, *self.rounds],
                "clients": spec.num_clients,
                **({} if spec.select_round == "last" else {"select_round": [spec.select_round, spec.metric]}),
                "code": package_code(_METHOD_CODE),
                "objects": code_of(name for name in modules_of([method]) | reader.modules if not is_own(name)),
            }
        except SourceUnavailableError:
            return None
        return folder / f"control-{digest(json.dumps(values, sort_keys=True, default=reader.read).encode())}.pt"


@dataclass(frozen=True)
class TunedLocal:
    """Local training with tuned learning rate and epochs.

    Both are chosen on the tuning split. Every learning rate is trained for `rounds` rounds of `client.local_epochs`,
    and each round is a candidate, as is local training with the run's own learning rate and epochs. The candidate with
    the smallest supervised loss (cross-entropy, or squared error) is scored on the test split. If losses are equal, or
    without tuning samples, the run's own learning rate and epochs are used.

    Args:
        learning_rates: Candidates, at least one, each above 0.
        rounds: Rounds of training, at least 1.
    """

    kind: ClassVar[str] = "tuned"

    learning_rates: tuple[float, ...]
    rounds: int

    @property
    def scored_rounds(self) -> tuple[int, ...]:
        """Round 0: it has one score, which counts in all rounds."""
        return (0,)

    @property
    def phases(self) -> int:
        """`rounds` for each learning rate."""
        return len(self.learning_rates) * self.rounds

    def train(self, client: Client, method: Method, folder: Path | None) -> ReferenceScores:
        """See `Reference`; every candidate is cached as a local baseline."""
        spec, own = client.spec, learning_rate(client)
        best_loss, best = math.inf, dict[str, float]()
        choice: dict[str, float] = {}
        for rate in dict.fromkeys((own, *self.learning_rates)):
            tried = list(range(self.rounds)) if rate in self.learning_rates else []
            if rate == own:
                tried.insert(0, spec.rounds - 1)
            candidate = client if rate == own else with_learning_rate(client, rate)  # the run's own may be cached
            baseline = train_local_baseline(candidate, max(tried) + 1, folder)
            for index in tried:
                loss = baseline.tuning_losses[index]
                if not choice or loss < best_loss:
                    best_loss, best = math.inf if math.isnan(loss) else loss, baseline.metrics[index]
                    choice = {"lr": rate, "epochs": float((index + 1) * spec.client.local_epochs)}
        return ReferenceScores(self.scored_rounds, [best], choice)


def check_baselines(options: BaselineOptions, method: Method, spec: FederationSpec) -> None:
    """Check that options of the references fit the run.

    Raises:
        UserError: If the tuned baseline has fewer epochs than a round, or a control of local training is requested.
    """
    require(not (options.control and method.is_local_baseline), "baseline.control", "null or false for Local", True)
    epochs, least = options.epochs, spec.client.local_epochs
    require(epochs is None or epochs >= least, "baseline.epochs", f"at least {least} (client.local_epochs)", epochs)


def plan_references(
    options: BaselineOptions, method: Method, spec: FederationSpec, participants: Sequence[Sequence[int]]
) -> dict[str, dict[int, Reference]]:
    """Return how the further references of each client are trained, by kind.

    Args:
        options: Which references a run has.
        method: Method of the run.
        spec: Specification of the federation.
        participants: Clients of each round, from round 0 to the last.
    """
    has_control = method.serves_more if options.control is None else options.control
    references: dict[str, dict[int, Reference]] = {}
    clients = range(spec.num_clients)
    if has_control and not method.is_local_baseline:
        references[Control.kind] = {
            number: Control(tuple(index for index, numbers in enumerate(participants) if number in numbers))
            for number in clients
        }
    if options.tune:
        rounds = tuned_rounds(options, spec)
        references[TunedLocal.kind] = dict.fromkeys(clients, TunedLocal(tuple(options.learning_rates), rounds))
    return references


def tuned_rounds(options: BaselineOptions, spec: FederationSpec) -> int:
    """Return the rounds of each candidate of the tuned baseline; 0 without it."""
    if not options.tune:
        return 0
    return (options.epochs or 2 * spec.rounds * spec.client.local_epochs) // spec.client.local_epochs


def learning_rate(client: Client) -> float:
    """Return the learning rate of a client's optimizer."""
    rate: float = client.spec.optimizer(client.networks["private"].parameters()).param_groups[0]["lr"]
    return float(rate)


def with_learning_rate(client: Client, rate: float) -> Client:
    """Return a new client with another learning rate."""
    optimizer = dict(client.spec.client.optimizer)
    optimizer["init_args"] = {**(optimizer.get("init_args") or {}), "lr": rate}
    spec = replace(client.spec, client=replace(client.spec.client, optimizer=optimizer))
    return Client(client.number, client.splits, client.samples, spec)


#: Kinds of references, as in messages to sites.
REFERENCES: dict[str, type[Control] | type[TunedLocal]] = {kind.kind: kind for kind in (Control, TunedLocal)}


def reference_to_json(reference: Reference) -> dict[str, Any]:
    """Convert a reference to JSON values."""
    return {"kind": reference.kind, **asdict(reference)}  # type: ignore[call-overload]


def reference_from_json(values: Mapping[str, Any]) -> Reference:
    """Build a reference from JSON values.

    Raises:
        UserError: If the kind or an argument is unknown.
    """
    try:
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        kind: Any = REFERENCES[arguments.pop("kind")]
        reference: Reference = kind(**arguments)
    except (KeyError, TypeError) as error:
        raise UserError(f"reference: expected one of {', '.join(REFERENCES)}, got {str(values)[:60]}") from error
    return reference
