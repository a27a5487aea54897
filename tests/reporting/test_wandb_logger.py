"""Files of offline W&B runs that are stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from fedekd.errors import UserError
from fedekd.reporting import Tracker

wandb = pytest.importorskip("wandb")

from fedekd.reporting.wandb_logger import WandbRunLogger  # noqa: E402
from fedekd.reporting.wandb_media import HISTOGRAM_BINS, client_table, delta_histogram  # noqa: E402
from fedekd.reporting.wandb_report import log_report  # noqa: E402
from fedekd.reporting.wandb_start import choose_mode, is_logged_in, own_run_id  # noqa: E402

KILLED_RUN = """
import os, signal, sys, time
from fedekd.reporting import Tracker
from fedekd.reporting.wandb_logger import WandbRunLogger

tracker = Tracker([WandbRunLogger(offline=True)], sys.argv[1])
tracker.log_config({"seed": 0})
tracker.log_round({"round": 1, "delta/avg": 0.25})
tracker.log_round({"round": 2, "delta/avg": 0.5})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    if wandb.run is not None:
        wandb.run.finish()


def start(run_dir: Path, **arguments) -> Tracker:
    return Tracker([WandbRunLogger(offline=True, **arguments)], run_dir)


@pytest.mark.slow
def test_offline_run_has_each_round_once_with_all_names(
    tmp_path, make_row, make_summary, run_folders, read_history, read_records, capfd
):
    rows = [make_row(round_idx) for round_idx in (1, 2, 3)]
    tracker = start(tmp_path, group="g", tags=["t"], name="n")
    tracker.log_config({"seed": 3, "method": {"beta": 1.0}})
    for row in rows:
        tracker.log_round(row)
    tracker.log_summary(make_summary((0.5, 0.75), (0.5, 0.25)))
    tracker.close()

    assert capfd.readouterr() == ("", "")
    (folder,) = run_folders(tmp_path)
    assert [row for row in read_history(folder) if "round" in row] == rows
    run = read_records(folder, "run")[0]
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("fedekd", "g", "federation", "n")
    config = {item.key: item.value_json for record in read_records(folder, "config") for item in record.update}
    assert config["seed"] == "3"
    assert json.loads(config["method"]) == {"beta": 1.0}
    (metric,) = [metric for metric in read_records(folder, "metric") if metric.glob_name == "*"]
    assert metric.step_metric == "round"
    assert not metric.summary.last  # else a sweep would find {"last": x} instead of the value


def test_summary_has_flat_metric_names(tmp_path, make_row, make_summary):
    tracker = start(tmp_path)
    tracker.log_round(make_row(1))
    tracker.log_summary(make_summary((0.5, 0.75), (0.5, 0.25)))
    summary = tracker.loggers[0].experiment.summary
    assert summary["delta/worst"] == -0.25
    assert summary["delta/p10"] == -0.125
    assert summary["accuracy/local_mean"] == 0.5
    assert summary["bytes_down"] == 2048
    assert summary["clients"]["nrows"] == 2
    tracker.close()


def test_sites_have_their_names_in_rows_table_and_chart(
    tmp_path, make_row, make_summary, run_folders, read_history, read_records
):
    names = ["Zürich (CH) no. 1", "St. Gallen"]
    row = {"round": 1, **{f"client_{name}/delta": 0.5 for name in names}}
    summary = make_summary((0.5, 0.75), (0.5, 0.25))
    for client, name in zip(summary["clients"], names, strict=True):
        client["name"] = name
    tracker = start(tmp_path)
    tracker.log_round(row)
    tracker.log_summary(summary)
    table = tracker.loggers[0].experiment.summary["clients"]
    tracker.close()
    [folder] = run_folders(tmp_path)
    logged, media = read_history(folder)
    assert row.items() <= logged.items()
    assert media["clients/path"] == media["delta/by_client_table/path"] == table["path"]
    content = json.loads((folder / "files" / table["path"]).read_text(encoding="utf-8"))
    assert [line[content["columns"].index("name")] for line in content["data"]] == names
    items = [item for record in read_records(folder, "config") for item in record.update]
    [chart] = [json.loads(item.value_json)["panel_config"] for item in items if "visualize" in item.nested_key]
    assert chart["fieldSettings"] == {"label": "name", "value": "delta"}


def test_client_table_has_every_value_of_the_summary(make_summary):
    summary = make_summary((0.5, 0.75), (0.5, 0.25)) | {"class_names": [f"class {label}" for label in range(6)]}
    undefined, defined = summary["clients"]
    undefined |= {"score": None, "delta": None, "metrics": {"recall/1": dict.fromkeys(("score", "local", "delta"))}}
    defined |= {"metrics": {"recall/1": {"score": 1.0, "local": 0.75, "delta": 0.25}}, "deployed": "local"}
    table = client_table(summary)
    rows = [dict(zip(table.columns, line, strict=True)) for line in table.data]
    assert rows[0] == {
        **{"client": 0, "train": 100, "test": 30, "classes": "class 0, class 1, class 2, class 4", "local": 0.5},
        **{"score": None, "delta": None, "recall/1": None, "recall/1/local": None, "recall/1/delta": None},
        "deployed": None,
    }
    assert rows[1]["recall/1/delta"] == 0.25
    assert rows[1]["deployed"] == "local"


def test_client_table_has_one_p_value_per_candidate(make_summary):
    summary = make_summary((0.5, 0.75), (0.5, 0.25))
    results = {"tuned": {"p_value": 0.3, "gain": 0.01}, "ensemble": "not tested"}
    for client in summary["clients"]:
        client["candidates"] = results
    table = client_table(summary)
    row = dict(zip(table.columns, table.data[0], strict=True))
    assert (row["tuned/p_value"], row["ensemble/p_value"]) == (0.3, None)
    assert "candidates" not in row


def test_rows_have_the_histogram_of_delta(tmp_path, run_folders, read_history):
    deltas = (-0.25, 0.5, 0.5, float("nan"), float("inf"))
    row = {f"client_{number}/delta": delta for number, delta in enumerate(deltas)}
    tracker = start(tmp_path, log_clients=False)
    tracker.log_round({"round": 1, "delta/avg": 0.25, **row})
    tracker.log_round({"round": 2, "client_0/delta": float("nan")})
    tracker.close()
    (folder,) = run_folders(tmp_path)
    first, second = read_history(folder)
    counts, edges = first.pop("delta/histogram/values"), first.pop("delta/histogram/bins")
    assert (edges[0], edges[-1], len(counts)) == (-0.25, 0.5, HISTOGRAM_BINS)
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 3)  # finite values only
    assert first == {"round": 1, "delta/avg": 0.25, "delta/histogram/_type": "histogram"}  # log_clients
    assert second == {"round": 2}


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ((0.8 - 0.7, 0.9 - 0.8), HISTOGRAM_BINS),  # they differ in the last bits
        ((1e308, -1e308), HISTOGRAM_BINS),  # their difference is infinite
        ((0.25,), HISTOGRAM_BINS),
        ((1e300, 1e300), 1),
    ],
)
def test_delta_histogram_of_any_finite_values_counts_all(values, bins):
    histogram = delta_histogram({"round": 1, **{f"client_{index}/delta": value for index, value in enumerate(values)}})
    assert (len(histogram.histogram), sum(histogram.histogram)) == (bins, len(values))
    assert histogram.bins[0] <= min(values) <= max(values) <= histogram.bins[-1]


def test_resume_has_each_round_once(tmp_path, make_row, run_folders, read_history):
    tracker = start(tmp_path)
    tracker.replay([make_row(1), make_row(2)])
    tracker.close("interrupted")
    tracker = start(tmp_path)
    tracker.replay([make_row(1)])  # the checkpoint is a round behind
    tracker.log_round(make_row(2))
    tracker.log_round(make_row(3))
    tracker.close()
    (folder,) = run_folders(tmp_path)
    assert read_history(folder) == [make_row(round_idx) for round_idx in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.4])
def test_resume_after_a_kill_has_each_round_once(tmp_path, make_row, run_folders, read_history, pause):
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, str(tmp_path), str(pause)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert killed.stdout == killed.stderr == b""  # W&B is silent
    (before,) = run_folders(tmp_path)

    # The checkpoint is a round behind the logger: round 2 is run again.
    tracker = start(tmp_path)
    tracker.replay([make_row(1)])
    tracker.log_round(make_row(2))
    tracker.log_round(make_row(3))
    tracker.close()

    (after,) = run_folders(tmp_path)
    assert read_history(after) == [make_row(round_idx) for round_idx in (1, 2, 3)]
    assert before.name.rpartition("-")[2] == after.name.rpartition("-")[2]  # the same run id


def test_resume_keeps_other_runs(tmp_path, make_row, run_folders):
    shared_dir = tmp_path / "shared"
    for name in ("a", "b", "b"):
        tracker = Tracker([WandbRunLogger(offline=True, save_dir=shared_dir)], tmp_path / name)
        tracker.replay([make_row(1)])
        tracker.close()
    ids = [(tmp_path / name / "wandb" / "run-id").read_text().strip() for name in ("a", "b")]
    assert ids[0] != ids[1]
    assert sorted(folder.name.rpartition("-")[2] for folder in run_folders(shared_dir)) == sorted(ids)


def test_log_checkpoints_decides_on_the_artifact(tmp_path, make_row, run_folders, read_records):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "server.pt").write_bytes(b"weights")
    for name in ("config.yaml", "other.txt"):
        (run / name).write_text("seed: 0")
    names, metadata = ("config.yaml", "figures", "checkpoints"), {"rounds": 5, "delta": {"avg": 0.25}}
    calls = []
    for name, wanted in (("without", False), ("with", True)):
        tracker = start(tmp_path / name, log_checkpoints=wanted)
        tracker.log_round(make_row(1))
        tracker.log_artifacts(run, names, lambda: calls.append(0) or metadata)
        assert len(calls) == wanted  # metadata digest all data
        tracker.close()
        (folder,) = run_folders(tmp_path / name)
        models = [artifact for artifact in read_records(folder, "artifact") if artifact.type == "model"]
        assert len(models) == wanted
    [model] = models
    assert model.name == f"model-{folder.name.rpartition('-')[2]}"
    assert sorted(entry.path for entry in model.manifest.contents) == ["checkpoints/server.pt", "config.yaml"]
    assert sorted(model.aliases) == ["latest", "round-5"]
    assert json.loads(model.metadata) == metadata


def test_active_run_is_used_and_stays_open(tmp_path, make_row):
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off")) as run:
        run.log({"mine": 1.0}, step=40)
        tracker = start(tmp_path / "run")
        tracker.log_round(make_row(1))
        tracker.close()
        assert wandb.run is run
        assert run.summary["delta/avg"] == make_row(1)["delta/avg"]
        assert not (tmp_path / "run" / "wandb").exists()


class FakeRun:
    """Resumed online run, whose summary may be older than its rows."""

    def __init__(self, summary, step):
        self.resumed, self.offline, self.logged = True, False, []
        self.url = "https://wandb.example.org/team/project/runs/x"
        self.summary, self.step = summary, step

    def define_metric(self, *_, **__): ...

    def log(self, metrics, step, commit):
        assert commit
        self.logged.append((step, metrics["round"]))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.mark.parametrize(("summary", "step"), [({"round": 2}, 3), ({"round": 1}, 3), ({"round": 2}, 0)])
def test_online_resume_logs_only_missing_rounds(tmp_path, make_row, monkeypatch, summary, step):
    run, given = FakeRun(summary, step), {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: given.update(arguments) or run)
    monkeypatch.setattr(requests, "head", lambda url, timeout: None)
    tracker = Tracker([WandbRunLogger(offline=False)], tmp_path)
    tracker.replay([make_row(1)])
    for round_idx in (2, 3, 4):
        tracker.log_round(make_row(round_idx))
    tracker.close("failed")
    tracker.close("success")
    assert run.logged == [(3, 3), (4, 4)]
    assert tracker.urls() == [run.url]
    assert (tmp_path / "wandb" / "url").read_text() == f"{run.url}\n"
    assert run.exit_code == 1
    assert (given["mode"], given["resume"], given["project"]) == ("online", "allow", "fedekd")
    assert given["id"] == (tmp_path / "wandb" / "run-id").read_text().strip()


def test_sweep_agent_sets_project_and_id(tmp_path, make_row, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "agent")
    run, given = FakeRun({}, 0), {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: given.update(arguments) or run)
    Tracker([WandbRunLogger()], tmp_path).log_round(make_row(1))
    assert not {"id", "project"} & set(given)
    assert (tmp_path / "wandb" / "run-id").read_text() == "agent\n"  # for a resume without the agent


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../up", b"a b", b"x" * 200])
def test_run_id_damaged_is_drawn_again(tmp_path, content):
    run_id = own_run_id(tmp_path)
    assert own_run_id(tmp_path) == run_id
    (tmp_path / "wandb" / "run-id").write_bytes(content)
    again = own_run_id(tmp_path)
    assert again != run_id
    assert own_run_id(tmp_path) == again


@pytest.mark.parametrize("problem", ["no network", "no login", "old key"])
def test_run_that_cannot_be_online_is_offline_with_a_warning(tmp_path, make_row, monkeypatch, problem):
    modes, warned = [], []

    def head(url, timeout):
        assert timeout <= 5
        if problem == "no network":
            raise requests.ConnectionError("no network", request=requests.Request("HEAD", url))

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise {"no login": wandb.errors.UsageError, "old key": wandb.errors.CommError}[problem](problem)
        return FakeRun({}, 0)

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(wandb, "init", init)
    tracker = Tracker([WandbRunLogger(offline=False)], tmp_path, warned.append)
    tracker.replay([make_row(1)])
    assert modes == (["offline"] if problem == "no network" else ["online", "offline"])
    assert len(warned) == 1
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*`" in warned[0]
    assert ("no answer" if problem == "no network" else problem) in warned[0]


@pytest.mark.parametrize(
    ("arguments", "environment"), [({"project": "a/b"}, {}), ({"tags": [70 * "x"]}, {}), ({}, {"WANDB_MODE": "foo"})]
)
def test_invalid_option_raises_user_error_before_training(tmp_path, monkeypatch, arguments, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"^(logger: expected options that W&B accepts|WANDB_MODE: expected one of)"
    ) as raised:
        Tracker([WandbRunLogger(**arguments)], tmp_path).replay([])
    assert "\n" not in str(raised.value)


def test_unwritable_home_is_one_warning(tmp_path, make_row, make_summary, monkeypatch, capfd):
    wandb.teardown()  # the service of an earlier test has found its folders
    (tmp_path / "file").touch()
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # root may write anywhere, but not below a file
    warned = []
    tracker = Tracker([WandbRunLogger()], tmp_path / "run", warned.append)
    tracker.log_config({"seed": 0})
    tracker.replay([make_row(1)])
    tracker.log_summary(make_summary((0.5, 0.75)))
    tracker.close()
    [line] = warned
    assert "set WANDB_CACHE_DIR to another folder" in line
    assert capfd.readouterr() == ("", "")


def test_two_loggers_at_once_have_a_run_each(tmp_path, make_row, run_folders, read_history):
    trackers = [start(tmp_path / name) for name in ("a", "b")]
    for round_idx, tracker in ((1, trackers[0]), (1, trackers[1]), (2, trackers[1])):
        tracker.log_round(make_row(round_idx))
    trackers[0].close()
    trackers[1].log_round(make_row(3))
    trackers[1].close()
    for name, rounds in (("a", (1,)), ("b", (1, 2, 3))):
        (folder,) = run_folders(tmp_path / name)
        assert read_history(folder) == [make_row(round_idx) for round_idx in rounds]


def test_mode_prefers_wandb_mode_then_argument_then_credentials(monkeypatch, tmp_path):
    monkeypatch.setattr(
        wandb,
        "setup",
        lambda: SimpleNamespace(settings=SimpleNamespace(base_url="https://wandb.example.org", mode="shared")),
    )
    assert (choose_mode(None), choose_mode(True), choose_mode(False)) == ("offline", "offline", "online")
    (tmp_path / "netrc").write_text("machine other.example.org login user password x\n")
    assert not is_logged_in()
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password x\n")
    assert is_logged_in()
    assert choose_mode(None) == "shared"  # the settings of W&B decide
    (tmp_path / "netrc").write_text("not a netrc file")
    assert choose_mode(None) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert choose_mode(None) == "shared"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (choose_mode(None), choose_mode(False)) == ("disabled", "disabled")


def test_disabled_mode_writes_no_file(tmp_path, make_row, make_summary, monkeypatch, run_folders):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker([WandbRunLogger()], tmp_path)
    tracker.log_config({"seed": 0})
    tracker.replay([make_row(1)])
    tracker.log_summary(make_summary((0.5, 0.75)))
    tracker.close()
    assert run_folders(tmp_path) == []


class FakeReportRun(FakeRun):
    """Resumed online run of a report."""

    def log_artifact(self, artifact, aliases):
        self.artifact, self.aliases = artifact, aliases

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.exit_code = 0


def report_folder(run_dir: Path, logger: str) -> Path:
    (run_dir / "report").mkdir(parents=True)
    (run_dir / "report" / "index.html").write_text("<p>Δ</p>", encoding="utf-8")
    (run_dir / "config.yaml").write_text(f"logger:\n- class_path: {logger}\n  init_args: {{project: p, entity: e}}\n")
    return run_dir / "report"


@pytest.mark.parametrize("has_url", [False, True])
def test_report_is_logged_to_the_run_of_its_folder(tmp_path, monkeypatch, has_url):
    report = report_folder(tmp_path, "fedekd.reporting.wandb_logger.WandbRunLogger")
    run_id = own_run_id(tmp_path)
    if has_url:
        (tmp_path / "wandb" / "url").write_text("https://wandb.example.org/team/my%20project/runs/x\n")
    run, given = FakeReportRun({}, 4), {}
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(requests, "head", lambda url, timeout: None)
    monkeypatch.setattr(wandb, "init", lambda **arguments: given.update(arguments) or run)
    assert log_report(tmp_path, report) == run.url
    assert (given["id"], given["resume"]) == (run_id, "must")
    assert (given["entity"], given["project"]) == (("team", "my project") if has_url else ("e", "p"))
    assert (run.artifact.name, run.artifact.type, run.aliases) == (f"report-{run_id}", "report", ["latest"])
    assert [*run.artifact.manifest.entries] == ["index.html"]
    assert "<p>Δ</p>" in run.logged[0]["report"].html


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("no run", "that W&B has logged"),
        ("offline", "a W&B server"),
        ("settings", "a W&B server"),
        ("offline run", "an offline run"),
        ("unknown", "wandb sync .*offline-run"),
    ],
)
def test_report_that_cannot_be_logged_is_one_line(tmp_path, monkeypatch, problem, words):
    report = report_folder(tmp_path, "fedekd.reporting.wandb_logger.WandbRunLogger")
    if problem != "no run":
        own_run_id(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline" if problem == "offline" else "online")
    if problem == "settings":  # as `wandb offline` writes them
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_API_KEY", "x")
        settings = SimpleNamespace(base_url="https://wandb.example.org", mode="offline")
        monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setattr(requests, "head", lambda url, timeout: None)

    def init(**_):
        if problem == "unknown":
            raise wandb.errors.UsageError("no such run")
        run = FakeReportRun({}, 4)
        run.offline = True
        return run

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=words) as raised:
        log_report(tmp_path, report)
    assert "\n" not in str(raised.value)
