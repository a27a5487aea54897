from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedekd.benchmark.results import COLUMNS, to_row
from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import Comparison, DoNoHarm
from fedekd.errors import LONGEST_ERROR, UserError
from fedekd.federation import RoundOptions
from fedekd.federation.result_warnings import result_warnings
from fedekd.federation.results import ClientRecord, Progress, ReportedMetrics
from fedekd.methods import FedAvg, Local
from fedekd.metrics import METRICS, negative_transfer, predicts_like_one_class
from fedekd.reporting import metrics_csv, result_tables
from fedekd.reporting.console import deployed_table, round_line
from fedekd.reporting.run_report import Run, run_sections, run_table

from .conftest import Federate, Recorder
from .runs import StopAfter, StoppedError

#: A client without a score of either model, one whose federated model diverged, and one that it harms.
UNDEFINED = ((None, None), (None, 0.7), (-0.1, 0.7))

CHOSEN = ["balanced_accuracy", "auroc", "recall"]


@pytest.fixture
def even(npz: Path) -> FederatedDataModule:
    """Clients of which each has all classes in its test split."""
    return FederatedDataModule(str(npz), num_clients=3, partition="iid", batch_size=8)


@pytest.fixture
def make_deployed() -> dict[str, Any]:
    """A summary of three clients that deploy their local models."""
    comparison = {"samples": 9, "worse": 2, "better": 1, "gain": 0.1, "p_value": None, "deployed": "local"}
    clients = [
        {"client": number, "delta": delta, "local": local, **comparison}
        for number, (delta, local) in enumerate(UNDEFINED)
    ]
    delta: dict[str, Any] = dict.fromkeys(("avg", "worst", "p10"))
    rule = {"rule": "better", "confidence": 0.9, "margin": 0.0}
    content = {"task": "classification", "metric": "auroc", "clients": clients, "delta": delta}
    return {**content, "deployed": {"rule": rule, "delta": delta}}


def test_run_chosen_metrics_decide_score_delta_and_columns(
    federate: Federate, even: FederatedDataModule, tmp_path: Path
) -> None:
    run = federate(FedAvg(), data=even, metrics=CHOSEN, output=tmp_path)
    summary = run.run()
    row, clients = run.progress.history[-1], summary["clients"]
    values = [run.engine.client(number).evaluate()[1] for number in range(3)]  # type: ignore[attr-defined]
    assert summary["metric"] == "balanced_accuracy"
    assert [client["score"] for client in clients] == [each["balanced_accuracy"] for each in values]
    assert [client["metrics"]["auroc"]["score"] for client in clients] == [each["auroc"] for each in values]
    for name in ("auroc", "recall/1"):
        local = [client["metrics"][name]["local"] for client in clients]
        delta = negative_transfer([each[name] for each in values], local, metric=METRICS["auroc"])
        assert summary["metrics"][name]["delta"] == {part: delta[part].item() for part in ("avg", "worst", "p10")}
        assert summary["metrics"][name]["clients"] == 3
        assert (
            row[f"{name}/mean"] == summary["metrics"][name]["mean"] == pytest.approx(sum(v[name] for v in values) / 3)
        )
        assert row[f"delta/{name}/worst"] == delta["worst"].item()
        assert [row[f"client_2/{prefix}{name}"] for prefix in ("", "local/", "delta/")] == [
            values[2][name],
            local[2],
            delta["client"][2].item(),
        ]
    assert row["delta/avg"] == summary["delta"]["avg"]
    assert "client_0/ece" not in row
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_run_default_metrics_keep_the_columns_of_the_primary_one(federate: Federate) -> None:
    default = federate(FedAvg())
    default.run()
    primary = federate(FedAvg(), metrics=["accuracy"])
    summary = primary.run()
    assert "metrics" not in summary
    for row, whole in zip(primary.progress.history, default.progress.history, strict=True):
        assert row == {name: whole[name] for name in row}
        assert [name for name in whole if name in row] == list(row)


def test_local_baseline_is_cached_once_for_every_choice_of_metrics(federate: Federate, tmp_path: Path) -> None:
    runs = [federate(FedAvg(), metrics=metrics, baseline_dir=tmp_path) for metrics in (None, ["ece"])]
    runs[0].run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    runs[1].run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert runs[1].progress.local == {
        number: [values["ece"] for values in rounds] for number, rounds in runs[0].progress.local_metrics.items()
    }


def progress(values: dict[int, tuple[float, float]], accuracy: float = 0.5) -> Progress:
    """Progress of clients with an AUROC of the method and of the local baseline."""
    return Progress(
        records={
            number: ClientRecord(0.5, 1, {}, metrics={"accuracy": accuracy, "auroc": score})
            for number, (score, _) in values.items()
        },
        local={number: [0.4] for number in values},
        local_metrics={number: [{"accuracy": 0.4, "auroc": local}] for number, (_, local) in values.items()},
    )


def test_scores_client_without_a_value_is_left_out() -> None:
    scores = progress({0: (0.9, 0.7), 1: (math.nan, math.nan), 2: (0.6, 0.7)}).scores(METRICS["auroc"], "auroc")
    assert (scores.counted, scores.mean, scores.worst) == (2, pytest.approx(0.75), 0.6)
    assert scores.delta == pytest.approx({"avg": 0.05, "worst": -0.1, "p10": -0.07})
    assert math.isnan(scores.clients[1][2])


def test_scores_non_finite_method_stays_nan_where_the_split_has_all_classes() -> None:
    run = progress({0: (0.9, 0.7), 1: (math.nan, 0.7)})
    run.records[1].metrics["accuracy"] = math.nan
    scores = run.scores(METRICS["auroc"], "auroc")
    assert scores.counted == 2
    assert all(math.isnan(value) for value in (scores.mean, scores.worst, *scores.delta.values()))


def test_scores_non_finite_method_at_a_split_without_a_class_is_left_out() -> None:
    run = progress({0: (0.9, 0.7), 1: (math.nan, math.nan)})
    run.records[1].metrics["accuracy"] = math.nan
    scores = run.scores(METRICS["auroc"], "auroc")
    assert (scores.counted, scores.mean, scores.delta["worst"]) == (1, 0.9, pytest.approx(0.2))


def test_row_exit_score_leaves_out_clients_without_a_value(even: FederatedDataModule) -> None:
    run, reported = progress({0: (0.9, 0.7), 1: (math.nan, math.nan)}), ReportedMetrics(["auroc"], even.samples)
    for number, score in ((0, 0.8), (1, math.nan)):
        run.records[number].score = run.records[number].metrics["auroc"]
        run.records[number].logs = {"exit_1/auroc": score, "exit_1/active": float(number)}
    run.add_row(1, reported)
    del run.records[0]
    run.add_row(2, reported)
    assert run.history[0]["exit_1/auroc"] == 0.8
    assert run.history[0]["exit_1/active"] == 0.5
    assert math.isnan(run.history[1]["exit_1/auroc"])


def test_scores_no_client_has_a_value_is_nan() -> None:
    scores = progress({0: (math.nan, math.nan)}).scores(METRICS["auroc"], "auroc")
    assert scores.counted == 0
    assert all(math.isnan(value) for value in (scores.mean, scores.worst, *scores.delta.values()))


def test_run_test_split_without_a_class_is_named_once(federate: Federate, npz: Path) -> None:
    recorder = Recorder()
    data = FederatedDataModule(str(npz), num_clients=3, alpha=0.1, batch_size=8)
    summary = federate(FedAvg(), data=data, metrics=CHOSEN, observer=recorder).run()
    classes = range(data.num_classes)
    missing = [[label for label in classes if label not in data.samples.targets[part.test]] for part in data.clients]
    assert any(missing)
    assert [client.get("missing_in_test", []) for client in summary["clients"]] == [
        [str(label) for label in labels] for labels in missing
    ]
    [line] = [text for text in recorder.warnings if "undefined" in text]
    assert line.startswith("metrics: balanced_accuracy, auroc: undefined in these test splits")
    for number, labels in enumerate(missing):
        assert (f"{number}: no {', '.join(map(str, labels))}" in line) == bool(labels)
    defined = [number for number, labels in enumerate(missing) if not labels]
    assert summary["metrics"]["auroc"]["clients"] == len(defined)


def test_run_primary_metric_undefined_at_a_site_is_null_and_a_dash(
    federate: Federate, npz: Path, tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = FederatedDataModule(str(npz), num_clients=3, alpha=0.1, batch_size=8)
    run = federate(
        FedAvg(), data=data, metrics=["auroc", "recall"], output=tmp_path, do_no_harm=DoNoHarm(rule="better")
    )
    summary = run.run()
    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert content == summary
    undefined = [client for client in content["clients"] if "missing_in_test" in client]
    assert undefined
    assert all(client[name] is None for client in undefined for name in ("score", "local", "delta"))
    console = Console(file=StringIO(), width=200)
    for table in result_tables(summary, ["auroc", "recall"]):
        console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "-" in printed
    assert "nan" not in printed.replace("nan-", "")
    # No client has a value, as in a round of few participants.
    everywhere = {**summary, "mean": None, "local_mean": None, "delta": dict.fromkeys(summary["delta"])}
    report = Run("run", "fit", {}, "", everywhere, run.progress.history)
    assert "mean -, local baseline -" in run_sections([report])[1].text[0]
    assert run_table([report])["Delta avg"].tolist() == ["-"]
    row = {**run.progress.history[-1], "auroc/mean": math.nan, "delta/avg": math.nan}
    assert "auroc -  delta avg - worst" in round_line(row, 2)
    provenance = {name: "" for name in COLUMNS if name not in summary}
    assert to_row("k", "c", "FedAvg", everywhere, provenance)["mean"] == "nan"


def test_deployed_table_undefined_delta_is_a_dash(make_deployed: dict[str, Any]) -> None:
    rows = [[str(cell) for cell in column.cells] for column in deployed_table(make_deployed).columns[-2:]]
    assert [cells[:3] for cells in rows] == [["-", "-", "-0.1000"], ["-", "+0.0000", "+0.0000"]]


def test_progress_without_metrics_has_the_primary_metric_only(federate: Federate) -> None:
    run = federate(FedAvg())
    run.run()
    stored: Any = json.loads(json.dumps(run.progress.to_json()))
    for record in stored["records"].values():
        record["metrics"] = {}  # as by an engine of a user
    stored["local_metrics"] = {}
    old = Progress.from_json(stored)
    assert not old.has_metrics
    assert old.other_scores(run.metrics) == {}
    assert old.scores(METRICS["accuracy"]) == run.progress.scores(METRICS["accuracy"])


def test_resume_with_chosen_metrics_gives_equal_bytes(federate: Federate, tmp_path: Path) -> None:
    whole = federate(FedAvg(), metrics=CHOSEN)
    whole.run()
    with pytest.raises(StoppedError):
        federate(FedAvg(), metrics=CHOSEN, output=tmp_path, observer=StopAfter(rounds=1)).run()
    with pytest.raises(UserError, match="metric"):
        federate(FedAvg(), output=tmp_path).run()
    again = federate(FedAvg(), metrics=CHOSEN, output=tmp_path)
    again.run()
    assert (tmp_path / "metrics.csv").read_bytes() == metrics_csv(whole.progress.history)


def test_run_unknown_metric_or_metric_of_other_task_raises_user_error(federate: Federate) -> None:
    for name in ("acuracy", "rmse"):
        with pytest.raises(UserError, match="metrics: expected"):
            federate(metrics=[name])


def test_predicts_like_one_class_compares_with_majority_and_chance() -> None:
    counts = torch.tensor([3, 1])
    assert predicts_like_one_class({"accuracy": 0.75}, counts)
    assert not predicts_like_one_class({"accuracy": 1.0, "balanced_accuracy": 0.9}, counts)
    assert predicts_like_one_class({"accuracy": 0.8, "balanced_accuracy": 0.50004}, counts)
    assert predicts_like_one_class({"accuracy": 0.8, "balanced_accuracy": 0.4}, counts)
    assert not predicts_like_one_class({"accuracy": 1.0}, torch.tensor([3, 0]))
    assert not predicts_like_one_class({"accuracy": math.nan}, counts)


def stub_run(record: ClientRecord, counts: Sequence[int] = (3, 3, 3), **changes: Any) -> Any:
    """A finished run of one site, north, with what the warnings read."""
    data = SimpleNamespace(
        samples=SimpleNamespace(targets=torch.zeros(0, dtype=torch.int64), num_classes=3),
        clients=[SimpleNamespace(title="north", test=torch.arange(3))],
        class_counts=lambda: np.array([counts]),
    )
    values = {
        "task": "classification",
        "do_no_harm": None,
        "data": data,
        "metrics": SimpleNamespace(are_chosen=False, rows=[], primary=SimpleNamespace(name="accuracy")),
        "progress": Progress(records={0: record}, local={0: [0.3]}),
        "spec": SimpleNamespace(client=SimpleNamespace(class_weights=None)),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("record", "task", "line"),
    [
        (ClientRecord(0.5, 0, {}), "classification", "clients (north): never drawn to train. Delta compares"),
        (
            ClientRecord(0.5, 1, {"selected/score": math.nan}),
            "classification",
            "clients (north): the last round",
        ),
        (
            ClientRecord(0.5, 1, {}, comparison=Comparison("federated", 9, 0, 0, -9.1, 1e-9, 0.1)),
            "regression",
            "clients (north): the deployed model has a larger mean squared error",
        ),
    ],
)
def test_result_that_misleads_is_named(record: ClientRecord, task: str, line: str) -> None:
    [found] = result_warnings(stub_run(record, task=task, do_no_harm=DoNoHarm(margin=0.1)))
    assert found.startswith(line)
    plain = ClientRecord(0.5, 1, {"selected/score": 0.5}, comparison=Comparison("federated", 9, 0, 0, 0.1, 1e-9, 0.1))
    assert result_warnings(stub_run(plain, task=task, do_no_harm=DoNoHarm(margin=0.1))) == []


@pytest.mark.parametrize(
    ("counts", "advice"),
    [
        ([6, 2, 2], ". Try --metrics [balanced_accuracy] and --client.class_weights balanced"),
        ([6, 2, 0], ""),  # balanced accuracy is undefined, and weights do not help a class without samples
        ([4, 4, 3], ". Their classes are balanced: raise --rounds, --client.local_epochs or --client.optimizer.lr"),
    ],
)
def test_one_class_warning_of_a_server_without_labels_uses_counts_of_sites(counts: list[int], advice: str) -> None:
    [line] = result_warnings(stub_run(ClientRecord(0.3, 1, {}, metrics={"accuracy": 0.3}), counts))
    assert line.startswith("scores of 1 of 1 clients are not better than predicting one class (north)")
    assert line.endswith(f"(north){advice}")


def test_undefined_metrics_of_many_sites_with_long_names_fit_one_warning(federate: Federate, npz: Path) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=0.1, batch_size=8)
    run = federate(FedAvg(), data=data, metrics=CHOSEN)
    run.run()
    data._samples = replace(data.samples, class_names=tuple(f"{name}{'x' * 200}" for name in "abc"))
    for clients in (3, 300):
        run.progress.records = {number: run.progress.records[number % 3] for number in range(clients)}
        run.progress.local_metrics = {number: run.progress.local_metrics[number % 3] for number in range(clients)}
        data._clients = [data.clients[number % 3] for number in range(clients)]
        line = result_warnings(run)[0]
        assert len(line) <= LONGEST_ERROR
        assert line.endswith("clients in all)") == (clients == 300)


def test_run_one_predicted_class_is_a_warning(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("fedekd.methods.Client.in_target_unit", lambda self, logits: logits * 0 + torch.eye(1, 3))
    federate(Local(), observer=recorder, rounds=RoundOptions(rounds=1)).run()
    [line] = recorder.score_warnings
    assert line.endswith("Try --metrics [balanced_accuracy] and --client.class_weights balanced")


def test_run_other_metric_has_the_values_that_it_has_as_score(federate: Federate) -> None:
    as_score, as_other = federate(FedAvg()), federate(FedAvg(), metrics=["ece", "accuracy"])
    as_score.run()
    as_other.run()
    names = [f"client_{number}/" for number in range(3)]
    for row, other in zip(as_score.progress.history, as_other.progress.history, strict=True):
        assert [other[f"{client}local/accuracy"] for client in names] == [row[f"{client}local"] for client in names]
        assert [other[f"{client}delta/accuracy"] for client in names] == [row[f"{client}delta"] for client in names]
        assert other["delta/accuracy/worst"] == row["delta/worst"]
        assert other["accuracy/mean"] == row["accuracy/mean"]
