"""The real commands, in this process."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from fedekd.cli import main
from fedekd.configuration.configs import config_folders, find_config
from fedekd.federation import Interrupted, Orchestrator, RunFolder

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "configs", ROOT / "configs/exits", ROOT / "configs/cafedistill")
CONFIGS = sorted(str(path.relative_to(FOLDERS[0])) for folder in FOLDERS for path in folder.glob("*.yaml"))
FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def here(folder: Path, undrawn: None) -> Path:
    """An empty working folder, in which runs draw no figures."""
    return folder


def fit(npz: Path, *options: str, rounds: int = 1) -> int:
    return main(
        [
            "fit",
            *FAST,
            f"--data.dataset={npz}",
            "--data.num_clients=3",
            "--data.alpha=1.0",
            "--data.batch_size=16",
            f"--rounds={rounds}",
            *options,
        ]
    )


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    return text


def test_fit_writes_the_whole_folder(npz: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(npz, "--output=runs/one", rounds=2) == 0
    run = folder / "runs" / "one"
    printed = capsys.readouterr().out
    assert "round 2/2" in printed
    assert "Delta" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        *(
            "dataset",
            "alpha",
            "seed",
            "method",
            "task",
            "metric",
            "rounds",
            "mean",
            "worst",
            "local_mean",
            "delta",
        ),
        *("clients", "seconds", "bytes_up", "bytes_down", "versions"),
    }
    assert set(summary["delta"]) == {"avg", "worst", "p10"}
    assert {"client", "train", "test", "local", "method", "delta"} <= set(summary["clients"][0])
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
    # Nothing of this machine in what must be repeatable.
    repeatable = [run / "metrics.csv", *(run / "checkpoints").glob("*.pt")]
    assert all(str(folder).encode() not in path.read_bytes() for path in repeatable)


def test_config_of_a_run_repeats_it(npz: Path, here: Path) -> None:
    assert fit(npz, "--output=a", "--seed=3", "--method.beta=2.5") == 0
    assert main(["fit", "--config", "a/config.yaml", "--output=b"]) == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()
    assert Path("a/config.yaml").read_bytes() == Path("b/config.yaml").read_bytes()
    weights = [sorted(Path(run, "checkpoints").glob("*.pt")) for run in "ab"]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


def test_regression_run(npz: Path, folder: Path) -> None:
    assert fit(npz, "--output=a", "--task=regression", "--data.alpha=10") == 0
    summary = json.loads(Path("a/summary.json").read_text())
    assert (summary["task"], summary["metric"]) == ("regression", "rmse")
    assert set(summary["delta"]) == {"avg", "worst", "p90"}
    assert Path("a/figures/rmse_per_round.png").exists()


def test_test_reproduces_the_figures(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a")
    assert main(["test", "a"]) == 0
    assert "the same as summary.json, to the last digit" in capsys.readouterr().out
    summary = json.loads(Path("a/summary.json").read_text())
    summary["clients"][0]["score"] += 1e-16 + 1e-3
    Path("a/summary.json").write_text(json.dumps(summary))
    assert main(["test", "a"]) == 1
    assert "differs from summary.json" in capsys.readouterr().out


def test_resume_of_a_finished_run_does_nothing(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a")
    before = {path: path.stat().st_mtime_ns for path in Path("a").rglob("*")}
    assert main(["fit", "--resume", "a"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("a").rglob("*")} == before


def test_resume_without_a_checkpoint_starts_anew(npz: Path, here: Path) -> None:
    fit(npz, "--output=a")
    expected = Path("a/metrics.csv").read_bytes()
    for path in [*Path("a/checkpoints").iterdir(), Path("a/summary.json"), Path("a/metrics.csv")]:
        path.unlink()
    assert main(["fit", "--resume", "a"]) == 0
    assert Path("a/metrics.csv").read_bytes() == expected


def test_a_finished_run_whose_checkpoint_is_damaged_is_made_again(
    npz: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(npz, "--output=a", rounds=2)
    expected = Path("a/metrics.csv").read_bytes()
    victim = sorted(Path("a/checkpoints").glob("client-001-*.pt"))[-1]
    victim.write_bytes(victim.read_bytes()[:1000])
    capsys.readouterr()
    for command in (["test", "a"], ["predict", "a", "--input=images.npz", "--client=0"]):
        np.savez("images.npz", images=np.zeros((1, 8, 8), np.uint8))
        assert main(command) == 2
        assert "is damaged" in (text := told(capsys))
        assert text.endswith("; fit --resume a makes it again\n")
    assert main(["fit", "--resume", "a"]) == 0
    warning = capsys.readouterr().err
    assert "the checkpoint of round 3 is damaged" in warning
    assert "going on from round 2" in warning
    assert Path("a/metrics.csv").read_bytes() == expected
    assert main(["test", "a"]) == 0
    for path in Path("a/checkpoints").iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["test", "a"]) == 2
    assert "there is no checkpoint of the last round; without summary.json, fit --resume a makes it again" in told(
        capsys
    )


def test_two_processes_do_not_share_a_run(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a")
    Path("a/summary.json").unlink()
    Path("b").mkdir()
    before = sorted(Path("a").rglob("*"))
    with RunFolder(Path("a"), {}).lock(), RunFolder(Path("b"), {}).lock():
        capsys.readouterr()
        assert main(["fit", "--resume", "a", "--quiet"]) == 2
        assert told(capsys) == "error: a: another process is at work there\n"
        assert fit(npz, "--output=b", "--quiet") == 2
        assert told(capsys) == "error: b: another process is at work there\n"
        assert list(Path("b").iterdir()) == []  # nor is it given back, since it is the other's
    assert sorted(Path("a").rglob("*")) == before
    assert main(["fit", "--resume", "a", "--quiet"]) == 0


def test_a_network_that_diverged_classifies_nothing(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(npz, "--output=a", "--client.optimizer.lr=1e30") == 0
    np.savez("images.npz", images=np.zeros((5, 8, 8), np.uint8))
    capsys.readouterr()
    assert main(["predict", "a", "--input=images.npz", "--client=1"]) == 2
    assert "the outputs of client 1's network are not finite for 5 of 5 images" in told(capsys)
    assert not Path("predictions.csv").exists()
    assert main(["test", "a"]) == 0  # NaN is as good as NaN
    assert "the same as summary.json" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--version"]])
def test_help_for_nobody(options: list[str]) -> None:
    code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", code, *options]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no space left on the disk")
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_partition_of_ones_own_may_lie_where_one_stands(
    npz: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    for name, words in (("two_arguments", "TypeError"), ("nothing", "TypeError"), ("fails", "KeyError: 'no such key'")):
        assert fit(npz, f"--data.partition=own_partition.{name}", "--output=b") == 2
        assert "called with (images, num_clients, alpha, seed, min_samples)" in (text := told(capsys))
        assert words in text
    assert not Path("b").exists()


def test_a_checkpoint_cut_short_falls_back_and_ends_the_same(
    npz: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(npz, "--output=a", rounds=3)
    expected = Path("a/metrics.csv").read_bytes()
    Path("a/summary.json").unlink()
    victim = sorted(Path("a/checkpoints").glob("client-001-*.pt"))[-1]
    victim.write_bytes(victim.read_bytes()[:1000])
    capsys.readouterr()
    assert main(["fit", "--resume", "a"]) == 0
    warning = capsys.readouterr().err
    assert "damaged" in warning
    assert "going on from round 3" in warning
    assert Path("a/metrics.csv").read_bytes() == expected


def test_resume_with_a_changed_value_names_it(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a", rounds=1)
    Path("a/summary.json").unlink()
    capsys.readouterr()
    assert main(["fit", "--resume", "a", "--method.beta=3"]) == 2
    assert "method.init_args.beta" in told(capsys)
    config = Path("a/config.yaml").read_text()
    Path("a/config.yaml").write_text(config.replace("rounds: 1", "rounds: 4"))
    assert main(["fit", "--resume", "a"]) == 2
    assert "rounds: 1" in told(capsys)


def test_resume_may_look_elsewhere_for_data_and_references(npz: Path, here: Path) -> None:
    fit(npz, "--output=a", "--data.download=false")
    for path in [Path("a/summary.json"), *Path("a").glob("figures/*")]:
        path.unlink()
    harmless = ["--data.root=x", "--data.download=true", "--baseline_dir=y", "--trainer.device=1"]
    assert main(["fit", "--resume", "a", *harmless, "--logger=CSVLogger", "--logger.save_dir=logs"]) == 0
    assert list(Path("logs").rglob("metrics.csv"))
    for path in [Path("a/summary.json"), *Path("a/checkpoints").iterdir()]:
        path.unlink()
    assert main(["fit", "--resume", "a", *harmless]) == 0
    assert list(Path("y").rglob("*"))


def test_a_logger_that_cannot_be_made_is_told(
    npz: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_loggers.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n"
        "class Broken(CSVLogger):\n"
        "    def __init__(self, save_dir: str):\n"
        "        raise ModuleNotFoundError('no tensorboard\\ntry pip')\n"
    )
    monkeypatch.syspath_prepend(str(here))
    assert fit(npz, "--logger=my_loggers.Broken", "--logger.save_dir=logs") == 2
    assert told(capsys) == "error: my_loggers.Broken cannot be made: no tensorboard\n"


def test_resume_goes_on_in_its_own_folder(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a")
    capsys.readouterr()
    assert main(["fit", "--resume", "a", "--output", "b"]) == 2
    assert "--output b cannot be given with --resume a" in told(capsys)


def test_resume_may_stand_in_a_configuration(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a")
    Path("go_on.yaml").write_text("resume: a\n")
    assert main(["fit", "--config=go_on.yaml"]) == 0
    assert "a is finished: nothing to do" in capsys.readouterr().out


def test_a_damaged_summary_is_told(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(npz, "--output=a b")
    capsys.readouterr()
    for junk, command in product(["{", "5", "\udcff"], [["fit", "--resume", "a b"], ["test", "a b"]]):
        Path("a b/summary.json").write_text(junk, errors="surrogateescape")
        assert main(command) == 2
        assert "summary.json is damaged; remove it and go on with fit --resume 'a b'" in told(capsys)


@pytest.mark.parametrize("options", [["--quiet"], ["--quiet", "true"]])
def test_quiet_prints_nothing(options: list[str], npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(npz, *options) == 0
    assert capsys.readouterr().out == ""


def test_an_energy_by_its_class_path(npz: Path, here: Path) -> None:
    assert fit(npz, "--output=a") == 0
    assert fit(npz, "--output=b", "--method.energy=fedekd.modules.energies.DisagreementEnergy") == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(npz: Path, here: Path) -> None:
    code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
    options = [*FAST, f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=1", "--rounds=2", "--output=a"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        command = [sys.executable, "-c", code, "fit", *options]
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path("a/summary.json").exists()


def test_a_reader_that_left_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(argv: list[str]) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fedekd.cli.fit.run", gone)
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
    assert main(["fit"]) == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/metrics.csv"), "a/metrics.csv: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "no space left on the disk while writing a/b"),
        (OSError("the network is gone"), "the network is gone"),
    ],
)
def test_what_the_system_refuses_is_told_in_one_line(
    error: OSError, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("fedekd.cli.fit.run", refused)
    assert main(["fit"]) == 2
    assert words in told(capsys)


@pytest.mark.parametrize(
    ("called", "name"), [("/x/orchestrator.py", "python orchestrator.py"), ("/bin/fedekd", "fedekd")]
)
def test_the_hint_after_an_interruption_can_be_copied(
    called: str, name: str, npz: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Orchestrator) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(Orchestrator, "run", interrupted)
    monkeypatch.setattr("sys.argv", [called])
    assert fit(npz, "--output=my run") == 130
    assert f"go on with: {name} fit --resume 'my run'" in capsys.readouterr().err


def test_help_can_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.count("\n") < 175
    assert "--client.private_model" in text
    assert "--method.help" in text
    assert "[0.1]" in text  # a default


def test_default_output_is_a_new_folder_each_time(npz: Path, here: Path) -> None:
    assert fit(npz) == 0
    assert fit(npz) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "blobs-fedekd-001",
        "blobs-fedekd-002",
        "local",
    ]


def test_an_override_before_the_configuration_is_not_lost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--seed", "7", "--config", "digits.yaml", "--method.beta", "2", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seed"] == 7
    assert config["method"]["init_args"]["beta"] == 2.0


def test_later_configurations_win(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text("rounds: 9\ndata:\n  alpha: 0.5\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "digits.yaml", "--config", "more.yaml", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["rounds"], config["data"]["alpha"], config["data"]["dataset"]) == (9, 0.5, "digits")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs(name: str, here: Path) -> None:
    """On a small data set in the place of its own, under the same name."""
    data = yaml.safe_load((ROOT / "configs" / name).read_text())["data"]
    own = data["dataset"]
    classes = {"octmnist": 4, "organamnist": 11, "retinamnist": 5, "diabetic_retinopathy": 5}.get(own, 10)
    labels = np.arange(330) % classes
    size = 24 if "Conv3" in (ROOT / "configs" / name).read_text() else 8  # Conv3 pads nothing
    images = np.random.default_rng(0).integers(0, 256, (330, size, size, 3), dtype=np.uint8)
    Path("data").mkdir()
    np.savez(f"data/{own}.npz", train_images=images, train_labels=labels[:, None])
    options = [
        "--rounds=1",
        "--client.local_epochs=1",
        "--data.alpha=5",
        f"--data.num_clients={min(data.get('num_clients', 6), 6)}",
        "--logger=null",
        "--trainer.threads=1",
    ]
    assert main(["fit", "--config", name, "--output=run", *options]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["dataset"] == own
    assert summary["task"] == ("regression" if own in ("retinamnist", "diabetic_retinopathy") else "classification")


def test_every_sweep_names_options_that_there_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
    assert sweeps
    for path in sweeps:
        sweep = yaml.safe_load(path.read_text())
        command = [part for part in sweep["command"] if not part.startswith("${")]
        options = [f"--{name}={spec['values'][0]}" for name, spec in sweep["parameters"].items()]
        with pytest.raises(SystemExit) as ended:
            main([*command, *options, "--print_config"])
        assert ended.value.code == 0
        capsys.readouterr()


def test_torchvision_classifier_by_class_path(npz: Path, here: Path) -> None:
    options = [
        "--client.private_model=torchvision.models.mobilenet_v3_small",
        "--client.private_model.dropout=0.1",
    ]
    assert fit(npz, "--output=a", *options) == 0
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["client"]["private_model"]["class_path"] == "torchvision.models.mobilenet_v3_small"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method.betta=2"], "did you mean 'beta'"),
        (["--clent.local_epochs=2"], "did you mean --client.local_epochs"),
        (["--method=FedeD"], "did you mean 'FedeKD'"),
        (["--client.private_model=PrivatCNN"], "did you mean 'PrivateCNN'"),
        (["--client.private_model=torchvision.models.squeezenet1_0"], "squeezenet"),
        (["--client.optimizer=Adm"], "did you mean 'Adam'"),
        (["--client.optimizer.lr=-1"], "client.optimizer"),
        (["--method.energy=kll"], "did you mean 'kl'"),
        (["--method.gate=open"], "--method.gate"),
        (["--method.beta=0"], "method.beta is 0"),
        (["--method.lambda_kd=-0.5"], "method.lambda_kd is -0.5"),
        (["--data.alpha=0"], "data.alpha=0"),
        (["--data.alpha=-1"], "data.alpha=-1"),
        (["--data.alpha=one"], "--data.alpha is 'one', and must be a number"),
        (["--data.num_clients=500"], "data.num_clients"),
        (["--data.partition=labels"], "did you mean 'label'"),
        (["--data.dataset=fashionmist"], "did you mean 'fashionmnist'"),
        (["--data.dataset=no/such.npz"], "no/such.npz"),
        (["--data.dataset=octmnist", "--data.download=false"], "octmnist.npz"),
        (["--engine.processes=4"], "Sequential takes no 'processes'; it takes no arguments"),
        (["--engine=SideByside"], "did you mean 'MultiProcess'"),
        (["--engine=MultiProcess", "--data.num_clients=0", "--trainer.threads=auto"], "data.num_clients=0"),
        (["--engine=MultiProcess", "--engine.processes=0"], "engine.processes is 0"),
        (["--rounds=0"], "rounds is 0"),
        (["--rounds=five"], "--rounds is 'five', and must be a whole number"),
        (["--rounds"], "--rounds"),
        (["--participation=0"], "participation is 0"),
        (["--quorum=9"], "quorum is 9"),
        (["--client.local_epochs=0"], "client.local_epochs is 0"),
        (["--task=ranking"], "ranking"),
        (["--trainer.precision=bf15"], "--trainer.precision"),
        (["--trainer.accelerator=cuda", "--trainer.device=99"], "CUDA"),
        (["--trainer.threads=0"], "threads"),
        (["--config=digit.yaml"], "did you mean 'digits.yaml'"),
        (["--logger=WandbRunLoger"], "WandbRunLog"),
        (["--resume=nowhere"], "nowhere"),
        (["--resum=nowhere"], "did you mean --resume"),
        (["--client.private_model.in_channels=3"], "private_model.in_channels cannot be given: the data decide it"),
        (["--client.optimizer.params=3"], "optimizer.params cannot be given: the models decide it"),
        (["--client.optimizer.lr=nan"], "--client.optimizer.lr is 'nan', and must be a finite number"),
        (["--method.beta=nan"], "--method.beta is 'nan', and must be a finite number"),
        (["--method.lambda_kd=.inf"], "--method.lambda_kd is inf, and must be a finite number"),
        (["--data.fractions=1"], "must be a list, as in [0.6,0.2,0.2]"),
        (["--data.fractions=[1,2]"], "must be a list of 3 values"),
        (["--trainer.threads=many"], "--trainer.threads is 'many', and must be a whole number or 'auto'"),
        (["--method=torch.nn.Linear"], "--method torch.nn.Linear: it is no Method"),
        (["--method.energy=no.such.Energy"], "cannot be imported"),
        (["--method.energy=torch.nn.Linear"], "is no fedekd.modules.Energy"),
        (["--method.energy=fedekd.modules.energies.FeatureEnergy"], "needs init_args"),
        (["--quiet=maybe"], "--quiet is 'maybe', and must be true or false"),
        (["--output=blobs.npz/a"], "--output blobs.npz/a cannot be a folder"),
        ([f"--output={'a' * 300}"], "File name too long"),
        (["--client.private_model=torchvision.models.vit_b_16"], "Input shape indivisible by patch size"),
        (["rounds", "3"], "'rounds'"),
        (["--client.optimizer=torch.optim.LBFGS"], "LBFGS, which works out the loss several times in a step"),
        (["--client.optimizer=SparseAdam"], "SparseAdam, which is for sparse gradients alone"),
        (["--method=ProxyMethod"], "--method needs a class that can be made; choose from: CAFEDistill, "),
        (["--engine=Placement"], "--engine needs a class that can be made; choose from: Sequential, "),
        (["--client.optimizer=torch.optim.lbfgs.LBFGS"], "LBFGS, which works out the loss several times in a step"),
        (["--method.aggregator=foo"], "--method.aggregator foo: there is no such class; choose from: CoordinateMedian"),
        (
            ["--method.aggregator.trim=0.9"],
            "--method.aggregator needs a class that can be made; choose from: Coord",
        ),
        (["--method.energy={class_path: nope.E}"], "--method.energy nope.E: No module named 'nope'"),
        (["--client=nope.yaml"], "--client nope.yaml: there is no such file"),
        (["--baseline_dir=/dev/null"], "--baseline_dir /dev/null is no folder"),
        (["--output="], "--output is empty"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    options: list[str], words: str, npz: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("blobs.npz").touch()
    assert fit(npz, *options) == 2
    assert words in told(capsys)
    assert not list(here.rglob("summary.json"))
    assert not Path("runs").exists() or not list(Path("runs").glob("blobs*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clent:\n  local_epochs: 2\n", "did you mean 'client.local_epochs'"),
        ("data:\n  alhpa: 2\n", "did you mean 'alpha'"),
        ("method:\n  class_path: FedeKD\n  init_args:\n    betta: 2\n", "did you mean 'beta'"),
        ("rounds: five\n", "--rounds is 'five'"),
        ("rounds: [\n", "not valid YAML"),
        ("- rounds\n", "keys and values"),
        ("participation: null\n", "--participation is null, and must have a value"),
        ("logger: 5\n", "--logger is 5, and must be a class path"),
        ("method: null\n", "--method is null"),
        ("method: {class_path: FedeKD, init_args: {beta: null}}\n", "--method.beta is null"),
        ("client: null\n", "client is null, and must hold keys and values"),
        ("client: {optimizer: null}\n", "--client.optimizer is null"),
        ("client: {optimizer: 5}\n", "--client.optimizer is 5, and must be a class path"),
        ("trainer: 5\n", "trainer is 5, and must hold keys and values"),
        ("data: 5\n", "data is 5, and must hold keys and values"),
        ("data: {fractions: null}\n", "--data.fractions is null"),
        ("baseline_dir: null\n", "--baseline_dir is null"),
        ("task: 5\n", "--task is '5', and must be text or null"),
        ("config: 5\n", "must be the name of a file"),
        ("", "mine.yaml is empty"),
        ("\udcff", "mine.yaml is not text in UTF-8"),
        ("resume: nowhere\n", "--resume nowhere: there is no run"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_line(
    text: str, words: str, npz: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(text, errors="surrogateescape")
    assert fit(npz, "--config=mine.yaml") == 2
    assert words in told(capsys)


def test_an_existing_folder_is_not_touched(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").mkdir()
    Path("a/thesis.txt").write_text("years of work")
    assert fit(npz, "--output=a") == 2
    assert "--output a exists already" in told(capsys)
    assert [path.name for path in Path("a").iterdir()] == ["thesis.txt"]


def test_damaged_data_is_told_in_one_line(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = npz.read_bytes()
    npz.write_bytes(content[: len(content) // 2])
    assert fit(npz) == 2
    assert "blobs.npz" in told(capsys)


def test_a_label_outside_the_classes_is_told(npz: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(npz, "--data.num_classes=2") == 2
    assert "label 2" in told(capsys)


def test_a_full_disk_is_told_and_nothing_is_lost(
    npz: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real, left = os.fsync, [12]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        assert fit(npz, "--output=a", rounds=3) == 2
    assert "no space left on the disk" in told(capsys)
    assert main(["fit", "--resume", "a"]) == 0
    assert fit(npz, "--output=b", rounds=3) == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()


def test_unknown_command_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "did you mean 'fit'" in told(capsys)
    assert main(["--help"]) == 0
    assert "fit --resume RUN" in capsys.readouterr().out
    assert main(["test"]) == 2
    assert "runs/NAME" in told(capsys)


def test_help_needs_no_torch() -> None:
    code = "import sys; from fedekd.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_configurations_of_others_are_not_looked_up(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Installed, the folder above the package is everybody's; and a sweep is no configuration of a run."""
    for name in (
        "site/configs/theirs.yaml",
        "site/fedekd/configs/ours.yaml",
        "site/fedekd/configs/sweeps/theirs2.yaml",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    monkeypatch.setattr("fedekd.configuration.configs._PACKAGE", here / "site/fedekd")
    assert main(["fit", "--config=theirs.yaml"]) == 2
    assert "did you mean 'ours.yaml'" in told(capsys)


def test_configurations_are_found_by_bare_name(here: Path) -> None:
    assert find_config("digits.yaml").name == "digits.yaml"
    Path("configs").mkdir()
    Path("configs/digits.yaml").write_text("rounds: 1\n")
    assert find_config("digits.yaml").resolve() == (here / "configs/digits.yaml").resolve()
    assert config_folders()[0] == Path("configs")


def test_a_run_from_before_an_option_existed_is_taken_up(npz: Path, here: Path) -> None:
    assert fit(npz, "--output=run", rounds=2) == 0
    manifest = max(Path("run/checkpoints").glob("manifest-*.json"))
    content = json.loads(manifest.read_text())
    for part in (content["notes"]["config"]["client"], content["notes"]["identity"]["spec"]["client"]):
        del part["lr_decay"]
    manifest.write_text(json.dumps(content))
    assert main(["test", "run"]) == 0
    content["notes"]["config"]["client"]["local_epochs"] = 7  # what was known then still counts
    manifest.write_text(json.dumps(content))
    assert main(["test", "run"]) == 2
