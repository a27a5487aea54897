"""Calibration per group of a column, per class and with patients, and its use by `predict` and `export`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedekd.cli import calibrate as calibrate_command
from fedekd.cli import export, main
from fedekd.configuration.trained import open_trained
from fedekd.data.raw import ReadOptions
from fedekd.early_exit import ExitPolicy

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]


@pytest.fixture(scope="module")
def ready(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the arrays scanner and patient, two images each, and a finished run of one client."""
    folder = tmp_path_factory.mktemp("groups")
    plain = write_blobs(folder / "plain.npz", num_samples=900)
    with np.load(plain) as file:
        arrays = dict(file)
    for split in ("train", "val", "test"):
        count = len(arrays.get(f"{split}_labels", ()))
        if count:
            arrays[f"{split}_scanner"] = np.where(np.arange(count) % 4 > 0, "A", "B")
            arrays[f"{split}_patient"] = np.asarray([f"{split} {index // 2}" for index in range(count)])
    np.savez(folder / "blobs.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        data = ["--data.dataset=blobs.npz", "--data.num_clients=1", "--data.fractions=[0.3,0.6,0.1]"]
        options = ["--method=SafeKD", "--client.exits=2", "--data.group_column=patient", "--rounds=2"]
        assert main(["fit", *FAST, *data, *options, "--output=run", "--client.optimizer.lr=0.002"]) == 0
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ready / "run", tmp_path / "run")
    shutil.copy(ready / "blobs.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RISK = ["--target_risk=0.6", "--confidence=0.8"]


def calibrate(*options: str) -> ExitPolicy:
    assert main(["calibrate", "run", *RISK, *options]) == 0
    return ExitPolicy.load(Path("run/exits/client-000.json"))


def exits_of(*options: str) -> list[dict[str, str]]:
    assert main(["predict", "run", *options]) == 0
    with Path("predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_calibrate_patients_draws_one_sample_of_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = calibrate()
    assert policy.unit == "patient"
    with np.load("blobs.npz") as file:
        patients = sum(len(set(file[name].tolist())) for name in file.files if name.endswith("_patient"))
    assert policy.samples <= patients * 0.25
    assert policy.tuning_samples > policy.samples * 1.5
    printed = " ".join(capsys.readouterr().out.split())
    assert f"over the draw of {policy.samples} calibration samples, one per patient" in printed
    assert "Population: a random sample of a random patient" in printed
    assert "-0.0%" not in printed


def test_column_groups_are_read_by_predict_and_named_for_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = calibrate("--groups=scanner")
    assert [group.name for group in policy.groups] == ["A", "B"]
    assert policy.needs_group
    printed = " ".join(capsys.readouterr().out.split())
    assert "groups of scanner" in printed
    assert "a sample without a value of scanner, or with another one, takes the last exit" in printed
    is_open = {group.name: group.thresholds[0] < np.inf for group in policy.groups}
    assert is_open["A"]

    rows = exits_of("--input=blobs.npz")
    with np.load("blobs.npz") as file:
        names = [name for name in ("train_scanner", "val_scanner", "test_scanner") if name in file]
        scanner = np.concatenate([file[name] for name in names])
        images = np.concatenate([file[name.replace("scanner", "images")] for name in names])
    assert len(rows) == len(scanner)
    capsys.readouterr()
    for name in ("A", "B"):
        np.savez("group.npz", images=images[scanner == name])
        named = exits_of("--input=group.npz", f"--group={name}")
        own = zip([row for row, group in zip(rows, scanner, strict=True) if group == name], named, strict=True)
        # A threshold is the score of a sample, which the size of a batch may round to either side.
        assert sum(row["exit"] != other["exit"] for row, other in own) <= 1
    assert "warning" not in capsys.readouterr().err

    np.savez("new.npz", images=images[:4], scanner=np.asarray(["A", "C", "", "C"]))
    assert {row["exit"] for row in exits_of("--input=new.npz")[1:]} == {"2"}
    assert "3 of 4 samples have a value of 'scanner' that the exit policy does not have ('C', none)" in (
        capsys.readouterr().err
    )
    for scanners, count in ((["A", "B", "A", "A"], "1 of 4 have another one ('B')"), (["", "A", "A", "A"], "(none)")):
        np.savez("other.npz", images=images[:4], scanner=np.asarray(scanners))
        assert main(["predict", "run", "--input=other.npz", "--group=A"]) == 2
        assert count in capsys.readouterr().err
    np.savez("none.npz", images=images[:4])
    assert {row["exit"] for row in exits_of("--input=none.npz")} == {"2"}
    assert "expected a column 'scanner'" in capsys.readouterr().err

    assert main(["export", "run", "--format", "torch", "--output=export", "--group=A"]) == 0
    card = json.loads(Path("export/model_card.json").read_text())
    assert "with scanner A" in card["guarantee"]["statement"]
    assert card["guarantee"]["statement"] in Path("export/model_card.md").read_text()
    assert card["guarantee"]["exits"][0]["threshold"] == policy.groups[0].thresholds[0]
    capsys.readouterr()
    trained = open_trained("export", "run", None)
    assert not export._facts(trained, trained.clients[0], "", None).policy.for_group("A").needs_group
    assert "takes the last exit. Export one model per group: A" in capsys.readouterr().err


def test_policy_without_unit_of_grouped_data_warns_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = calibrate()
    replace(policy, unit="").save(Path("run/exits/client-000.json"))
    capsys.readouterr()
    exits_of("--input=blobs.npz")
    assert capsys.readouterr().err.count("guarantee is not valid for them; run again: calibrate run") == 1
    assert main(["export", "run", "--format", "torch", "--output=export"]) == 0
    assert capsys.readouterr().err.count("guarantee is not valid for them; run again: calibrate run") == 1
    statement = json.loads(Path("export/model_card.json").read_text())["guarantee"]["statement"]
    assert "Not valid: samples of one group, such as a patient, were counted as independent" in statement
    assert "are independent draws" not in statement


def test_class_groups_are_known_to_predict_or_share_thresholds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = calibrate("--groups=true_class")
    assert policy.shared_thresholds
    assert len({group.thresholds for group in policy.groups}) == 1
    assert "shared thresholds" in " ".join(capsys.readouterr().out.split())
    policy = calibrate("--groups=scanner", "--shared_thresholds")
    with np.load("blobs.npz") as file:
        np.savez("new.npz", images=file["test_images"][:4], scanner=np.asarray(["A", "C", "", "C"]))
    capsys.readouterr()
    exits_of("--input=new.npz")
    assert "3 of 4 samples have a value of 'scanner' that the exit policy does not have ('C', none) and can exit" in (
        capsys.readouterr().err
    )
    policy = calibrate("--groups=predicted_class")
    assert not policy.needs_group
    assert policy.is_certified
    assert "that the exit predicts as a class, for each class" in " ".join(capsys.readouterr().out.split())
    for row in exits_of("--input=blobs.npz"):
        limit = policy.groups[int(row["label"])].thresholds[0]
        assert row["exit"] == "2" or float(row["score"]) >= limit - 1e-6
    rows = {row["exit"] for row in exits_of("--input=blobs.npz")}
    assert "1" in rows


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("calibrate run --groups scaner", "--groups: expected an array"),
        ("calibrate run --groups labels", "'labels', whose values are the classes. Use --groups true_class"),
        ("calibrate run --groups patient", "--groups: expected a column with at most 100 values"),
        ("calibrate run --groups scanner --mode empirical", "--mode: expected ltt with --groups, got empirical"),
        ("calibrate run --shared_thresholds", "--shared_thresholds: expected --groups, got none"),
        ("predict run --input blobs.npz --group A", "--group: expected none, because"),
        ("export run --format safetensors --group A", "--group: expected none, because"),
    ],
)
def test_invalid_groups_print_one_line(here: Path, error_line: Callable[[], str], command: str, words: str) -> None:
    assert main(command.split()) == 2
    assert words in error_line()
    assert not Path("run/exits").exists()


@pytest.mark.parametrize(
    ("patients", "words"),
    [
        (None, "got 'patient'. Add it: images of one group, such as a patient, are not independent"),
        (["", *"abcdefg"], "got none in row 1 (1 in all). Add it"),
        (["train 0 ", *"abcdefg"], "got 1 groups of training or selection"),
    ],
    ids=["no column", "missing value", "patient of training"],
)
def test_calibrate_input_patients_must_be_known_and_unseen(
    here: Path, error_line: Callable[[], str], patients: list[str] | None, words: str
) -> None:
    trained = open_trained("calibrate", "run", None)
    [client] = trained.clients
    names = {trained.data.samples.group_names[number] for number in client.samples.group[client.splits.train].tolist()}
    arrays = {"images": np.random.default_rng(0).integers(0, 255, (8, 8, 8), np.uint8), "labels": np.arange(8) % 3}
    if patients is not None:
        arrays["patient"] = np.asarray([f"{min(names)} " if name.startswith("train") else name for name in patients])
    np.savez("more.npz", **arrays)
    assert main(["calibrate", "run", "--input=more.npz"]) == 2
    assert words in error_line()
    assert not Path("run/exits").exists()


def test_source_of_data_with_groups_without_an_option_reads_their_attribute(ready: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ready)
        samples = open_trained("calibrate", "run", None).clients[0].samples
    assert calibrate_command._source("new.npz", samples, ReadOptions())["group_column"] == "groups"
    assert calibrate_command._source("new.npz", replace(samples, group=None), ReadOptions())["group_column"] is None


def test_predict_unknown_group_prints_the_known_ones(here: Path, error_line: Callable[[], str]) -> None:
    calibrate("--groups=scanner")
    assert main(["predict", "run", "--input=blobs.npz", "--group=C"]) == 2
    assert "--group: expected one of A, B, got 'C'" in error_line().replace(" and ", ", ")


def test_monitor_follows_exits_over_all_groups(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = calibrate("--groups=scanner")
    assert policy.open_exits == (True,)
    with np.load("blobs.npz") as file:
        arrays = dict(file)
    np.savez("new.npz", images=arrays["test_images"] ^ 1, scanner=arrays["test_scanner"])
    assert main(["predict", "run", "--input=new.npz", "--monitoring", "--output=new.csv"]) == 0
    table = pd.read_csv("new.csv")
    table.assign(target=(table["label"] + 1) % 3).to_csv("wrong.csv", index=False)
    assert main(["monitor", "run", "--arrivals=wrong.csv", "--apply"]) == 3
    printed = capsys.readouterr()
    assert "append one row per group" in printed.err
    assert "ALARM exit 1" in printed.out
    closed = ExitPolicy.load(Path("run/exits/client-000.json"))
    assert closed.open_exits == (False,)
    assert [group.search_bounds for group in closed.groups] == [group.search_bounds for group in policy.groups]
