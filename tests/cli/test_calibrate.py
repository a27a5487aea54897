"""`calibrate RUN`, in this process."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedekd.cli import main
from fedekd.configuration.load_run import open_finished
from fedekd.early_exit import ExitPolicy
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
        patch.setattr("fedekd.federation.RunFolder.draw", lambda *arguments: None)
        assert fit(npz, "run", *SAFE) == 0
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder with a copy of the run, and the data set one above."""
    shutil.copytree(ready / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    return text


def arrays_of(ready: Path) -> dict[str, np.ndarray]:
    with np.load(ready / "blobs.npz") as file:
        return dict(file)


def pooled(ready: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, numbered as in the run."""
    arrays = arrays_of(ready)
    parts = [(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "val", "test")]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


def test_every_client_gets_a_policy_and_its_exits_are_told(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "run", "--alpha", "0.2", "--delta", "0.2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    files = sorted(path.name for path in Path("run/exits").glob("*.json"))
    assert files == ["client-000.json", "client-001.json"]
    clients = Path("run/exits/clients.csv").read_text().splitlines()
    assert clients[0].startswith("client,model,exits,open,leaving,saved,certified_risk,seen_risk,accuracy")
    assert [line.partition(",")[0] for line in clients[1:]] == ["0", "1"]
    for number, name in enumerate(files):
        policy = ExitPolicy.load(Path("run/exits", name))
        assert (policy.alpha, policy.delta, policy.mode, policy.score) == (0.2, 0.2, "ltt", "max_softmax")
        assert f"client {number}: alpha 0.2, delta 0.2, ltt, max_softmax" in printed.out
        assert f"written to run/exits/{name}" in printed.out
        assert sum(policy.leaving) == policy.samples
        assert len(policy.network) == 64
        assert str(here) not in Path("run/exits", name).read_text()
    assert len({ExitPolicy.load(Path("run/exits", name)).network for name in files}) == 2
    assert "FLOPs saved" in printed.out
    before = [Path("run/exits", name).read_bytes() for name in files]
    assert main(["calibrate", "run", "--alpha", "0.2", "--delta", "0.2"]) == 0
    assert [Path("run/exits", name).read_bytes() for name in files] == before


def test_the_table_of_all_clients_follows_the_policy_of_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> list[dict[str, str]]:
        with Path("run/exits/clients.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    assert main(["calibrate", "run", "--alpha", "0.2", "--delta", "0.2", "--simultaneous"]) == 0
    before = rows()
    assert ExitPolicy.load(Path("run/exits/client-001.json")).together == 2
    capsys.readouterr()
    assert main(["calibrate", "run", "--client", "1", "--alpha", "0.4"]) == 0
    printed = capsys.readouterr().out
    assert "one of 2 made to hold at once (--simultaneous): with the new one they no longer do" in printed
    after = rows()
    assert after[0] == before[0]
    assert (before[1]["certified_risk"], after[1]["certified_risk"]) == ("0.2", "0.4")
    assert ExitPolicy.load(Path("run/exits/client-001.json")).together == 1
    assert main(["calibrate", "run", "--client", "1", "--alpha", "0.4"]) == 0
    assert "at once" not in capsys.readouterr().out
    assert rows() == after
    table, policy = Path("run/exits/clients.csv"), Path("run/exits/client-001.json")
    whole = table.read_bytes()
    for damaged in (
        b"",
        b"\xff\xfe",
        b"client\n1\n",
        whole[:-40],
        whole + b"x" * 7,
        whole.replace(b"\n0,", b"\nzero,"),
    ):
        table.write_bytes(damaged)
        policy.write_text(policy.read_text().replace('"together": 1', '"together": "two"'))
        assert main(["calibrate", "run", "--client", "1", "--alpha", "0.4"]) == 0
        assert rows() == after[1:]


def test_nothing_is_promised_on_samples_that_a_method_learns_from(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(ready / "blobs.npz", "learned", "--method=FedType", "--client.exits=2") == 0
    capsys.readouterr()
    assert main(["calibrate", "learned"]) == 2
    assert "client 0 was trained by a method that learns from its validation samples" in told(capsys)
    assert main(["report", "learned", "--output=page"]) == 2
    assert "learns from its validation samples" in told(capsys)
    images, labels = pooled(ready)
    federation, *_ = open_finished("test", Path("learned"), in_process=True)
    theirs = federation.data.clients[1].validation.numpy()
    np.savez("more.npz", test_images=images[theirs], test_labels=labels[theirs])
    assert main(["calibrate", "learned", "--client=0", "--input=more.npz"]) == 2
    assert f"{len(theirs)} of {len(theirs)} images are among those that the network was trained on" in told(capsys)
    assert not Path("learned/exits").exists()


def test_what_a_kept_model_was_chosen_by_is_refused(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(ready / "blobs.npz", "chosen", *SAFE, "--do_no_harm.confidence=0.9") == 0
    images, labels = pooled(ready)
    federation, *_ = open_finished("test", Path("chosen"), in_process=True)
    by = federation.data.clients[0].holdout.numpy()
    np.savez("more.npz", test_images=images[by], test_labels=labels[by])
    capsys.readouterr()
    assert main(["calibrate", "chosen", "--client=0", "--input=more.npz"]) == 2
    assert "or chosen by" in told(capsys)


def test_images_that_are_there_twice_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    twice, labels = np.concatenate([images, images[:5]]), np.arange(25) % 3
    np.savez("more.npz", test_images=twice, test_labels=labels)
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "--input: 5 of 25 images repeat another one, pixel by pixel" in told(capsys)


def test_an_exit_that_stays_closed_says_what_would_open_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "run", "--alpha", "0.001", "--client", "1"]) == 0
    assert [path.name for path in Path("run/exits").iterdir()] == ["client-001.json"]
    policy = ExitPolicy.load(Path("run/exits/client-001.json"))
    printed = capsys.readouterr().out
    assert policy.thresholds[0] == float("inf")
    if policy.needed[0] is not None:
        expected = f"about {policy.needed[0]} calibration samples would open it, and there are {policy.samples}"
        assert f"exit 1: closed: {expected}" in printed
    assert "closed" in printed
    assert "an image saves" in printed


@pytest.mark.parametrize("mode", ["crc", "released", "empirical"])
def test_rules_that_promise_nothing_say_so(mode: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = "max_softmax" if mode == "released" else "margin"
    assert main(["calibrate", "run", "--mode", mode, "--client", "0", "--score", score]) == 0
    printed = capsys.readouterr().out
    assert f"mode {mode} promises nothing of these exits; ltt and path do" in printed
    assert "≤" not in printed
    policy = ExitPolicy.load(Path("run/exits/client-000.json"))
    assert (policy.certified, policy.score) == ((False, False), score)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "calibrate needs the folder of a run"),
        (["run", "--alpha", "0"], "--alpha is 0.0, and must lie between 0 and 1"),
        (["run", "--mode", "released", "--score", "margin"], "mode 'released' compares probabilities"),
        (["run", "--alpha", "1.5"], "alpha is 1.5"),
        (["run", "--alpha", "nan"], "alpha is 'nan'"),
        (["run", "--alpha", "much"], "alpha"),
        (["run", "--delta", "1"], "delta is 1.0"),
        (["run", "--delta", "-0.1"], "delta is -0.1"),
        (["run", "--mode", "lt"], "mode is 'lt', which is not known; did you mean 'ltt'"),
        (["run", "--score", "margn"], "score is 'margn', which is not known; did you mean 'margin'"),
        (["run", "--client", "2"], "--client is 2, and this run has the clients 0..1"),
        (["run", "--client", "-1"], "--client is -1"),
        (["run", "--client", "one"], "client"),
        (["run", "--clent", "0"], "--clent"),
        (["elsewhere"], "calibrate elsewhere: there is no run"),
        (["run", "--input", "x.csv"], "--input x.csv: an .npz file"),
        (["run", "--input", "x.npz"], "x.npz"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    assert main(["calibrate", *arguments]) == 2
    assert words in told(capsys)
    assert sorted(here.rglob("*")) == before


def test_unfinished_runs_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/summary.json").unlink()
    assert main(["calibrate", "run"]) == 2
    assert "run is not finished; go on with: fit --resume run" in told(capsys)
    assert not Path("run/exits").exists()


def test_a_lost_checkpoint_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    assert main(["calibrate", "run"]) == 2
    assert "checkpoint" in told(capsys)


def test_runs_without_exits_are_told_how_to_get_some(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(ready / "blobs.npz", "plain", "--method=Local") == 0
    capsys.readouterr()
    assert main(["calibrate", "plain"]) == 2
    assert "private model of client 0 is a PrivateCNN without exits; train one with exits: --method SafeKD" in told(
        capsys
    )
    assert not Path("plain/exits").exists()


def test_regression_runs_are_refused(here: Path, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(ready / "blobs.npz", "grades", "--method=Local", "--client.exits=2", "--task=regression") == 0
    capsys.readouterr()
    assert main(["calibrate", "grades"]) == 2
    assert "regression" in told(capsys)


def trained_on(ready: Path, client: int) -> np.ndarray:
    federation, *_ = open_finished("test", Path("run"), in_process=True)
    return federation.data.clients[client].train.numpy()


def test_images_that_were_trained_on_are_refused_and_counted(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = pooled(ready)
    own = trained_on(ready, 0)[:7]
    strange = np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    mixed = np.concatenate([strange, images[own]])
    np.savez("more.npz", test_images=mixed, test_labels=np.concatenate([labels[:20], labels[own]]))
    before = sorted(here.rglob("*"))
    assert main(["calibrate", "run", "--client", "0", "--input", "more.npz"]) == 2
    assert "--input: 7 of 27 images are among those that the network was trained on" in told(capsys)
    assert sorted(here.rglob("*")) == before


def test_what_another_client_was_trained_on_is_refused_and_nothing_written(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = pooled(ready)
    theirs = trained_on(ready, 1)
    np.savez("more.npz", test_images=images[theirs], test_labels=labels[theirs])
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "154 of 154 images are among those that the network was trained on" in told(capsys)
    assert not Path("run/exits").exists()


def test_nothing_is_written_where_a_later_client_fails(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def restored(self: Orchestrator) -> list[Client]:
        clients = real(self)
        for parameter in clients[1].networks["private"].parameters():
            parameter.data.fill_(float("nan"))
        return clients

    real = Orchestrator.load_clients
    monkeypatch.setattr(Orchestrator, "load_clients", restored)
    assert main(["calibrate", "run"]) == 2
    assert "the network diverged" in told(capsys)
    assert not Path("run/exits").exists()


def test_other_labelled_images_are_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(90) % 3
    images = (rng.integers(0, 80, (90, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    np.savez("more.npz", test_images=images, test_labels=labels[:, None])
    assert main(["calibrate", "run", "--client", "0", "--input", "more.npz"]) == 0
    policy = ExitPolicy.load(Path("run/exits/client-000.json"))
    assert (policy.samples, policy.tuning_samples) == (60, 30)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (
            np.zeros((9, 9, 8), np.uint8),
            np.arange(9) % 3,
            "images of (1, 9, 8), and the network was trained on (1, 8, 8)",
        ),
        (np.zeros((9, 8, 8, 3), np.uint8), np.arange(9) % 3, "images of (3, 8, 8)"),
        (np.zeros((9, 8, 8), np.uint8), np.arange(9), "label 8"),
        (np.zeros((9, 8, 8), np.float32), np.arange(9) % 3, "float32"),
        (np.zeros((1, 8, 8), np.uint8), np.zeros(1, int), "0 tuning and 1 calibration samples"),
    ],
)
def test_images_that_do_not_fit_are_told(
    images: np.ndarray, labels: np.ndarray, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("more.npz", test_images=images, test_labels=labels)
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    text = told(capsys)
    assert words in text
    assert "--input" in text or "tuning" in text
    assert not Path("run/exits").exists()


def test_a_file_cut_short_is_told(here: Path, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.npz").write_bytes((ready / "blobs.npz").read_bytes()[:500])
    assert main(["calibrate", "run", "--input", "more.npz"]) == 2
    assert "more.npz" in told(capsys)


def test_repeated_images_are_told(here: Path, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set that holds each image several times: on both sides of every split."""
    arrays = arrays_of(ready)
    few = {name: np.concatenate([array[:60]] * 5) if len(array) else array for name, array in arrays.items()}
    np.savez("few.npz", **few)
    assert fit(Path("few.npz"), "few", *SAFE, clients=1) == 0
    capsys.readouterr()
    assert main(["calibrate", "few"]) == 0
    assert "held-out images are, pixel by pixel, also among those trained on" in capsys.readouterr().out


def test_help_tells_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--alpha", "--delta", "--mode", "--score", "--client", "--input"))
    assert main(["--help"]) == 0
    assert "calibrate" in capsys.readouterr().out


def test_a_policy_is_json_that_others_can_read(here: Path) -> None:
    assert main(["calibrate", "run", "--client", "0"]) == 0
    values = json.loads(Path("run/exits/client-000.json").read_text(), parse_constant=pytest.fail)
    assert values["thresholds"][-1] == "-inf"
    assert {"alpha", "delta", "samples", "leaving", "errors", "network", "versions"} <= set(values)
