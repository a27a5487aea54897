"""Loggers by class path: what they hold of a run that was killed, of a sweep, and of a finished one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedekd.cli import main
from fedekd.reporting import read_metrics_csv
from tests.cli.test_kill import kill, options

WANDB = "--logger=fedekd.reporting.wandb_logger.WandbRunLogger"
LIGHTNING = "--logger=lightning.pytorch.loggers."

Content = tuple[dict[str, Any], dict[str, dict[int, float]]]
"""Configuration by flat names, and the values of each metric by step."""


def csv_content(folder: Path) -> Content:
    version = folder / "lightning_logs" / "version_1"  # version_0 is of the process that was killed
    rows = read_metrics_csv(version / "metrics.csv")
    config = yaml.safe_load((version / "hparams.yaml").read_text())
    lr = config["client"]["optimizer"]["init_args"]["lr"]
    names = set().union(*rows) - {"step"}
    return {"client/optimizer/init_args/lr": lr}, {
        name: {int(row["step"]): row[name] for row in rows if name in row} for name in names
    }


def tensorboard_content(folder: Path) -> Content:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(folder / "lightning_logs" / "version_1"))
    events.Reload()
    steps = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert all(len(events.Scalars(name)) == len(values) for name, values in steps.items())  # each round once
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    del steps["hp_metric"]
    return {name: value.number_value or value.string_value for name, value in hparams.items()}, steps


def mlflow_content(folder: Path) -> Content:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'e'")
    last, killed = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    assert (last.info.status, killed.info.status) == ("FINISHED", "RUNNING")
    histories = {name: client.get_metric_history(last.info.run_id, name) for name in last.data.metrics}
    steps = {name: {value.step: value.value for value in values} for name, values in histories.items()}
    assert all(len(histories[name]) == len(values) for name, values in steps.items())  # each round once
    return {name: _number(value) for name, value in last.data.params.items()}, steps


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


LOGGERS: dict[str, tuple[str, str, Callable[[Path], Content]]] = {
    "CSVLogger": ("", "--logger.save_dir={}", csv_content),
    "TensorBoardLogger": ("tensorboard", "--logger.save_dir={}", tensorboard_content),
    "MLFlowLogger": ("mlflow", "--logger.tracking_uri=sqlite:///{}/mlflow.db", mlflow_content),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["CSVLogger", *(pytest.param(name, marks=pytest.mark.loggers) for name in ("TensorBoardLogger", "MLFlowLogger"))],
)
def test_logger_has_all_rounds_and_the_configuration_after_a_kill(name: str, npz: Path, tmp_path: Path) -> None:
    package, option, content = LOGGERS[name]
    if package:
        pytest.importorskip(package)
    logs, run = tmp_path / "logs", tmp_path / "run"
    logs.mkdir()
    # MLflow stores at most 100 parameters per call, and 250 characters of a value.
    rates = f"--baseline.learning_rates=[{', '.join(str(number / 1024) for number in range(1, 61))}]"
    more = ["--logger.experiment_name=e"] if name == "MLFlowLogger" else []
    more += [option.format(logs), rates, "--client.optimizer.lr=0.003", f"--baseline_dir={tmp_path}/local"]
    arguments = options(npz, f"--output={run}", f"{LIGHTNING}{name}", *more)
    assert kill("batch:50", arguments)  # in round 3
    assert main(["fit", "--resume", str(run)]) == 0
    config, metrics = content(logs)
    assert config["client/optimizer/init_args/lr"] == pytest.approx(0.003)
    rows = read_metrics_csv(run / "metrics.csv")
    assert [row["round"] for row in rows] == [1, 2, 3]
    for column in set().union(*rows):
        expected = {int(row["round"]): row[column] for row in rows if column in row}
        assert metrics.pop(column) == pytest.approx(expected, rel=1e-6, nan_ok=True), column
    assert not metrics


def records_of(run: Path, read_records: Callable[[Path, str], list[Any]], kind: str) -> list[Any]:
    (folder,) = (path for path in (run / "wandb").glob("offline-run-*") if path.is_dir())
    return read_records(folder, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    [
        {"client.optimizer.init_args.lr": 0.02, "seed": 4},
        {"client": {"optimizer": {"init_args": {"lr": 0.02}}}, "seed": 4},
    ],
    ids=["dotted", "nested"],
)
def test_sweep_run_has_the_parameters_and_all_options(
    parameters: dict[str, Any],
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    read_records: Callable[[Path, str], list[Any]],
) -> None:
    agents = pytest.importorskip("wandb.wandb_agent")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):  # set by the agent: restored
        monkeypatch.setenv(name, str(tmp_path))
    agent = agents.Agent(api=None, queue=None, sweep_id="sweep")
    run = tmp_path / "run"
    command = options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local", "--quiet", WANDB)
    agent._sweep_command = ["${env}", sys.executable, "-m", "fedekd", *command, "--rounds=1", "${args}"]
    given = {name: {"value": value} for name, value in parameters.items()}
    agent._command_run({"type": "run", "run_id": "fromagent", "program": "", "args": given})
    assert agent._run_processes["fromagent"].wait() == 0
    assert "wandb" not in capfd.readouterr().err  # no warning of names that the sweep has locked
    (record, *_) = records_of(run, read_records, "run")
    assert (record.run_id, record.sweep_id) == ("fromagent", "sweep")
    items = [*record.config.update]
    items += [item for change in records_of(run, read_records, "config") for item in change.update]
    config = {item.key: json.loads(item.value_json) for item in items if item.key}
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["client"]["optimizer"]["init_args"]["lr"] == 0.02
    assert saved.pop("logger")  # its credentials are not for other loggers
    assert "logger" not in config
    assert {name: config[name] for name in saved} == saved
    assert config.items() >= {name: value for name, value in parameters.items() if name != "client"}.items()


@pytest.mark.slow
def test_wandb_artifact_is_a_run_folder_with_metadata(
    npz: Path, tmp_path: Path, read_records: Callable[[Path, str], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    logger = [WANDB, "--logger.log_checkpoints=true", "--rounds=1"]
    assert main([*options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local"), *logger]) == 0
    (model,) = (artifact for artifact in records_of(run, read_records, "artifact") if artifact.type == "model")
    for entry in model.manifest.contents:
        (copy / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.local_path, copy / entry.path)
    assert main(["test", str(copy)]) == 0
    assert "the same as summary.json" in capsys.readouterr().out
    metadata, summary = json.loads(model.metadata), json.loads((run / "summary.json").read_text())
    assert {name: metadata[name] for name in ("method", "rounds", "mean", "delta")} == {
        name: summary[name] for name in ("method", "rounds", "mean", "delta")
    }
    assert len(metadata["data_sha256"]) == 64
    assert "round-1" in model.aliases
