"""Valid results and updates are accepted; of others the reason is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.federation import (
    ClientResult,
    Orchestrator,
    RoundOptions,
    RoundRequest,
    SequentialEngine,
    UpdateValidator,
)
from fedekd.federation.aggregate_validation import AggregateValidator, is_finite
from fedekd.federation.local_baseline import LocalBaseline
from fedekd.federation.update_validation import (
    MAX_LOGS,
    Change,
    invalid_field,
    is_log_name,
    out_of_proportion,
    with_plain_logs,
)
from fedekd.functional import Mean
from fedekd.methods import Broadcast, ClientOptions, ClientUpdate, FedAvg, FedeKD, Local
from fedekd.modules import TrainerFactory
from fedekd.reporting import metrics_csv

from .conftest import Federate, Recorder
from .runs import StopAfter, StoppedError

SENT = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n": torch.tensor(4)}


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**SENT, **tensors}


def test_check_valid_update_returns_none() -> None:
    assert UpdateValidator().check(changed(w=torch.randn(2, 3), n=torch.tensor(5)), SENT) is None
    assert UpdateValidator().check({}, {}) is None


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"w": SENT["w"], "b": SENT["b"]}, "key 'n' is missing"),
        (changed(x=torch.zeros(1)), "key 'x' was not sent to the client"),
        (changed(w=torch.zeros(3, 2)), "'w': expected shape (2, 3), got (3, 2)"),
        (changed(b=torch.zeros(3, dtype=torch.float64)), "'b': expected torch.float32, got torch.float64"),
        (changed(b=torch.tensor([0.0, torch.nan, 0.0])), "'b': expected finite values, got NaN or infinity"),
        (changed(b=torch.tensor([0.0, -torch.inf, 0.0])), "'b': expected finite values, got NaN or infinity"),
    ],
)
def test_check_invalid_update_returns_the_reason(update: dict[str, Tensor], words: str) -> None:
    assert UpdateValidator().check(update, SENT) == words


def test_check_norm_is_of_the_difference_to_the_message() -> None:
    sent = {"w": torch.full((4,), 100.0)}
    update = {"w": torch.full((4,), 103.0)}  # at distance 6
    assert UpdateValidator(max_norm=6.01).check(update, sent) is None
    reason = UpdateValidator(max_norm=5.99).check(update, sent)
    assert reason == "max_update_norm: expected a 2-norm of at most 5.99, got 6"
    opposite = {"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), -3e38)}
    assert UpdateValidator(max_norm=1.0).check(*opposite) is not None


NORM = nn.BatchNorm2d(2).state_dict()
OTHER_KINDS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "list": lambda: [0.0, 0.0, 0.0],
    "array": lambda: torch.zeros(3).numpy(),
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "uninitialized": nn.UninitializedParameter,
}


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_check_other_kind_of_tensor_returns_the_reason(kind: str) -> None:
    reason = UpdateValidator(max_norm=1.0).check({**SENT, "b": OTHER_KINDS[kind]()}, SENT)
    assert reason is not None
    assert reason.startswith("'b': expected a ")


@pytest.mark.parametrize("update", [None, [], list(SENT.items()), torch.zeros(3), 7, {7: torch.zeros(1)}, {None: 1}])
def test_check_no_state_dict_returns_the_reason(update: Any) -> None:
    assert UpdateValidator().check(update, SENT) is not None
    assert UpdateValidator().check(update, {}) is not None


def test_check_parameter_with_gradient_is_valid() -> None:
    assert UpdateValidator(max_norm=9.0).check({**SENT, "b": nn.Parameter(torch.ones(3))}, SENT) is None


def test_check_nan_of_complex_tensor_returns_the_reason() -> None:
    sent = {"c": torch.zeros(2, dtype=torch.complex64)}
    assert UpdateValidator().check({"c": torch.full((2,), complex(0, math.nan))}, sent) is not None
    assert UpdateValidator(max_norm=5.1).check({"c": torch.tensor([3 + 4j, 0])}, sent) is None
    assert UpdateValidator(max_norm=4.9).check({"c": torch.tensor([3 + 4j, 0])}, sent) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_var", -1e-3),
        ("num_batches_tracked", -(2**63)),
        ("num_batches_tracked", -1),
        ("num_batches_tracked", 2**53),
    ],
)
def test_check_buffer_out_of_range_returns_the_reason(name: str, value: float) -> None:
    update = {**NORM, name: torch.full_like(NORM[name], value)}
    reason = UpdateValidator().check(update, NORM)
    assert reason is not None
    assert reason.startswith(f"'{name}': expected ")
    assert UpdateValidator().check({**NORM, "num_batches_tracked": torch.tensor(2**53 - 1)}, NORM) is None


def test_check_integer_below_zero_is_valid_where_the_message_has_one() -> None:
    sent = {"offsets": torch.tensor([-3, 2])}
    assert UpdateValidator().check({"offsets": torch.tensor([-3, 5])}, sent) is None
    assert UpdateValidator().check({"offsets": torch.tensor([-4, 5])}, sent) is not None


@pytest.mark.parametrize("value", [2**53, 2**63 - 1])
def test_check_large_integer_is_valid_if_unchanged(value: int) -> None:
    sent = {"seed": torch.tensor([value, 3])}
    assert UpdateValidator().check({"seed": sent["seed"].clone()}, sent) is None
    assert UpdateValidator().check({"seed": torch.tensor([value, 2])}, sent) is not None


RARE_TYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]


@pytest.mark.parametrize("dtype", RARE_TYPES, ids=str)
def test_check_rare_type_is_compared(dtype: torch.dtype) -> None:
    sent, update = ({"t": torch.tensor([value, 0]).to(dtype)} for value in (0, 1))
    assert UpdateValidator(max_norm=1.5).check(update, sent) is None
    change = Change.of(update, sent)
    assert (change.norm, change.integers) == ((1.0, {}) if dtype.is_floating_point else (0.0, {"t": True}))
    assert is_finite(sent)
    if dtype.is_floating_point:
        assert UpdateValidator().check({"t": torch.tensor([math.nan, 0]).to(dtype)}, sent) is not None


def changes(*norms: float, steps: tuple[int, ...] = (), message_norm: float = 0.0) -> list[Change]:
    """Changes of these norms, with one training step each by default."""
    message = {"weight": torch.tensor([message_norm])}
    return [Change(norm, message, {}, count) for norm, count in zip(norms, steps or [1] * len(norms), strict=True)]


@pytest.mark.parametrize(
    ("norms", "rejected"),
    [
        ((1, 2, 3, 1e30, 2, 1), [3]),
        ((1, 2, 3, 50, 2, 1), [3]),
        ((1, 1, 1, 1, 1, 19), []),
        ((1, 1e30, 1e30, 1, 1, 1), [1, 2]),
        ((1, math.inf), [1]),
        ((1e30,), []),
        ((0, 1e-3, 1e-3), []),
        ((0, 0, 1), []),
    ],
)
def test_out_of_proportion_names_the_changes_far_above_the_others(
    norms: tuple[float, ...], rejected: list[int]
) -> None:
    assert list(out_of_proportion(changes(*norms))) == rejected


def test_out_of_proportion_more_steps_explain_a_larger_change_up_to_a_limit() -> None:
    assert not out_of_proportion(changes(1, 1, 600, steps=(2, 2, 120)))
    assert list(out_of_proportion(changes(1, 1, 600))) == [2]
    assert list(out_of_proportion(changes(1, 1, 1e30, steps=(2, 2, 10**9)))) == [2]


def test_out_of_proportion_change_of_the_order_of_the_message_is_usual() -> None:
    assert not out_of_proportion(changes(1e-9, 1e-9, 3, message_norm=1.0))


def test_out_of_proportion_first_change_of_a_message_that_is_not_zero_has_a_limit() -> None:
    assert list(out_of_proportion(changes(0, 0, 5, message_norm=1.0))) == [2]


def test_out_of_proportion_integers_that_others_keep_may_not_change() -> None:
    honest, index = (Change(1, {}, {"count": True, "index": differs}) for differs in (False, True))
    assert list(out_of_proportion([honest, index, honest])) == [1]
    assert not out_of_proportion([honest, honest, honest])


def test_out_of_proportion_integers_are_compared_with_two_clients_that_hold_them() -> None:
    small, deep = Change(1, {}, {"count": True}), Change(1, {}, {"count": True, "deep": True})
    kept = Change(1, {}, {"count": True, "deep": False})
    assert not out_of_proportion([small, small, small, deep, deep])
    assert not out_of_proportion([small, small, deep, kept])
    assert list(out_of_proportion([small, small, deep, kept, kept])) == [2]


class HostileClient(FedAvg):
    """Client 1 sends an update with every weight at `value`, in round 1."""

    def __init__(self, value: float, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
        update = super().prepare_update(client, round_idx)
        if (client.number, round_idx) != (1, 1):
            return update
        return replace(update, state={name: torch.full_like(t, self.value) for name, t in update.state.items()})


@pytest.mark.parametrize("value", [1e30, 1e38, -1e10])
def test_run_one_huge_update_is_rejected_and_later_ones_are_not(value: float, federate: Federate) -> None:
    recorder = Recorder()
    run = federate(HostileClient(value), observer=recorder, rounds=RoundOptions(rounds=3))
    summary = run.run()
    assert [row["comm/updates"] for row in run.progress.history] == [3, 2, 3]
    [warning] = recorder.warnings
    assert warning.startswith("round 2: update of client 1 rejected: expected a change of at most ")
    assert all(math.isfinite(client["score"]) for client in summary["clients"])


def result(**changes_: Any) -> ClientResult:
    return replace(ClientResult(1, 0.5, 1, {"loss": 0.1}, None), **changes_)


@pytest.mark.parametrize("name", ["loss", "gate/weight_mean", "exit_1/gate/weight_std", "a-b.c/D_9", "x" * 64])
def test_is_log_name_accepts_segments(name: str) -> None:
    assert is_log_name(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//b", "\ud800", "x" * 65, "a b", "ä", "a\n", "\x1b[1m", 7, None]
)
def test_is_log_name_rejects_others(name: Any) -> None:
    assert not is_log_name(name)
    assert invalid_field(result(logs={name: 1.0})) is not None


@pytest.mark.parametrize(
    "changes_",
    [
        {"logs": {f"n{index}": 0.0 for index in range(MAX_LOGS + 1)}},
        {"logs": {"loss": torch.tensor(1.0)}},
        {"logs": {"loss": "1"}},
        {"logs": [("loss", 1.0)]},
        {"score": None},
        {"supervised_rounds": -1},
        {"client": True},
        {"update": {"w": 1}},
        {"update": ClientUpdate(1, {}, -1)},
    ],
    ids=str,
)
def test_invalid_field_names_the_first_in_one_short_line(changes_: dict[str, Any]) -> None:
    reason = invalid_field(result(**changes_))
    assert reason is not None
    assert reason.startswith(next(iter(changes_)))
    assert len(reason) < 150


class ChangingEngine(SequentialEngine):
    """Replaces fields of the result of client 1 in round 1."""

    fields: ClassVar[dict[str, Any]] = {}
    round_idx = 1

    def run_clients(self, request: RoundRequest) -> Iterator[ClientResult]:
        for original in super().run_clients(request):
            is_changed = (original.client, request.round_idx) == (1, self.round_idx)
            yield replace(original, **self.fields) if is_changed else original


def engine_with(round_idx: int = 1, **fields: Any) -> type[ChangingEngine]:
    return type("Engine", (ChangingEngine,), {"fields": fields, "round_idx": round_idx})


INVALID_RESULTS: dict[str, dict[str, Any]] = {
    "surrogate": {"logs": {"\ud800": 1.0}},
    "many names": {"logs": {f"n{index}": 1.0 for index in range(200_000)}},
    "score": {"score": 1.5},
    "infinite score": {"score": math.inf},
    "score that is not among the metrics": {"metrics": {"accuracy": 0.123}},
    "metric out of range": {"metrics": dict.fromkeys(["accuracy", "ece"], 7.0)},
    "other client": {"client": 0},
    "no participant": {"client": 7},
    "update of another": {"update": ClientUpdate(0, {}, 1)},
    "no result": {"client": None},
}


@pytest.mark.parametrize("what", INVALID_RESULTS)
def test_run_invalid_result_is_left_out_with_a_warning(what: str, federate: Federate, tmp_path: Path) -> None:
    recorder = Recorder()
    run = federate(Local(), engine=engine_with(**INVALID_RESULTS[what]), observer=recorder, output=tmp_path)
    run.run()
    [warning] = recorder.warnings
    assert warning.startswith("round 1: rejected a result: client ")
    assert len(warning) < 250
    first, second = run.progress.history
    assert [f"client_{number}/accuracy" in first for number in range(3)] == [True, False, True]
    assert set(second) == {*first, *second}
    assert len((tmp_path / "metrics.csv").read_text().partition("\n")[0].split(",")) < 400


def test_resume_after_an_invalid_result_gives_equal_results(federate: Federate, tmp_path: Path) -> None:
    engine = engine_with(logs={"a b": 1.0})
    whole = federate(engine=engine, observer=Recorder())
    whole.run()
    with pytest.raises(StoppedError):
        federate(engine=engine, observer=StopAfter(rounds=1), output=tmp_path).run()
    again = federate(engine=engine, observer=Recorder(), output=tmp_path)
    again.run()
    assert metrics_csv(again.progress.history) == metrics_csv(whole.progress.history)


def test_run_invalid_result_in_last_round_raises_user_error(federate: Federate) -> None:
    run = federate(Local(), engine=engine_with(2, logs={"a b": 1.0}))
    with pytest.raises(
        UserError, match=r"round 2: rejected a result: client 1: logs.*The last round needs every client"
    ):
        run.run()


@pytest.mark.parametrize("num_samples", [0, 1, 2**53 - 1])
def test_run_update_with_other_number_of_samples_is_rejected(num_samples: int, federate: Federate) -> None:
    class Lying(FedAvg):
        def prepare_update(self, client: Any, round_idx: int) -> ClientUpdate:
            update = super().prepare_update(client, round_idx)
            return replace(update, num_samples=num_samples) if client.number == 1 else update

    recorder = Recorder()
    run = federate(Lying(weights="samples"), observer=recorder)
    run.run()
    held = len(run.data.clients[1].train)
    assert (
        recorder.warnings[0] == f"round 1: update of client 1 rejected: num_samples: expected {held}, got {num_samples}"
    )
    assert [row["comm/updates"] for row in run.progress.history] == [2, 2]


def test_mean_without_any_samples_is_uniform() -> None:
    states = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    assert Mean("samples")(states, [0, 0])["w"].item() == 2.0


class LyingEngine(SequentialEngine):
    """Reports an impossible score of a local baseline."""

    def local_baselines(self, rounds: Any) -> Any:
        return {**super().local_baselines(rounds), 1: LocalBaseline([0.5, 1e308])}


class LyingMetricsEngine(SequentialEngine):
    """Reports an impossible metric of a local baseline."""

    def local_baselines(self, rounds: Any) -> Any:
        baselines = super().local_baselines(rounds)
        baselines[1].metrics[0]["macro_f1"] = 1.5
        return baselines


def test_run_local_score_out_of_range_raises_user_error(federate: Federate) -> None:
    with pytest.raises(UserError, match=r"client 1: score: expected a value of accuracy, got 1e\+308"):
        federate(engine=LyingEngine).run()
    with pytest.raises(UserError, match=r"client 1: score: expected a value of macro_f1, got 1\.5"):
        federate(engine=LyingMetricsEngine).run()


class Broken(FedeKD):
    """Aggregates to NaN in round 1."""

    def aggregate(self, updates: Any, round_idx: int) -> None:
        super().aggregate(updates, round_idx)
        if round_idx == 1:
            self.server_state = {name: torch.full_like(t, math.nan) for name, t in self.server_state.items()}


def test_run_aggregate_with_nan_leaves_the_server_state(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(Broken(), observer=recorder)
    run.run()
    assert recorder.warnings == ["round 2: the aggregate has NaN or infinity; the server keeps its state"]
    assert all(bool(tensor.isfinite().all()) for tensor in run.method.server_state.values())


def test_run_server_state_is_kept_if_the_aggregate_is_not_usable(federate: Federate) -> None:
    class Overflowing(FedeKD):
        """Changes its state in place, to weights whose outputs are not finite."""

        def aggregate(self, updates: Any, round_idx: int) -> None:
            if round_idx == 1:
                for tensor in self.server_state.values():
                    tensor.fill_(1e30)
            else:
                super().aggregate(updates, round_idx)

    recorder = Recorder()
    run: Orchestrator = federate(Overflowing(), observer=recorder, rounds=RoundOptions(rounds=2))
    run.run()
    assert recorder.warnings == ["round 2: the aggregated network gives no finite outputs; the server keeps its state"]
    assert all(float(tensor.abs().max()) < 10 for tensor in run.method.server_state.values())


def test_run_probe_out_of_memory_ends_the_run(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(*arguments: Any) -> Any:
        raise errors.pop() if errors else ValueError

    monkeypatch.setattr("fedekd.federation.aggregate_validation.predict", predict)
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        errors = [error]
        run = federate()
        with pytest.raises(type(error)):
            run.run()
        assert not run.aggregates._networks


def test_probe_of_another_device_and_precision_is_on_the_cpu_in_float32(federate: Federate) -> None:
    run = federate(trainer=TrainerFactory(accelerator="cpu", precision="64-true", threads=1))
    cuda = replace(run.spec, trainer=replace(run.spec.trainer, accelerator="cuda"))
    run.method.init_server(run.spec)
    message = Broadcast(run.method.server_state)
    validator = AggregateValidator(cuda)
    assert validator.check(run.method.server_state, message, [0]) is None
    [probe] = validator._networks.values()
    assert probe is not None
    network, _ = probe
    assert {(t.dtype, t.device.type) for t in network.parameters()} == {(torch.float32, "cpu")}


class Scaled(FedeKD):
    """Scales the proxy by a trained number, and counts rounds in the server state."""

    def init_server(self, spec: Any) -> None:
        super().init_server(spec)
        self.server_state = {"model": self.server_state, "round": torch.tensor(0), "nested": [torch.zeros(1)]}

    def broadcast(self, participants: Any, round_idx: int) -> Broadcast:
        self.server_state["round"] += 1
        return Broadcast(self.server_state["model"])

    def aggregate(self, updates: Any, round_idx: int) -> None:
        scale = nn.Parameter(torch.tensor(1.0))
        model = self.merge([u.state for u in updates], [u.num_samples for u in updates])
        model = {name: tensor * scale for name, tensor in model.items()}
        if round_idx == 1:
            model = {name: tensor * math.nan for name, tensor in model.items()}
            self.server_state["nested"][0] += 1
        self.server_state["model"] = model


def test_run_server_state_with_a_graph_is_restored_and_probed_on_a_copy(federate: Federate) -> None:
    recorder = Recorder()
    run = federate(Scaled(), observer=recorder, rounds=RoundOptions(rounds=3))
    run.run()
    assert recorder.warnings == ["round 2: the aggregate has NaN or infinity; the server keeps its state"]
    state = run.method.server_state
    assert int(state["round"]) == 4  # one message each in rounds 0 to 3
    assert state["nested"] == [torch.zeros(1)]
    assert is_finite(state)


class Logging(FedAvg):
    """Logs one value."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.log = {name: value}

    def receive(self, client: Any, received: Any, round_idx: int) -> dict[str, float]:
        super().receive(client, received, round_idx)
        return self.log


def test_run_all_results_invalid_raises_user_error_in_the_first_round(federate: Federate) -> None:
    recorder = Recorder()
    with pytest.raises(UserError, match=r"^round 0: rejected all results; client 2: logs: expected .*'train loss'"):
        federate(Logging("train loss", 0.5), observer=recorder).run()
    assert len(recorder.warnings) == 3


def test_run_only_result_of_a_round_invalid_is_a_warning(federate: Federate) -> None:
    recorder = Recorder()
    rounds = RoundOptions(rounds=2, participation=0.4)  # client 1 in round 0
    federate(engine=engine_with(0, logs={"a b": 1.0}), observer=recorder, rounds=rounds).run()
    assert recorder.warnings[0].startswith("round 0: rejected a result: client 1: logs")


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5, requires_grad=True), torch.tensor(0.5).half()]
)
def test_run_logged_scalar_of_numpy_or_torch_becomes_a_float(value: Any, federate: Federate) -> None:
    run = federate(Logging("loss", value), rounds=RoundOptions(rounds=1))
    run.run()
    logged = run.progress.history[0]["client_1/loss"]
    assert (type(logged), logged) == (float, 0.5)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ({"train loss": 0.5}, "logs: expected names of letters, digits and _ . - /, got 'train loss'"),
        ({"loss": "0.5"}, "logs: expected a number as 'loss', got '0.5'"),
        ([("loss", 0.5)], "logs: expected a dict of numbers by name, got [('loss', 0.5)]"),
    ],
)
def test_invalid_field_of_logs_gives_the_name_and_the_rule(log: Any, words: str) -> None:
    reason = invalid_field(result(logs=log))
    assert reason is not None
    assert reason.startswith(words)


@pytest.mark.parametrize(
    "value", [torch.tensor(1j), torch.zeros(2), torch.zeros((), device="meta"), np.str_("1"), None]
)
def test_plain_logs_other_values_stay_and_are_invalid(value: Any) -> None:
    assert invalid_field(with_plain_logs(result(logs={"loss": value}))) is not None
    assert with_plain_logs(value) is value


class Normalising(nn.Module):
    """Divides each image by its largest value: a black one has no finite outputs."""

    def __init__(self, in_channels: int = 1, image_size: Any = 8, num_classes: int = 3, black: float = 0.0) -> None:
        super().__init__()
        self.head, self.black = nn.Linear(64, num_classes), black

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x / (x.amax(dim=(1, 2, 3), keepdim=True) * self.black)).flatten(1))
        return logits


@pytest.mark.parametrize("black", [1.0, 0.0])
def test_probe_initial_outputs_not_finite_drops_only_these_images(black: float, federate: Federate) -> None:
    model = {"class_path": f"{__name__}.Normalising", "init_args": {"black": black}}
    recorder = Recorder()
    run = federate(FedAvg(), client=ClientOptions(private_model=model), observer=recorder)
    run.method.init_server(run.spec)
    broken = {name: torch.full_like(t, 1e38) for name, t in run.method.server_state["model"].items()}
    reasons = [run.aggregates.check(broken, Broadcast(broken), [client]) for client in (0, 1, 2)]
    if black:
        assert (reasons, recorder.warnings) == (["the aggregated network gives no finite outputs"] * 3, [])
    else:
        assert reasons == [None] * 3
        [warning] = recorder.warnings
        assert warning.startswith("Normalising: ")
