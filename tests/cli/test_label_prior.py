"""Option `--label_prior` of `predict`, in this process."""

from __future__ import annotations

import csv
import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedekd.methods
from fedekd.cli import main
from fedekd.cli.label_prior import parse_label_prior
from fedekd.configuration.load_run import open_finished
from fedekd.early_exit.scoring import network_input
from fedekd.errors import UserError
from fedekd.functional import estimate_label_prior
from fedekd.methods import CAFEDistill, Client, FedAvg, FedDyn, FedProx, Method

IMAGES = np.random.default_rng(5).integers(0, 256, (150, 8, 8), dtype=np.uint8)
RUNS = {
    "plain": ("--method=Local",),
    "exits": ("--method=SafeKD", "--client.exits=2"),
    "ensemble": ("--method=ProxyEnsemble", "--method.proxy_epochs=1", "--method.finetune_epochs=1"),
    "balanced": ("--method=Local", "--client.class_weights=balanced"),
    "adopted": ("--method=FedAvg", "--data.alpha=100", "--do_no_harm.confidence=0.5", "--do_no_harm.margin=0.95"),
    "kept": ("--method=FedAvg", "--do_no_harm.confidence=0.999999999"),
    "grades": ("--method=Local", "--task=regression"),
}


METHODS = [
    each
    for name in fedekd.methods.__all__
    if inspect.isclass(each := getattr(fedekd.methods, name)) and issubclass(each, Method)
    if not inspect.isabstract(each)
]


@pytest.fixture(scope="module")
def ready(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run per entry of `RUNS`, each with two clients of different class mix."""
    folder = tmp_path_factory.mktemp("prior")
    npz = write_blobs(folder / "blobs.npz", num_samples=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        for name, options in RUNS.items():
            assert main([
                "fit", f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=0.7", "--data.batch_size=16",
                "--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null",
                "--quiet", "--rounds=2", f"--output={name}", "--client.optimizer.lr=0.001", *options,
            ]) == 0  # fmt: skip
        assert main(["calibrate", "exits", "--target_risk=0.45", "--confidence=0.55"]) == 0
        np.savez("images.npz", images=IMAGES)
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder with copies of all that."""
    shutil.copytree(ready, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def predict(run: str, *options: str) -> list[dict[str, str]]:
    assert main(["predict", run, "--input=images.npz", "--client=0", *options]) == 0
    with Path("predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def client_of(run: str) -> Client:
    return open_finished("test", Path(run), in_process=True)[0].load_clients()[0]


def posteriors(run: str) -> tuple[list[list[float]], list[float]]:
    """Posteriors of the deployed network, and its prior, both without the code under test."""
    client = client_of(run)
    network = client.deployed_model.eval()
    with torch.no_grad():
        output = network(network_input(network, torch.from_numpy(IMAGES)[:, None]))
    logits: Tensor = output if isinstance(output, Tensor) else output[-1]
    labels = client.samples.targets[client.splits.train].tolist()
    prior = [(labels.count(c) + 1) / (len(labels) + logits.shape[1]) for c in range(logits.shape[1])]
    with torch.no_grad():
        held_out = network(network_input(network, client.samples.inputs[client.splits.validation]))
    held_out = held_out if isinstance(held_out, Tensor) else held_out[-1]
    rows = [*held_out.double().softmax(1).tolist(), prior]
    prior = [sum(row[c] for row in rows) / len(rows) for c in range(logits.shape[1])]
    return logits.double().softmax(1).tolist(), prior


def literal_predictions(run: str, target: list[float]) -> list[tuple[int, float]]:
    rows, source = posteriors(run)
    result = []
    for row in rows:
        joint = [p * t / s for p, t, s in zip(row, target, source, strict=True)]
        result.append((joint.index(max(joint)), max(joint) / sum(joint)))
    return result


def assert_rows(found: list[dict[str, str]], expected: list[tuple[int, float]]) -> None:
    assert [int(row["label"]) for row in found] == [label for label, _ in expected]
    assert [float(row["score"]) for row in found] == pytest.approx([score for _, score in expected], abs=2e-6)


@pytest.mark.parametrize("run", ["plain", "ensemble"])
@pytest.mark.parametrize("target", [[0.05, 0.15, 0.8], [0.0, 0.5, 0.5]])
def test_predict_given_label_prior_corrects_the_deployed_model(run: str, target: list[float], here: Path) -> None:
    served = predict(run)
    found = predict(run, f"--label_prior={target}")
    assert_rows(found, literal_predictions(run, target))
    assert found != served
    if target[0] == 0:
        assert "0" not in {row["label"] for row in found}


def test_predict_network_prior_is_the_identity_and_the_training_prior_is_not(here: Path) -> None:
    served = predict("plain")
    network = posteriors("plain")[1]
    assert_rows(
        predict("plain", f"--label_prior={network}"), [(int(row["label"]), float(row["score"])) for row in served]
    )
    training = client_of("plain").label_prior.tolist()
    assert predict("plain", f"--label_prior={training}") != served


def warnings_of(run: str, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    capsys.readouterr()
    predict(run, *options)
    return [line for line in capsys.readouterr().err.splitlines() if "--label_prior" in line]


def test_predict_label_prior_of_an_adopted_average_prints_two_warnings(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client_of("adopted").deployed_role == "private"
    average, compared = warnings_of("adopted", capsys, "--label_prior=uniform")
    assert "client 0 serves the server's average of FedAvg, which was not trained on its class mix" in average
    assert "do_no_harm compared the uncorrected outputs of client 0" in compared
    assert warnings_of("adopted", capsys) == []


@pytest.mark.parametrize("run", ["kept", "plain", "ensemble"])
def test_predict_label_prior_of_a_network_trained_at_the_client_does_not_warn(
    run: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (client_of(run).deployed_role == "local") == (run == "kept")
    assert warnings_of(run, capsys, "--label_prior=uniform") == []


@pytest.mark.parametrize("method", [FedAvg, FedProx, FedDyn])
def test_serves_average_without_fine_tuning_only(method: type[FedAvg]) -> None:
    assert method().serves_average
    assert not method(finetune_epochs=1).serves_average


def test_serves_average_of_every_other_method() -> None:
    averages = {each.__name__ for each in METHODS if each().serves_average}
    assert averages == {"FedAvg", "FedProx", "FedDyn", "DepthFL", "ScaleFL"}
    assert CAFEDistill("paper").serves_average


def test_predict_uniform_label_prior(here: Path) -> None:
    served = predict("plain")
    found = predict("plain", "--label_prior=uniform")
    assert_rows(found, literal_predictions("plain", [1 / 3] * 3))
    assert found != served


def test_predict_label_prior_train_is_the_default_and_changes_no_byte(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict("exits")
    before = Path("predictions.csv").read_bytes()
    monkeypatch.setattr("fedekd.cli.predict.adjust_log_prior", None)
    predict("exits", "--label_prior=train")
    assert Path("predictions.csv").read_bytes() == before
    assert len({line.split(",")[2] for line in before.decode().splitlines()[1:]}) == 2  # both exits


def test_predict_estimated_label_prior_is_printed_and_can_be_given(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = predict("plain", "--label_prior=estimated")
    before = Path("predictions.csv").read_bytes()
    printed = capsys.readouterr().out.splitlines()
    [line] = [line for line in printed if "label prior" in line]
    values = line.removeprefix("estimated label prior: ")
    rows, source = posteriors("plain")
    expected = estimate_label_prior(torch.tensor(rows), torch.tensor(source, dtype=torch.float64), strength=30.0)
    assert [float(value) for value in values.strip("[]").split(", ")] == pytest.approx(expected.tolist(), abs=1e-6)
    assert_rows(found, literal_predictions("plain", expected.tolist()))
    predict("plain", f"--label_prior={values}")
    assert Path("predictions.csv").read_bytes() == before
    capsys.readouterr()
    predict("plain")
    assert "label prior" not in capsys.readouterr().out


def test_predict_label_prior_uses_no_exit_policy_and_warns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = predict("exits", "--label_prior=uniform")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --label_prior: the exit policy of client 0 is not used, because its guarantee")
    assert warning.count("\n") == 1
    assert {row["exit"] for row in found} == {"2"}
    assert_rows(found, literal_predictions("exits", [1 / 3] * 3))
    shutil.rmtree("exits/exits")
    assert predict("exits", "--label_prior=uniform") == found
    assert capsys.readouterr().err == ""


def test_client_label_prior_counts_class_weights(here: Path) -> None:
    client = client_of("plain")
    labels = client.samples.targets[client.splits.train].tolist()
    counts = [labels.count(c) for c in range(3)]
    assert client.label_prior.tolist() == pytest.approx([(n + 1) / (len(labels) + 3) for n in counts], abs=1e-12)
    assert len(set(counts)) > 1
    # Balanced weights give every class that is there the same weight.
    assert client_of("balanced").label_prior.tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("run", "value", "words"),
    [
        ("plain", "unifrom", "expected a list of one probability per class, or a name, got 'unifrom'. Did you mean"),
        ("plain", "", "or a name, got ''. Choose from: estimated, train, uniform"),
        ("plain", "0.5", "or a name, got '0.5'"),
        ("plain", "[0.5, 0.5]", "expected 3 probabilities, got 2"),
        ("plain", "[0.5, 0.25, 0.25, 0]", "expected 3 probabilities, got 4"),
        ("plain", "[0.5, 0.5, 0.00001]", "expected probabilities with sum 1, got 1.00001"),
        ("plain", "[0, 0, 0]", "expected probabilities with sum 1, got 0.0"),
        ("plain", "[]", "expected one probability per class, got []. The list is empty."),
        ("plain", "[1.5, -0.5, 0]", "expected numbers from 0 to 1, as in [0.2, 0.8], got '[1.5, -0.5, 0]'"),
        ("plain", "[NaN, 0.5, 0.5]", "expected numbers from 0 to 1, as in [0.2, 0.8], got '[NaN, 0.5, 0.5]'"),
        ("plain", "[true, 0, 0]", "expected numbers from 0 to 1"),
        ("plain", "[[1], 0, 0]", "expected numbers from 0 to 1"),
        ("plain", "[0.5, 0.5", "expected numbers from 0 to 1, as in [0.2, 0.8], got '[0.5, 0.5'"),
        ("plain", "[" * 100_000, "expected numbers from 0 to 1"),
        ("grades", "uniform", "expected train for a run of regression, got 'uniform'"),
        ("grades", "[1.0]", "expected train for a run of regression, got [1.0]"),
    ],
)
def test_predict_invalid_label_prior_prints_one_line_error(
    run: str, value: str, words: str, here: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["predict", run, "--input=images.npz", "--client=0", f"--label_prior={value}"]) == 2
    line = error_line()
    assert line.startswith("error: --label_prior: expected ")
    assert words in line
    assert len(line) <= 400
    assert not Path("predictions.csv").exists()


def test_predict_regression_with_label_prior_train(here: Path) -> None:
    assert list(predict("grades", "--label_prior=train")[0]) == ["image", "value", "exit"]


def test_parse_label_prior_accepts_sums_within_tolerance() -> None:
    assert parse_label_prior("[0.5, 0.4999995]") == (0.5, 0.4999995)
    assert parse_label_prior(" [1, 0]") == (1.0, 0.0)
    assert parse_label_prior("estimated") == "estimated"
    with pytest.raises(UserError, match="sum 1"):
        parse_label_prior("[0.5, 0.499998]")
    thirds = [round(1 / 200, 9)] * 200
    assert math.fsum(parse_label_prior(str(thirds))) == pytest.approx(1)  # type: ignore[arg-type]
