"""Lookup of configurations, and the shipped ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedekd.cli import main
from fedekd.configuration.configs import config_folders, find_config
from fedekd.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in ("benchmark", "sweeps")
)


def printed_config(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options, "--print_config"])
    assert ended.value.code == 0
    config: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_option_before_the_configuration_is_applied(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--seed", "7", "--config", "digits.yaml", "--method.beta", "2")
    assert config["seed"] == 7
    assert config["method"]["init_args"]["beta"] == 2.0  # type: ignore[index]


def test_later_configuration_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text("rounds: 9\ndata:\n  alpha: 0.5\n")
    config = printed_config(capsys, "--config", "digits.yaml", "--config", "more.yaml")
    assert config["rounds"] == 9
    assert (config["data"]["alpha"], config["data"]["dataset"]) == (0.5, "digits")  # type: ignore[index]


def test_find_config_own_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("digits.yaml").name == "digits.yaml"
    Path("configs").mkdir()
    Path("configs/digits.yaml").write_text("rounds: 1\n")
    assert find_config("digits.yaml").resolve() == (tmp_path / "configs/digits.yaml").resolve()
    assert config_folders()[0] == Path("configs")


def test_find_config_installed_package_ignores_other_packages_and_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/theirs.yaml", "fedekd/configs/ours.yaml", "fedekd/configs/sweeps/theirs2.yaml"):
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr("fedekd.configuration.configs._PACKAGE", tmp_path / "site/fedekd")
    with pytest.raises(UserError, match=r"Did you mean 'ours\.yaml'"):
        find_config("theirs.yaml")


def test_config_integer_with_a_leading_zero_is_decimal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("rounds: 010\n")
    by_file = printed_config(capsys, "--config", str(tmp_path / "mine.yaml"), "--data.dataset=digits")
    by_option = printed_config(capsys, "--rounds=010", "--data.dataset=digits")
    assert by_file["rounds"] == by_option["rounds"] == 10


@pytest.fixture
def stdin() -> Iterator[int]:
    """Restore the standard input of the process."""
    saved = os.dup(0)
    yield 0
    os.dup2(saved, 0)
    os.close(saved)


@pytest.mark.parametrize("name", ["-", "/dev/fd/0"])
def test_config_pipe_is_read_once(name: str, stdin: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As `--config - <FILE` and `--config <(...)` of a shell."""
    reading, writing = os.pipe()
    os.write(writing, b"---\nrounds: 9\ndata: {dataset: digits}\n")
    os.close(writing)
    os.dup2(reading, stdin)
    os.close(reading)
    assert printed_config(capsys, f"--config={name}")["rounds"] == 9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "expected a YAML file, got a directory"),
        ("/dev/zero", "expected at most 1,000,000 bytes, got more"),
        ("/dev/null", "expected keys and values, got an empty file"),
        ("", "expected the name of a file, got nothing"),
        ("a\0b", r"--config a\x00b: expected a YAML file"),
    ],
)
def test_config_invalid_file_prints_one_line_error(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--config={name}"]) == 2
    text = capsys.readouterr().err
    assert words in text
    assert text.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """On a small data set under the name of the configuration's."""
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / name).read_text()
    data = yaml.safe_load(text)["data"]
    dataset = data["dataset"]
    classes = {"octmnist": 4, "organamnist": 11, "retinamnist": 5, "diabetic_retinopathy": 5}.get(dataset, 10)
    labels = np.arange(330) % classes
    size = 24 if "Conv3" in text else 8  # Conv3 has no padding
    images = np.random.default_rng(0).integers(0, 256, (330, size, size, 3), dtype=np.uint8)
    options = ["--rounds=1", "--client.local_epochs=1", "--logger=null", "--trainer.threads=1"]
    if "site_column" not in data:  # that one is a file of the package
        Path("data").mkdir()
        np.savez(f"data/{dataset}.npz", train_images=images, train_labels=labels[:, None])
        options += ["--data.alpha=5", f"--data.num_clients={min(data.get('num_clients', 6), 6)}"]
    assert main(["fit", "--config", name, "--output=run", *options]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["dataset"] == dataset
    is_regression = dataset in ("retinamnist", "diabetic_retinopathy")
    assert summary["task"] == ("regression" if is_regression else "classification")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_is_parsed_and_logs_to_wandb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = printed_config(capsys, "--config", name)["logger"]
    assert [logger["class_path"].rpartition(".")[2] for logger in loggers] == ["WandbRunLogger"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_sweep_options_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = yaml.safe_load(path.read_text())
    command, *options = [part for part in sweep["command"] if not part.startswith("${")]
    assert command == "fit"
    printed_config(capsys, *options, *(f"--{name}={spec['values'][0]}" for name, spec in sweep["parameters"].items()))
