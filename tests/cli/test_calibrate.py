"""Command `calibrate`, in this process."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from fedekd.cli import calibrate, folder_lock, main
from fedekd.configuration.load_run import open_finished
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.client_report import client_exit_report
from fedekd.federation import Orchestrator
from fedekd.methods import Client

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]


def fit(npz: Path, output: str, *options: str, clients: int = 2) -> int:
    data = [f"--data.dataset={npz}", f"--data.num_clients={clients}", "--data.alpha=50", "--data.batch_size=16"]
    return main(["fit", *FAST, *data, "--rounds=2", f"--output={output}", "--client.optimizer.lr=0.002", *options])


SAFE = ("--method=SafeKD", "--client.exits=2")


@pytest.fixture(scope="module")
def ready(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a finished run of two clients."""
    folder = tmp_path_factory.mktemp("calibrate")
    npz = write_blobs(folder / "blobs.npz", num_samples=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        assert fit(npz, "run", *SAFE) == 0
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder with a copy of the run, and the data set one above."""
    shutil.copytree(ready / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays_of(ready: Path) -> dict[str, np.ndarray]:
    with np.load(ready / "blobs.npz") as file:
        return dict(file)


def pooled(ready: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, numbered as in the run."""
    arrays = arrays_of(ready)
    parts = [(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "val", "test")]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


def test_calibrate_writes_and_prints_a_policy_per_client(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "run", "--target_risk", "0.2", "--confidence", "0.8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    files = sorted(path.name for path in Path("run/exits").glob("client-*.json"))
    assert files == ["client-000.json", "client-001.json"]
    clients = Path("run/exits/clients.csv").read_text().splitlines()
    assert clients[0].startswith("client,model,exits,open_exits,early_share,saved,certified_risk,test_risk,accuracy")
    assert [line.partition(",")[0] for line in clients[1:]] == ["0", "1"]
    for number, name in enumerate(files):
        policy = ExitPolicy.load(Path("run/exits", name))
        assert (policy.target_risk, policy.confidence) == (0.2, 0.8)
        assert (policy.mode, policy.score) == ("ltt", "max_softmax")
        assert f"client {number}: target risk 0.2, confidence 0.8, ltt," in printed.out
        assert f"written to run/exits/{name}" in printed.out
        assert sum(policy.exit_counts) == policy.samples
        assert len(policy.network) == 64
        assert str(here) not in Path("run/exits", name).read_text()
    assert len({ExitPolicy.load(Path("run/exits", name)).network for name in files}) == 2
    assert "FLOPs saved" in printed.out
    before = [Path("run/exits", name).read_bytes() for name in files]
    assert main(["calibrate", "run", "--target_risk", "0.2", "--confidence", "0.8"]) == 0
    assert [Path("run/exits", name).read_bytes() for name in files] == before


def test_calibrate_single_client_updates_table_and_warns_of_broken_family(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> list[dict[str, str]]:
        with Path("run/exits/clients.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    assert main(["calibrate", "run", "--target_risk", "0.2", "--confidence", "0.8", "--familywise"]) == 0
    before = rows()
    assert ExitPolicy.load(Path("run/exits/client-001.json")).simultaneous_clients == 2
    capsys.readouterr()
    assert main(["calibrate", "run", "--client", "1", "--target_risk", "0.4"]) == 0
    printed = capsys.readouterr().out
    assert "the replaced policy was one of 2 calibrated with --familywise" in printed
    after = rows()
    assert after[0] == before[0]
    assert (before[1]["certified_risk"], after[1]["certified_risk"]) == ("0.2", "0.4")
    assert ExitPolicy.load(Path("run/exits/client-001.json")).simultaneous_clients == 1
    assert main(["calibrate", "run", "--client", "1", "--target_risk", "0.4"]) == 0
    assert "--familywise" not in capsys.readouterr().out
    assert rows() == after
    table, policy = Path("run/exits/clients.csv"), Path("run/exits/client-001.json")
    stored = Path("run/exits/clients.json")
    evaluated: list[int] = []

    def count(client: Any, policy: ExitPolicy, groups: Any = None) -> Any:
        evaluated.append(client.number)
        return client_exit_report(client, policy)

    monkeypatch.setattr(calibrate, "client_exit_report", count)
    whole = stored.read_bytes()
    for content in (whole, b"", b"\xff\xfe", whole[:-40], whole.replace(b'"exits": 2', b'"exits": 3')):
        stored.write_bytes(content)
        table.write_bytes(b"client\n1\n")
        policy.write_text(policy.read_text().replace('"simultaneous_clients": 1', '"simultaneous_clients": "two"'))
        evaluated.clear()
        assert main(["calibrate", "run", "--client", "1", "--target_risk", "0.4"]) == 0
        assert rows() == after
        assert evaluated == ([1] if content == whole else [1, 0])
        assert stored.read_bytes() == whole
    assert main(["calibrate", "run", "--client", "0", "--target_risk", "0.4"]) == 0
    assert [row["certified_risk"] for row in rows()] == ["0.4", "0.4"]


def test_calibrate_method_that_trains_on_validation_raises(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    assert fit(ready / "blobs.npz", "learned", "--method=FedType", "--client.exits=2") == 0
    capsys.readouterr()
    assert main(["calibrate", "learned"]) == 2
    assert "client 0: expected a method that does not train on validation samples" in error_line()
    assert main(["report", "learned", "--output=page"]) == 2
    assert "expected a method that does not train on validation samples" in error_line()
    images, labels = pooled(ready)
    federation, *_ = open_finished("test", Path("learned"), in_process=True)
    indices = federation.data.clients[1].validation.numpy()
    np.savez("more.npz", test_images=images[indices], test_labels=labels[indices])
    assert main(["calibrate", "learned", "--client=0", "--input=more.npz"]) == 2
    assert f"got {len(indices)} of {len(indices)} with which the network was trained" in error_line()
    assert not Path("learned/exits").exists()


def test_calibrate_input_used_by_do_no_harm_raises(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    assert fit(ready / "blobs.npz", "chosen", *SAFE, "--do_no_harm.confidence=0.9") == 0
    images, labels = pooled(ready)
    federation, *_ = open_finished("test", Path("chosen"), in_process=True)
    by = federation.data.clients[0].holdout.numpy()
    np.savez("more.npz", test_images=images[by], test_labels=labels[by])
    capsys.readouterr()
    assert main(["calibrate", "chosen", "--client=0", "--input=more.npz"]) == 2
    assert "or selected" in error_line()


def test_calibrate_input_with_repeated_images_raises(here: Path, error_line: Callable[[], str]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    twice, labels = np.concatenate([images, images[:5]]), np.arange(25) % 3
    np.savez("more.npz", test_images=twice, test_labels=labels)
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "--input: expected independent images, got 5 of 25 that repeat another one" in error_line()


def test_calibrate_exits_locked_by_another_call_changes_no_policy(
    here: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    assert main(["calibrate", "run", "--target_risk=0.3"]) == 0
    before = {path: path.read_bytes() for path in Path("run/exits").iterdir()}
    monkeypatch.setattr(folder_lock, "LOCK_SECONDS", 0.0)
    for options in ([], ["--client=1"]):
        with FileLock("run/exits/.lock"):  # as in `monitor --apply`
            assert main(["calibrate", "run", "--target_risk=0.2", *options]) == 2
        assert "run/exits: locked by another call of fedekd. Repeat the command" in error_line()
        assert {path: path.read_bytes() for path in Path("run/exits").iterdir()} == before
    assert main(["calibrate", "run", "--target_risk=0.2"]) == 0


def test_calibrate_closed_exit_prints_required_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "run", "--target_risk", "0.001", "--client", "1"]) == 0
    assert [path.name for path in Path("run/exits").glob("client*")] == ["client-001.json"]
    policy = ExitPolicy.load(Path("run/exits/client-001.json"))
    printed = capsys.readouterr().out
    assert policy.thresholds[0] == float("inf")
    if policy.required_samples[0] is not None:
        needed = policy.required_samples[0]
        expected = f"at least about {needed} calibration samples are needed, there are {policy.samples}"
        assert f"exit 1: closed: {expected}" in printed
    assert "closed" in printed
    assert "mean FLOPs saved" in printed


@pytest.mark.parametrize("mode", ["crc", "safekd_code", "empirical"])
def test_calibrate_mode_without_guarantee_prints_warning(
    mode: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = "max_softmax" if mode == "safekd_code" else "margin"
    assert main(["calibrate", "run", "--mode", mode, "--client", "0", "--score", score]) == 0
    printed = capsys.readouterr().out
    assert f"warning: mode {mode} has no guarantee; ltt and ltt_joint have one" in printed
    assert "≤" not in printed
    policy = ExitPolicy.load(Path("run/exits/client-000.json"))
    assert (policy.certified, policy.score) == ((False, False), score)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "calibrate: expected RUN or --site FOLDER, got none"),
        (["run", "--target_risk", "0"], "--target_risk: expected a number in (0, 1), got 0.0"),
        (["run", "--alpha", "0.1"], "--alpha: renamed to --target_risk"),
        (["run", "--delta=0.1"], "--delta: renamed to --confidence"),
        (["run", "--simultaneous"], "--simultaneous: renamed to --familywise"),
        (
            ["run", "--mode", "safekd_code", "--score", "margin"],
            "score: expected max_softmax for mode 'safekd_code', got 'margin'",
        ),
        (["run", "--target_risk", "1.5"], "--target_risk: expected a number in (0, 1), got 1.5"),
        (["run", "--target_risk", "nan"], "target_risk"),
        (["run", "--target_risk", "much"], "target_risk"),
        (["run", "--confidence", "1"], "--confidence: expected a number in (0, 1), got 1.0"),
        (["run", "--confidence", "-0.1"], "--confidence: expected a number in (0, 1), got -0.1"),
        (["run", "--mode", "lt"], "got 'lt'. Did you mean 'ltt'"),
        (["run", "--score", "margn"], "got 'margn'. Did you mean 'margin'"),
        (["run", "--client", "2"], "--client: expected 0..1, got '2'"),
        (["run", "--client", "-1"], "--client: expected 0..1, got '-1'"),
        (["run", "--client", "one"], "client"),
        (["run", "--clent", "0"], "--clent"),
        (["elsewhere"], "calibrate: expected the folder of a run, got 'elsewhere'"),
        (
            ["run", "--input", "x.csv"],
            "--input: expected labelled images: an .npz file, a folder or a manifest, got x.csv",
        ),
        (["run", "--input", "x.npz"], "x.npz"),
    ],
)
def test_calibrate_invalid_option_prints_one_line_error(
    arguments: list[str], words: str, here: Path, error_line: Callable[[], str]
) -> None:
    before = sorted(here.rglob("*"))
    assert main(["calibrate", *arguments]) == 2
    assert words in error_line()
    assert sorted(here.rglob("*")) == before


def test_calibrate_unfinished_run_raises(here: Path, error_line: Callable[[], str]) -> None:
    Path("run/summary.json").unlink()
    assert main(["calibrate", "run"]) == 2
    assert "expected a finished run, got run, which is not. Go on with: fit --resume run" in error_line()
    assert not Path("run/exits").exists()


def test_calibrate_missing_checkpoint_raises(here: Path, error_line: Callable[[], str]) -> None:
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    assert main(["calibrate", "run"]) == 2
    assert "checkpoint" in error_line()


def test_calibrate_run_without_exits_raises(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    assert fit(ready / "blobs.npz", "plain", "--method=Local") == 0
    capsys.readouterr()
    assert main(["calibrate", "plain"]) == 2
    message = "private model of client 0: expected a network with exits, got a PrivateCNN without exits"
    assert message in error_line()
    assert not Path("plain/exits").exists()


def test_calibrate_regression_run_raises(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    assert fit(ready / "blobs.npz", "grades", "--method=Local", "--client.exits=2", "--task=regression") == 0
    capsys.readouterr()
    assert main(["calibrate", "grades"]) == 2
    assert "regression" in error_line()


def trained_on(ready: Path, client: int) -> np.ndarray:
    federation, *_ = open_finished("test", Path("run"), in_process=True)
    return federation.data.clients[client].train.numpy()


def test_calibrate_input_with_training_images_raises(here: Path, ready: Path, error_line: Callable[[], str]) -> None:
    images, labels = pooled(ready)
    own = trained_on(ready, 0)[:7]
    strange = np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    mixed = np.concatenate([strange, images[own]])
    np.savez("more.npz", test_images=mixed, test_labels=np.concatenate([labels[:20], labels[own]]))
    before = sorted(here.rglob("*"))
    assert main(["calibrate", "run", "--client", "0", "--input", "more.npz"]) == 2
    assert "--input: expected unseen images, got 7 of 27 with which the network was trained" in error_line()
    assert sorted(here.rglob("*")) == before


def test_calibrate_input_with_training_images_of_other_client_raises(
    here: Path, ready: Path, error_line: Callable[[], str]
) -> None:
    images, labels = pooled(ready)
    indices = trained_on(ready, 1)
    np.savez("more.npz", test_images=images[indices], test_labels=labels[indices])
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "got 154 of 154 with which the network was trained" in error_line()
    assert not Path("run/exits").exists()


def test_calibrate_failure_of_later_client_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    def restored(self: Orchestrator) -> list[Client]:
        clients = real(self)
        for parameter in clients[1].networks["private"].parameters():
            parameter.data.fill_(float("nan"))
        return clients

    real = Orchestrator.load_clients
    monkeypatch.setattr(Orchestrator, "load_clients", restored)
    assert main(["calibrate", "run"]) == 2
    assert "diverged" in error_line()
    assert not Path("run/exits").exists()


def test_calibrate_input_replaces_held_out_splits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(90) % 3
    images = (rng.integers(0, 80, (90, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    np.savez("more.npz", test_images=images, test_labels=labels[:, None])
    assert main(["calibrate", "run", "--client", "0", "--input", "more.npz"]) == 0
    policy = ExitPolicy.load(Path("run/exits/client-000.json"))
    assert (policy.samples, policy.tuning_samples) == (60, 30)


def test_calibrate_input_of_every_format_gives_the_same_policy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    labels = np.sort(np.arange(90) % 3)
    images = (rng.integers(0, 80, (90, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    np.savez("more.npz", images=images, labels=labels)
    lines = ["path,label"]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path(f"more/{label}/{index:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        lines.append(f"{path},{label}")
    Path("more.csv").write_text("\n".join(lines))
    policies = []
    for source in ("more.npz", "more", "more.csv"):
        assert main(["calibrate", "run", "--client", "0", "--input", source]) == 0
        policies.append(Path("run/exits/client-000.json").read_bytes())
    assert policies[0] == policies[1] == policies[2]


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (
            pixels(9, 9, 8),
            np.arange(9) % 3,
            "--input: expected images of (1, 8, 8) (channels, height, width) as in training, got (1, 9, 8)",
        ),
        (pixels(9, 8, 8, 3), np.arange(9) % 3, "got (3, 8, 8)"),
        (pixels(9, 8, 8), np.arange(9), "got the class '3'"),
        (pixels(9, 8, 8).astype(np.uint16), np.arange(9) % 3, "--input: expected images with 8 bits, as in training"),
        (np.full((9, 8, 8), 2, np.float32), np.arange(9) % 3, "expected float32 values in 0..1, got 2\n"),
        (
            pixels(1, 8, 8),
            np.zeros(1, int),
            "expected at least 1 tuning and 1 calibration sample, got 0 and 1",
        ),
    ],
)
def test_calibrate_input_of_wrong_format_raises(
    images: np.ndarray, labels: np.ndarray, words: str, here: Path, error_line: Callable[[], str]
) -> None:
    np.savez("more.npz", test_images=images, test_labels=labels)
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    text = error_line()
    assert words in text
    assert "--input" in text or "tuning" in text
    assert not Path("run/exits").exists()


def test_calibrate_truncated_input_raises(here: Path, ready: Path, error_line: Callable[[], str]) -> None:
    Path("more.npz").write_bytes((ready / "blobs.npz").read_bytes()[:500])
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "more.npz" in error_line()


def test_calibrate_held_out_copies_of_training_images_print_warning(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use a data set with copies of each image in all splits."""
    arrays = arrays_of(ready)
    few = {name: np.concatenate([array[:60]] * 5) if len(array) else array for name, array in arrays.items()}
    np.savez("few.npz", **few)
    assert fit(Path("few.npz"), "few", *SAFE, clients=1) == 0
    capsys.readouterr()
    assert main(["calibrate", "few"]) == 0
    assert "held-out images are, pixel by pixel, also training images" in capsys.readouterr().out


def test_calibrate_help_lists_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(
        option in text
        for option in ("--target_risk", "--confidence", "--mode", "--score", "--client", "--familywise", "--input")
    )
    assert main(["--help"]) == 0
    assert "calibrate" in capsys.readouterr().out


def test_calibrate_policy_is_strict_json(here: Path) -> None:
    assert main(["calibrate", "run", "--client", "0"]) == 0
    values = json.loads(Path("run/exits/client-000.json").read_text(), parse_constant=pytest.fail)
    assert values["thresholds"][-1] == "-inf"
    assert {"target_risk", "confidence", "samples", "exit_counts", "error_counts", "network", "versions"} <= set(values)


def test_calibrate_input_of_an_8_bit_site_is_compared_with_its_training_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
    capsys: pytest.CaptureFixture[str],
    error_line: Callable[[], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    Path("sites").mkdir()
    for name, largest, dtype in (("eight", 255, np.uint8), ("sixteen", 65_535, np.uint16)):  # joined as float32
        images = rng.integers(0, largest, (60, 8, 8), endpoint=True).astype(dtype)
        np.savez(f"sites/{name}.npz", images=images, labels=labels)
    options = ["--data.sites=sites", "--rounds=1", "--data.batch_size=16", "--method=Local", "--client.exits=2"]
    assert main(["fit", *FAST, *options, "--output=run"]) == 0
    capsys.readouterr()
    for name in ("eight", "sixteen"):
        command = ["calibrate", "run", f"--client={name}", f"--input=sites/{name}.npz"]
        assert main([*command, "--target_risk=0.3", "--confidence=0.5"]) == 2
        assert "--input: expected unseen images, got " in error_line()
