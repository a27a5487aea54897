from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedekd.cli import main
from fedekd.configuration.options import parts_of
from fedekd.errors import UserError
from fedekd.federation import Interrupted, Orchestrator
from fedekd.federation.checkpoint import CheckpointStore

Fit = Callable[..., int]
ErrorLine = Callable[[], str]


def test_fit_writes_all_files(
    npz: Path, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(npz, "--output=runs/one", rounds=2) == 0
    run = tmp_path / "runs" / "one"
    printed = capsys.readouterr().out
    assert "round 2/2" in printed
    assert "Delta" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        *("dataset", "alpha", "seed", "method", "task", "metric", "rounds", "mean", "worst", "local_mean", "delta"),
        *("metrics", "clients", "seconds", "bytes_up", "bytes_down", "versions"),
    }
    assert set(summary["delta"]) == {"avg", "worst", "p10"}
    assert {"client", "train", "test", "local", "score", "delta"} <= set(summary["clients"][0])
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["round"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["delta/avg"]) == summary["delta"]["avg"]
    assert float(rows[-1]["client_2/accuracy"]) == summary["clients"][2]["score"]
    assert {path.name for path in (run / "figures").iterdir()} == {
        *("partition.png", "delta_per_client.png", "accuracy_per_round.png", "gate_weights.png"),
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["precision"] != "auto"
    assert config["trainer"]["threads"] == 1
    repeatable = [run / "metrics.csv", *(run / "checkpoints").glob("*.bin")]
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in repeatable)  # no path of this machine


def test_fit_regression_writes_rmse(npz: Path, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(npz, "--output=a", "--task=regression", "--data.alpha=10") == 0
    summary = json.loads(Path("a/summary.json").read_text())
    assert (summary["task"], summary["metric"]) == ("regression", "rmse")
    assert set(summary["delta"]) == {"avg", "worst", "p90"}
    assert Path("a/figures/rmse_per_round.png").exists()


def test_parts_of_single_metric_is_a_list_and_unknown_one_is_one_line(npz: Path) -> None:
    data = f"--data.dataset={npz}"
    for text in ("auroc", "[auroc]"):
        parts = parts_of([data, f"--metrics={text}"])
        assert parts["metrics"] == parts["config"]["metrics"] == ["auroc"]
    with pytest.raises(
        UserError, match=r"metrics: expected metrics of classification, got '3'\. Choose from: accuracy"
    ):
        Orchestrator(**parts_of([data, "--metrics=3"]))


def test_fit_config_of_a_run_repeats_it(npz: Path, workdir: Path, fit: Fit) -> None:
    assert fit(npz, "--output=a", "--seed=3", "--method.beta=2.5") == 0
    assert main(["fit", "--config", "a/config.yaml", "--output=b"]) == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()
    assert Path("a/config.yaml").read_bytes() == Path("b/config.yaml").read_bytes()
    digests = [CheckpointStore(Path(run, "checkpoints")).digests() for run in "ab"]
    assert digests[0] == digests[1]


def test_fit_quiet_or_not_gets_a_new_folder_each_time(
    npz: Path, workdir: Path, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(npz, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert fit(npz, "--quiet", "true") == 0
    assert capsys.readouterr().out == ""
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["blobs-fedekd-001", "blobs-fedekd-002", "local"]


def test_fit_energy_by_class_path_equals_its_name(npz: Path, workdir: Path, fit: Fit) -> None:
    assert fit(npz, "--output=a") == 0
    assert fit(npz, "--output=b", "--method.energy=fedekd.modules.energies.DisagreementEnergy") == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()


@pytest.mark.slow
def test_fit_torchvision_classifier_by_class_path(npz: Path, workdir: Path, fit: Fit) -> None:
    model = "torchvision.models.mobilenet_v3_small"
    assert fit(npz, "--output=a", f"--client.private_model={model}", "--client.private_model.dropout=0.1") == 0
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["client"]["private_model"]["class_path"] == model


def test_fit_ignore_label_leaves_samples_out_of_every_split(
    npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(npz) as file:
        arrays = {name: file[name].astype(np.int64) if "labels" in name else file[name] for name in file}
    for name in ("train_labels", "test_labels"):
        arrays[name][:5] = -1
    np.savez("unknown.npz", **arrays)
    assert fit(Path("unknown.npz"), "--output=a") == 2
    assert "--data.ignore_label -1" in error_line()
    assert not Path("a").exists()
    assert fit(Path("unknown.npz"), "--output=a", "--quiet", "--data.ignore_label", "-1") == 0
    text = capsys.readouterr().err
    assert text.count("10 of 120 samples of 'unknown' have the label -1 and are left out") == 1
    rows = json.loads(Path("a/summary.json").read_text())["clients"]
    assert 64 <= sum(row["train"] for row in rows) <= 68  # 0.6 of 110
    assert main(["test", "a"]) == 0


def test_fit_near_copies_warn_once(npz: Path, workdir: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(npz) as file:
        arrays = {name: np.repeat(file[name], 10, axis=0) for name in file if "train" in name}
    np.savez("scans.npz", **arrays)
    assert fit(Path("scans.npz"), "--output=a", "--quiet") == 0
    assert capsys.readouterr().err.count("near-copies") == 1
    assert fit(npz, "--output=b", "--quiet") == 0
    assert "near-copies" not in capsys.readouterr().err


def test_fit_partition_function_in_working_folder(
    npz: Path,
    workdir: Path,
    fit: Fit,
    error_line: ErrorLine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    Path("own_partition.py").write_text(
        "import numpy as np\n"
        "def thirds(images, num_clients, alpha, seed, min_samples):\n"
        "    return np.array_split(np.arange(len(images)), num_clients)\n"
        "def two_arguments(images, num_clients): ...\n"
        "def nothing(*arguments): ...\n"
        "def fails(*arguments): {}['no such key']\n"
    )
    assert fit(npz, "--data.partition=own_partition.thirds", "--output=a", "--quiet") == 0
    capsys.readouterr()  # warnings on the scores
    for name, words in (
        ("two_arguments", "TypeError"),
        ("nothing", "a NoneType"),
        ("fails", "KeyError: 'no such key'"),
    ):
        assert fit(npz, f"--data.partition=own_partition.{name}", "--output=b") == 2
        text = error_line()
        assert "(images, num_clients, alpha, seed, min_samples)" in text
        assert words in text
    assert not Path("b").exists()


def test_fit_logger_that_cannot_be_built_prints_its_reason(
    npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_loggers.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n"
        "class Broken(CSVLogger):\n"
        "    def __init__(self, save_dir: str):\n"
        "        raise ModuleNotFoundError('no tensorboard\\ntry pip')\n"
    )
    monkeypatch.syspath_prepend(str(workdir))
    assert fit(npz, "--logger=my_loggers.Broken", "--logger.save_dir=logs") == 2
    assert error_line() == (
        "error: my_loggers.Broken: expected arguments with which it can be built. It reports: no tensorboard\n"
    )


def test_fit_diverged_network_is_tested_but_predicts_nothing(
    npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(npz, "--output=a", "--client.optimizer.lr=1e30") == 0
    np.savez("images.npz", images=np.zeros((5, 8, 8), np.uint8))
    capsys.readouterr()
    assert main(["predict", "a", "--input=images.npz", "--client=1"]) == 2
    assert "expected finite outputs, got NaN or inf for 5 of 5 samples" in error_line()
    assert not Path("predictions.csv").exists()
    assert main(["test", "a"]) == 0  # NaN equals NaN in the comparison with summary.json
    assert "the same as summary.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "command"), [("/x/orchestrator.py", "python orchestrator.py"), ("/bin/fedekd", "fedekd")]
)
def test_fit_interrupted_prints_command_to_resume(
    program: str,
    command: str,
    npz: Path,
    workdir: Path,
    fit: Fit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(self: Orchestrator) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(Orchestrator, "run", interrupted)
    monkeypatch.setattr("sys.argv", [program])
    assert fit(npz, "--output=my run") == 130
    assert f"{command} fit --resume 'my run'" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_closed_stdout_finishes_the_run(npz: Path, workdir: Path) -> None:
    code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
    options = [
        *(f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=2", "--output=a"),
        *("--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null"),
    ]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed_pipe:
        command = [sys.executable, "-c", code, "fit", *options]
        ended = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False)
    [warning] = ended.stderr.splitlines()
    assert (ended.returncode, warning.startswith("warning: scores of")) == (0, True)
    assert Path("a/summary.json").exists()


@pytest.mark.slow
def test_fit_full_disk_keeps_finished_rounds(
    npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes_left = os.fsync, [12]

    def fsync(descriptor: int) -> None:
        writes_left[0] -= 1
        if writes_left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        assert fit(npz, "--output=a", rounds=3) == 2
    assert "no space left on the disk" in error_line()
    assert main(["fit", "--resume", "a"]) == 0
    assert fit(npz, "--output=b", rounds=3) == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()


def test_fit_existing_folder_is_refused_and_unchanged(
    npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine
) -> None:
    Path("a").mkdir()
    Path("a/thesis.txt").write_text("years of work")
    assert fit(npz, "--output=a") == 2
    assert "--output: expected an empty folder, got a." in error_line()
    assert [path.name for path in Path("a").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--client.private_model=torchvision.models.squeezenet1_0"], "squeezenet"),
        (["--client.private_model=torchvision.models.vit_b_16"], "Input shape indivisible by patch size"),
        (["--client.optimizer.lr=-1"], "client.optimizer"),
        (["--client.optimizer=torch.optim.LBFGS"], "LBFGS"),
        (["--client.optimizer=torch.optim.lbfgs.LBFGS"], "LBFGS"),
        (["--client.optimizer=SparseAdam"], "SparseAdam"),
        (["--client.local_epochs=0"], "client.local_epochs"),
        (["--method.energy=kll"], "Did you mean 'kl'"),
        (["--method.energy=no.such.Energy"], "no.such.Energy"),
        (["--method.energy=torch.nn.Identity"], "fedekd.modules.Energy"),
        (["--method.energy=fedekd.modules.energies.FeatureEnergy"], "missing 2 required"),
        (["--method.beta=0"], "method.beta"),
        (["--method.lambda_kd=-0.5"], "method.lambda_kd"),
        (["--data.alpha=0"], "data.alpha: expected a finite number above 0, got 0.0"),
        (["--data.num_clients=500"], "data.num_clients"),
        (["--data.num_classes=2"], "label 2"),
        (["--data.partition=labels"], "Did you mean 'label'"),
        (["--data.dataset=fashionmist"], "Did you mean 'fashionmnist'"),
        (["--data.dataset=no/such.npz"], "no/such.npz"),
        (["--data.dataset=octmnist", "--data.download=false"], "octmnist.npz"),
        (["--engine=MultiProcess", "--data.num_clients=0", "--trainer.threads=auto"], "data.num_clients"),
        (["--engine=MultiProcess", "--engine.processes=0"], "engine.processes"),
        (["--rounds=0"], "rounds"),
        (["--participation=0"], "participation"),
        (["--quorum=9"], "quorum"),
        (["--task=ranking"], "ranking"),
        (["--trainer.accelerator=cuda", "--trainer.device=99"], "CUDA"),
        (["--trainer.threads=0"], "threads"),
        (["--trainer.accelerator=mps"], "expected one of 'auto', 'cpu', 'cuda', got 'mps'"),
        (["--trainer.callbacks=torch.nn.ReLU"], "expected a subclass of lightning.pytorch.Callback, got torch.nn.ReLU"),
        (["--trainer.callbacks=LambdaCallback", "--trainer.loop=lean"], "trainer.loop: expected auto or lightning"),
        (["--trainer.gradient_clip_val=0"], "trainer.gradient_clip_val: expected a finite number above 0, or null"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches: expected at least 1"),
        (["--client.scheduler=StepLR"], "the following arguments are required: step_size"),
        (["--client.scheduler=StepLR", "--client.scheduler.stepsize=2"], "Did you mean 'step_size'"),
        (["--client.scheduler=ReduceLROnPlateau"], "client.scheduler: expected a scheduler that needs no metric"),
        (
            ["--client.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            "expected a scheduler that needs no metric",
        ),
        (
            ["--client.scheduler=LambdaLR", "--client.scheduler.lr_lambda=no.such"],
            "--client.scheduler.lr_lambda: expected the import path of a function, got 'no.such'",
        ),
        (
            ["--trainer.callbacks=[{class_path: EMAWeightAveraging, init_args: {decai: 0.5}}]"],
            "trainer.callbacks: expected callbacks that can train a PrivateCNN, got",
        ),
        (["--client.scheduler_interval=batch"], "client.scheduler_interval: expected one of 'epoch', 'step'"),
        (["--config=digit.yaml"], "Did you mean 'digits.yaml'"),
        (["--resume=nowhere"], "nowhere"),
        (["--resume"], "--resume: expected the folder of a run"),
        (["--output=blobs.npz/a"], "--output: expected a folder that can be created, got blobs.npz/a"),
        ([f"--output={'a' * 300}"], "File name too long"),
        (["--output="], "--output: expected a folder"),
        (["--baseline_dir=/dev/null"], "--baseline_dir: expected a folder, got the file /dev/null"),
    ],
)
def test_fit_invalid_value_prints_one_line_and_leaves_no_folder(
    options: list[str], words: str, npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine
) -> None:
    Path("blobs.npz").touch()
    assert fit(npz, *options) == 2
    assert words in error_line()
    assert not list(workdir.rglob("summary.json"))
    assert not Path("runs").exists() or not list(Path("runs").glob("blobs*"))


OWN_MODELS = """
from collections import namedtuple
import torch
from torch import nn

Pair = namedtuple("Pair", ["first", "second"])


class Good(nn.Module):
    def __init__(self, in_channels: int, num_classes: int, fails_after: int = -1):
        super().__init__()
        self.layer = nn.Linear(64 * in_channels, num_classes)
        self.fails_after = fails_after

    def forward(self, x):
        if self.training and self.fails_after >= 0:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise KeyError("no such key")
        return self.layer(x.flatten(1))


class Frozen(Good):
    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes)
        self.requires_grad_(False)


class Lazy(nn.Module):
    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.layer = nn.LazyLinear(num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Auxiliary(Good):
    def forward(self, x):
        return Pair(super().forward(x), super().forward(x)) if self.training else super().forward(x)


class Named(Good):
    def forward(self, x):
        return Pair(super().forward(x), super().forward(x))


class Raising(Good):
    def __init__(self, in_channels: int, num_classes: int):
        [][1]
"""


@pytest.fixture
def own_models(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_models.py").write_text(OWN_MODELS)
    Path("own_syntax.py").write_text("class Good(:\n")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize("role", ["private", "proxy"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("own_models.Frozen", "at least one parameter to train, got none of 2: all are frozen"),
        ("own_models.Lazy", "the lazy 'layer.weight'"),
        ("own_models.Auxiliary", "got a Pair in training mode"),
        ("own_models.Named", "got a Pair in evaluation mode"),
        ("own_models.Raising", "IndexError: list index out of range"),
        ("own_syntax.Good", "own_syntax"),
    ],
)
def test_fit_unusable_model_prints_one_line_and_the_corrected_command_works(
    model: str, words: str, role: str, npz: Path, fit: Fit, error_line: ErrorLine
) -> None:
    assert fit(npz, "--output=a", "--quiet", f"--client.{role}_model={model}") == 2
    line = error_line()
    assert words in line
    assert f"client.{role}_model" in line
    assert len(line) <= 400
    assert not Path("a").exists()
    if role == "private" and model == "own_models.Named":
        assert fit(npz, "--output=a", "--quiet", "--client.private_model=own_models.Good") == 0


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize("folder", ["new", "empty"])
def test_fit_exception_in_training_is_named_and_leaves_no_folder(
    folder: str, npz: Path, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quiet", "--output=a", "--client.private_model=own_models.Good", "--method=FedAvg"]
    if folder == "empty":
        Path("a").mkdir()
    with pytest.raises(KeyError, match="no such key"):
        fit(npz, *options, "--client.private_model.fails_after=1")
    text = capsys.readouterr().err
    assert text.startswith("error: client 0: training 'private' failed with KeyError: 'no such key'.")
    assert Path("a").exists() == (folder == "empty")
    assert fit(npz, *options) == 0


@pytest.mark.usefixtures("own_models")
def test_fit_exception_after_a_checkpoint_keeps_the_folder(
    npz: Path, fit: Fit, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("no such key")

    options = ["--quiet", "--output=a", "--client.private_model=own_models.Good", "--method=FedAvg"]
    with monkeypatch.context() as patched:
        patched.setattr(Orchestrator, "_finish", fail)
        with pytest.raises(KeyError):
            fit(npz, *options)
    assert "Saved rounds are kept: fit --resume a." in capsys.readouterr().err
    assert fit(npz, *options) == 2
    assert "resume it with fit --resume a" in error_line()
    assert main(["fit", "--resume=a", "--quiet"]) == 0


def test_fit_damaged_data_file_is_named(npz: Path, workdir: Path, fit: Fit, error_line: ErrorLine) -> None:
    content = npz.read_bytes()
    npz.write_bytes(content[: len(content) // 2])
    assert fit(npz) == 2
    assert "blobs.npz" in error_line()
