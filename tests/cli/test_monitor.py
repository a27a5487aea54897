"""Command `monitor`, in this process, on tiny runs of classification and regression."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from fedekd.atomic import unseal_json
from fedekd.cli import folder_lock, main
from fedekd.cli import monitor as command
from fedekd.cli.arguments import select_client
from fedekd.configuration.trained import open_run
from fedekd.early_exit import ExitPolicy
from fedekd.methods import Client
from fedekd.monitoring import Arrivals, Followed, MonitorStart, follow
from fedekd.reporting import figures

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
RULE = ["--do_no_harm.confidence=0.5", "--do_no_harm.margin=0.4"]
RNG = np.random.default_rng(7)
LABELS = np.arange(160) % 3
IMAGES = (RNG.integers(0, 80, (160, 8, 8)) + 80 * LABELS[:, None, None]).astype(np.uint8)
save_figure = figures.save
POLICY = Path("run/exits/client-000.json")


def fit(npz: Path, output: str, *options: str, method: str = "FedeKD") -> None:
    data = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=50", "--data.batch_size=16"]
    options = (f"--method={method}", *options, *RULE, "--client.optimizer.lr=0.003", f"--output={output}")
    assert main(["fit", *FAST, *data, "--rounds=1", *options]) == 0


def predict(run: str, output: str) -> None:
    command = ["predict", run, "--client=0", "--input=images.npz", "--monitoring", f"--output={output}"]
    assert main(command) == 0


@pytest.fixture(scope="module")
def ready(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, calibrated where they classify, and predictions of new images with their targets."""
    folder = tmp_path_factory.mktemp("monitor")
    npz = write_blobs(folder / "blobs.npz", num_samples=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        np.savez("images.npz", images=IMAGES)
        fit(npz, "run", "--client.exits=2")
        fit(write_blobs(folder / "few.npz", num_samples=150), "grades", "--task=regression")
        assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0
        for run in ("run", "grades"):
            predict(run, f"{run}.csv")
            pd.read_csv(f"{run}.csv").assign(target=LABELS).to_csv(f"{run}_labelled.csv", index=False)
        patch.setattr(figures, "save", undrawn_figure)
        assert monitor("run_labelled.csv", "--state=start.monitor") == 0
        Path("start.monitor/state.json").unlink()
    return folder


def undrawn_figure(figure: object, path: Path) -> None:
    """Write no figure: one takes longer than all the rest of a call."""


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder with copies of all that."""
    shutil.copytree(ready, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(figures, "save", undrawn_figure)
    return tmp_path / "work"


def monitor(arrivals: str, *options: str, run: str = "run") -> int:
    return main(["monitor", run, "--client=0", f"--arrivals={arrivals}", *options])


def state(folder: str) -> dict[str, dict]:
    return {each["name"]: each for each in unseal_json(Path(folder, "state.json").read_bytes())["quantities"]}


def wrong(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in which every label is wrong and takes the first exit."""
    return table.assign(target=(table["label"] + 1) % 3, exit=1)


def test_monitor_labelled_arrivals_report_every_quantity(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", save_figure)
    table = pd.read_csv("run_labelled.csv").assign(set="0 1 2")
    table.loc[::16, "set"] = ((table["target"] + 1) % 3).astype(str)
    table.to_csv("a.csv", index=False)
    assert monitor("a.csv", "--coverage=0.8") == 0
    found = state("a.monitor")
    early = table["exit"] == 1
    assert early.any()
    assert found["exit 1"]["samples"] == early.sum()
    assert found["exit 1"]["observed"] == pytest.approx((table["label"] != table["target"])[early].mean())
    excess = (table["label_federated"] != table["target"]).mean() - (table["label_local"] != table["target"]).mean()
    assert found["do_no_harm"]["observed"] == pytest.approx(excess)
    assert found["coverage"]["observed"] == pytest.approx(10 / 160)
    printed = capsys.readouterr().out
    assert "alarm at evidence 30" in printed  # three quantities, confidence 0.9
    assert Path("a.monitor/evidence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arrivals", ["run_labelled.csv", "run.csv"])
def test_monitor_after_each_part_equals_one_call(here: Path, arrivals: str) -> None:
    lines = Path(arrivals).read_text().splitlines(keepends=True)
    Path("whole.csv").write_text("".join(lines))
    assert monitor("whole.csv") == 0
    shutil.copytree("whole.monitor", "parts.monitor")
    Path("parts.monitor/state.json").unlink()
    for end in (1, 2, 40, 41, 100, len(lines)):
        # An unfinished last line is left for the next call.
        Path("parts.csv").write_text("".join(lines[:end]) + "0,1,2" * (end < len(lines)))
        assert monitor("parts.csv") == 0
    for name in ("start.json", "state.json"):
        assert Path("parts.monitor", name).read_bytes() == Path("whole.monitor", name).read_bytes()


def test_monitor_killed_before_state_is_written_loses_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path("run_labelled.csv").read_text().splitlines(keepends=True)
    for name in ("a", "b"):
        shutil.copytree("start.monitor", f"{name}.monitor")
    Path("a.csv").write_text("".join(lines[:50]))
    assert monitor("a.csv") == 0
    before = Path("a.monitor/state.json").read_bytes()
    Path("a.csv").write_text("".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        assert monitor("a.csv") == 130
    assert Path("a.monitor/state.json").read_bytes() == before
    assert monitor("a.csv") == 0
    shutil.copy("a.csv", "b.csv")
    assert monitor("b.csv") == 0
    assert Path("a.monitor/state.json").read_bytes() == Path("b.monitor/state.json").read_bytes()


def test_monitor_apply_with_locked_exits_changes_no_policy(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong(pd.read_csv("run_labelled.csv")).to_csv("a.csv", index=False)
    before = POLICY.read_bytes()
    monkeypatch.setattr(folder_lock, "LOCK_SECONDS", 0.0)
    with FileLock(POLICY.parent / ".lock"):  # as in `calibrate`
        assert monitor("a.csv", "--apply") == 2
    assert "exits: locked by another call of fedekd. Repeat the command" in capsys.readouterr().err
    assert POLICY.read_bytes() == before
    assert monitor("a.csv", "--apply") == 3


def test_monitor_alarm_applies_closed_exit_and_keeps_policy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong(pd.read_csv("run_labelled.csv")).to_csv("a.csv", index=False)
    before = POLICY.read_bytes()
    assert monitor("a.csv") == 3
    assert POLICY.read_bytes() == before
    printed = capsys.readouterr().out
    assert "ALARM exit 1: evidence" in printed
    assert "Close exit 1: --apply true" in printed
    assert monitor("a.csv", "--apply") == 3
    assert monitor("a.csv", "--apply") == 0
    assert monitor("a.csv") == 0
    policy = ExitPolicy.load(POLICY)
    assert policy.thresholds[0] == math.inf
    assert policy.certified == (False, False)
    assert policy.closed[0].startswith("monitor: alarm of exit 1 after")
    assert [path.read_bytes() for path in POLICY.parent.glob("*.before-*")] == [before]
    predict("run", "closed.csv")
    closed = pd.read_csv("closed.csv").assign(target=LABELS)
    assert set(closed["exit"]) == {2}
    rows = pd.concat([wrong(pd.read_csv("run_labelled.csv"))[:80], closed[80:]])
    rows.to_csv("b.csv", index=False)
    assert rows["policy"].nunique() == 2
    shutil.copytree("start.monitor", "b.monitor")
    assert monitor("b.csv") == 0  # an alarm of the first rows, and the exit is closed
    monitor("a.csv", "--apply")
    assert "exit 1 (closed)" in capsys.readouterr().out
    assert ExitPolicy.load(POLICY) == policy
    replace(policy, thresholds=(0.5, -math.inf), search_bounds=(0.5, -math.inf), closed=()).save(POLICY)
    capsys.readouterr()
    assert monitor("a.csv") == 2
    assert "policy: expected the thresholds of the start of the monitor" in capsys.readouterr().err
    replace(policy, target_risk=0.2).save(POLICY)
    assert monitor("a.csv") == 2
    assert "policy: expected target_risk 0.3 as at the start of the monitor, got 0.2" in capsys.readouterr().err
    restored = ExitPolicy.from_json(before.decode())
    replace(restored, thresholds=(-1.0, -math.inf), search_bounds=(-1.0, -math.inf)).save(POLICY)
    predict("run", "other.csv")
    restored.save(POLICY)
    table = pd.read_csv("other.csv").assign(target=LABELS)
    assert set(table["exit"]) == {1}
    table.to_csv("other.csv", index=False)
    capsys.readouterr()
    assert monitor("other.csv", "--state=start.monitor") == 2
    assert "line 2: policy: expected the hash of the policy of the start, got" in capsys.readouterr().err


def test_monitor_regression_follows_squared_errors_and_intervals(here: Path) -> None:
    table = pd.read_csv("grades_labelled.csv")
    table = table.assign(lower=table["value"] - 9, upper=table["value"] + 9)
    table.to_csv("a.csv", index=False)
    assert monitor("a.csv", "--coverage=0.9", run="grades") == 0
    found = state("a.monitor")
    excess = (table["value_federated"] - table["target"]) ** 2 - (table["value_local"] - table["target"]) ** 2
    assert found["do_no_harm"]["observed"] == pytest.approx(excess.clip(-1, 1).mean(), rel=1e-12)
    assert found["coverage"]["observed"] == 0
    table.assign(value_federated=table["value_local"] + 5, upper=-9).to_csv("b.csv", index=False)
    assert monitor("b.csv", "--coverage=0.9", run="grades") == 3
    assert all(each["alarm_line"] for each in state("b.monitor").values())


@pytest.mark.parametrize(("run", "first"), [("run", "confidence"), ("grades", "value_last")])
def test_monitor_unlabelled_drift_has_alarm(
    here: Path, run: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(f"{run}.csv")
    table.to_csv("a.csv", index=False)
    assert monitor("a.csv", run=run) == 0
    assert list(state("a.monitor")) == [first, "disagreement"]
    table.assign(**{first: -10.0}).to_csv("b.csv", index=False)
    assert monitor("b.csv", "--apply", run=run) == 3
    assert monitor("b.csv", run=run) == (0 if run == "run" else 3)  # closed now; no policy
    assert state("b.monitor")[first]["alarm_line"] < 100
    assert f"ALARM {first}" in capsys.readouterr().out
    if run == "run":
        closed = ExitPolicy.load(POLICY)
        assert closed.thresholds[0] == math.inf
        replace(closed, closed=()).save(POLICY)  # as if no exit had been open from the start
        predict("run", "c.csv")
        pd.read_csv("c.csv").assign(confidence=-10.0).to_csv("c.csv", index=False)
        assert monitor("c.csv") == 3
        replace(closed, closed=("monitor: alarm of exit 1 after 9 arrivals, evidence 30", "")).save(POLICY)
        assert monitor("b.csv") == 3  # the exit was closed for another reason
        assert monitor("b.csv", "--apply") == 3
        assert "; monitor: alarm of confidence after" in ExitPolicy.load(POLICY).closed[0]
        assert monitor("b.csv") == 0
        predict("run", "d.csv")
        table = pd.read_csv("d.csv")
        table.assign(confidence=[0.5, *[-10.0] * (len(table) - 1)]).to_csv("d.csv", index=False)
        assert monitor("d.csv") == 3  # other evidence than that of the reason


def replaced(column: str, line: int, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({column: object})
        table.loc[line - 2, column] = value
        return table

    return change


def used_sample(table: pd.DataFrame) -> pd.DataFrame:
    used = unseal_json(Path("start.monitor/start.json").read_bytes())["used"]
    return replaced("sample", 5, used[3].upper() + "0" * 16)(table)


BAD = {
    "used": (used_sample, "line 5: sample: expected no sample of training or calibration, got"),
    "twice": (lambda table: table.iloc[[0, 1, 2, 1]], "line 5: sample: expected each sample once, got"),
    "order": (lambda table: table.assign(time=[*range(159), 3]), "line 161: time: expected times that do not decrease"),
    "dates": (lambda table: table.assign(time="2026-13-01"), "line 2: time: expected numbers, or ISO 8601"),
    "labels": (replaced("target", 9, ""), "line 9: target: expected a label, got an empty cell. Append rows when"),
    "class": (replaced("target", 9, "7"), "line 9: target: expected one of the labels 0, 1, 2, got '7'"),
    "exit": (replaced("exit", 4, 0.5), "line 4: exit: expected a number from 1 to 2, got '0.5'"),
    "exits": (replaced("exit", 4, 99), "line 4: exit: expected a number from 1 to 2, got '99'"),
    "label": (replaced("label", 4, 99), "line 4: label: expected a number from 0 to 2, got '99'"),
    "compared": (replaced("label_local", 4, 3), "line 4: label_local: expected a number from -1 to 2, got '3'"),
    "hash": (replaced("sample", 4, "x" * 32), "line 4: sample: expected at least 16 hexadecimal digits, got 'x"),
    "column": (lambda table: table.drop(columns="label_local"), "expected a column 'label_local', got image, label"),
    "policy": (
        replaced("policy", 3, "none"),
        "line 3: policy: expected the hash of the policy of the start, got 'none'",
    ),
    "model": (replaced("model", 3, "0" * 12), "line 3: model: expected '"),
    "unlabelled": (lambda table: table.drop(columns="target"), "--arrivals: expected a column target as at the start"),
}


@pytest.mark.parametrize("case", BAD)
def test_monitor_invalid_arrivals_print_one_line(here: Path, case: str, error_line: Callable[[], str]) -> None:
    change, message = BAD[case]
    change(pd.read_csv("run_labelled.csv")).to_csv("a.csv", index=False)
    assert monitor("a.csv", "--state=start.monitor") == 2
    assert message in error_line()
    assert not Path("start.monitor/state.json").exists()


def test_monitor_changed_file_or_settings_print_one_line(here: Path, error_line: Callable[[], str]) -> None:
    content = Path("run_labelled.csv").read_text()
    Path("a.csv").write_text(content)
    shutil.copytree("start.monitor", "a.monitor")
    assert monitor("a.csv") == 0
    for text, message in (
        ("".join(content.splitlines(keepends=True)[:-1]), "a.csv: expected at least the"),
        (content.replace(",2,", ",1,", 1), "of the last call, got others. Restore the file"),
        ("", "expected a line with the names of columns"),
    ):
        Path("a.csv").write_text(text)
        assert monitor("a.csv") == 2
        assert message in error_line()
    Path("a.csv").write_text(content)
    for options, message in (
        (["--confidence=0.8"], "--confidence: expected 0.9 as at the start, got 0.8"),
        (["--coverage=0.8"], "--coverage: expected None as at the start"),
        (["--client=1"], "--client: expected 0 as at the start, got '1'"),
        (["--coverage=2"], "--coverage: expected a number in (0, 1), got 2.0"),
        (["--arrivals=."], "expected a CSV file, got '.'"),
        (["--arrivals=none.csv"], "expected a CSV file, got 'none.csv', which does not exist"),
        (["--arrivals=run"], "expected a CSV file, got 'run', which is a folder"),
        (["--state="], "--state: expected a folder, got ''. Omit it"),
        (["--state=a.csv"], "--state: expected a folder, got the file a.csv"),
    ):
        assert monitor("a.csv", *options) == 2
        assert message in error_line()
    for folder, message in (("grades", "got grades, another one"), ("gone", "got gone, which has no training")):
        assert monitor("a.csv", run=folder) == 2
        assert f"RUN: expected the training of the start of the monitor, {message}" in error_line()
    other = ExitPolicy.load(Path("run/exits/client-001.json"))
    other.save(POLICY)
    assert monitor("a.csv") == 2
    assert "policy: expected that of the monitored network" in error_line()
    Path("a.monitor/start.json").write_text("{}")
    assert monitor("a.csv") == 2
    assert "expected the start of a monitor, got invalid content" in error_line()


def test_monitor_samples_of_calibrate_input_are_refused(
    here: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez("more.npz", images=IMAGES, labels=LABELS)
    options = ["--target_risk=0.3", "--confidence=0.7", "--client=0"]
    assert main(["calibrate", "run", "--input=more.npz", *options]) == 0
    predict("run", "a.csv")
    pd.read_csv("a.csv").assign(target=LABELS).to_csv("a.csv", index=False)
    assert monitor("a.csv") == 2
    assert "line 2: sample: expected no sample of training or calibration" in error_line()
    assert not Path("a.monitor").exists()
    with monkeypatch.context() as patch:  # the old policy stays, and with it the hashes of its samples
        patch.setattr(ExitPolicy, "save", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["calibrate", "run", *options]) == 130
    assert Path("run/exits/client-000.samples").exists()
    assert main(["calibrate", "run", *options]) == 0
    assert not Path("run/exits/client-000.samples").exists()


@pytest.mark.parametrize(("options", "expected"), [(["--input=more.npz"], 0), ([], 3)])
def test_monitor_drift_is_relative_to_the_samples_of_the_calibration(
    here: Path, options: list[str], expected: int
) -> None:
    others = IMAGES % 16  # dark: of high confidence
    np.savez("more.npz", images=others[:80], labels=LABELS[:80])
    np.savez("images.npz", images=others[80:])
    assert main(["calibrate", "run", "--target_risk=0.5", "--confidence=0.7", "--client=0", *options]) == 0
    predict("run", "a.csv")
    assert monitor("a.csv") == expected


def test_monitor_method_trained_on_validation_has_no_reference(
    here: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    def trained_on_validation(*arguments: object) -> Client:
        client = select_client(*arguments)
        client.training_splits = ("train", "validation")
        return client

    monkeypatch.setattr(command, "select_client", trained_on_validation)
    assert monitor("run.csv") == 2
    message = error_line()
    assert "expected a method that does not train on validation samples" in message
    assert message.strip().endswith("Follow arrivals with a column target")


def test_monitor_overtaken_call_keeps_the_longer_state(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path("run_labelled.csv").read_text().splitlines(keepends=True)
    Path("a.csv").write_text("".join(lines[:50]))

    def overtaken(start: MonitorStart, arrivals: Arrivals) -> list[Followed]:
        monkeypatch.setattr(command, "follow", follow)
        Path("a.csv").write_text("".join(lines))
        assert monitor("a.csv") == 0
        return follow(start, arrivals)

    shutil.copytree("start.monitor", "a.monitor")
    monkeypatch.setattr(command, "follow", overtaken)
    assert monitor("a.csv") == 0
    assert unseal_json(Path("a.monitor/state.json").read_bytes())["consumed"]["rows"] == 160


def test_monitor_overtaken_first_call_with_other_settings_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    def overtaken(start: MonitorStart, arrivals: Arrivals) -> list[Followed]:
        replace(start, confidence=0.8).save(Path("a.monitor/start.json"))
        return follow(start, arrivals)

    shutil.copy("run_labelled.csv", "a.csv")
    Path("a.monitor").mkdir()
    monkeypatch.setattr(command, "follow", overtaken)
    assert monitor("a.csv") == 2
    assert "--state: expected the settings of this call, got others of another call" in error_line()


def test_predict_monitoring_trains_missing_local_model_with_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs/local")
    expected = pd.read_csv("grades.csv")["value_local"]
    predict("grades", "again.csv")
    assert "warning: the local model of client 0 is trained again: runs/local does not" in capsys.readouterr().err
    assert not Path("runs/local").exists()
    assert pd.read_csv("again.csv")["value_local"].equals(expected)


def test_predict_monitoring_of_a_fine_tuned_model_has_the_local_model_of_the_comparison(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(here / "blobs.npz", "tuned", "--method.finetune_epochs=2", method="FedAvg")
    trained = open_run("test", Path("tuned"))
    assert trained.local_rounds == {0: 1, 1: 1}  # fine-tuning has no counterpart in the local baseline
    predict("tuned", "tuned.csv")
    assert "trained again" not in capsys.readouterr().err
