"""Command `export`, in this process: what clients deploy, bad input, interrupted writes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedekd.cli import main
from fedekd.configuration.trained import open_trained
from fedekd.early_exit.statement import exit_guarantee
from fedekd.errors import UserError
from fedekd.export import comparison, load_network, load_served
from fedekd.export.comparison import framework_outputs, near_thresholds, open_session, session_outputs
from fedekd.export.folder import CARD, check_folder, write_folder
from fedekd.models import MultiExitNetwork

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.export

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
ErrorLine = Callable[[], str]


def fit(npz: Path, output: str, *options: str) -> None:
    data = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=50", "--data.batch_size=16"]
    assert main(["fit", *FAST, *data, "--rounds=2", f"--output={output}", "--client.optimizer.lr=0.002", *options]) == 0


@pytest.fixture
def blobs(workdir: Path, write_blobs: Callable[..., Path]) -> Path:
    return write_blobs(workdir / "blobs.npz", num_samples=600)


def export(run: str, format: str, output: str = "out") -> dict:
    assert main(["export", run, "--client=1", f"--format={format}", f"--output={output}", "--license=MIT"]) == 0
    return json.loads(Path(output, "model_card.json").read_text())


def test_export_ensemble_with_exits_to_all_formats(blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(blobs, "run", "--method=ProxyEnsemble", "--client.exits=2", "--client.optimizer.lr=0.0003")
    assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0
    trained = open_trained("test", "run", None)
    client, policy = trained.clients[1], trained.policy(trained.clients[1])
    pixels = client.samples.inputs[client.splits.train]  # not those of the check
    expected = framework_outputs(client, policy, pixels)
    assert len(set(expected["exit"].tolist())) == 2
    export("run", "safetensors")
    served = load_served("out/model.safetensors")
    clear = ~near_thresholds(served, pixels).any(axis=1)  # round-off moves scores on a threshold to either side
    assert clear.mean() > 0.5
    assert served(pixels)[3].numpy()[clear].tolist() == expected["exit"][clear].tolist()
    capsys.readouterr()
    card = export("run", "onnx")
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[:2]] == ["model.onnx", "model_early_exit.onnx"]
    assert all(line.endswith("labels equal, exits equal") for line in printed[:2])
    assert printed[2].startswith("onnxruntime, one sample")
    for name, single in (("model.onnx", False), ("model_early_exit.onnx", True)):
        outputs = session_outputs(open_session(Path("out", name).read_bytes()), pixels, single)
        assert outputs["exit"][clear].tolist() == expected["exit"][clear].tolist()
        np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-5)
        assert len(set(outputs["exit"][clear].tolist())) == 2
    assert card["model"]["members"] == list(client.serving.members)
    assert card["license"] == "MIT"
    assert card["guarantee"]["target_risk"] == 0.3
    assert card["guarantee"]["samples"] == policy.samples
    assert card["metrics"]["delta"] == pytest.approx(card["metrics"]["score"] - card["metrics"]["local"])
    assert card["data"]["digest"] == client.splits.digest(client.samples)
    assert card["guarantee"]["statement"] == exit_guarantee(policy)
    assert f"| guarantee | {exit_guarantee(policy)} |" in Path("out/model_card.md").read_text()
    assert export("run", "safetensors")["files"][0]["name"] == "model.safetensors"  # replaces the folder
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("model.safetensors", "model_card.json", "model_card.md")
    ]
    network = load_network("out/model.safetensors")
    assert isinstance(network, MultiExitNetwork)
    policy.require(network)  # the fingerprint of the calibrated network
    fit(blobs, "again", "--method=Local", "--client.exits=2", "--client.private_weights=out/model.safetensors")


def test_export_safetensors_is_a_private_weights_file(blobs: Path, error_line: ErrorLine) -> None:
    fit(blobs, "run", "--method=Local")
    card = export("run", "safetensors")
    assert card["guarantee"] is None
    assert "| guarantee | none |" in Path("out/model_card.md").read_text()
    weights = load_network("out/model.safetensors").state_dict()
    options = ("--method=Local", "--client.private_weights=out/model.safetensors", "--client.freeze=backbone")
    fit(blobs, "next", *options)
    [private, _] = [client.networks["private"].state_dict() for client in open_trained("test", "next", None).clients]
    frozen = [name for name in weights if not name.startswith("head.")]
    assert frozen
    assert all(torch.equal(private[name], weights[name]) for name in frozen)
    Path("broken.safetensors").write_bytes(Path("out/model.safetensors").read_bytes()[:-9])
    options = ["--data.dataset", str(blobs), "--client.private_weights=broken.safetensors", "--output=no"]
    assert main(["fit", *FAST, *options]) == 2
    assert "client.private_weights: expected a safetensors file, got 'broken.safetensors'" in error_line()


def test_export_regression_has_the_unit_of_the_targets(blobs: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez("real.npz", images=images, labels=1000 + 7.5 * images.mean((1, 2)))
    fit(Path("real.npz"), "run", "--method=Local", "--task=regression")
    export("run", "onnx")
    client = open_trained("test", "run", None).clients[1]
    pixels = client.samples.inputs[client.splits.train]
    outputs = session_outputs(open_session(Path("out/model.onnx").read_bytes()), pixels, single=False)
    expected = framework_outputs(client, None, pixels)
    np.testing.assert_allclose(outputs["value"], expected["value"], rtol=1e-6)
    assert abs(outputs["value"].mean() - 1950) < 500
    assert not Path("out/model_early_exit.onnx").exists()


def test_export_table_takes_rows_with_missing_values(workdir: Path) -> None:
    options = ["--config=heart_disease.yaml", "--method=Local", "--rounds=1", "--output=run"]
    assert main(["fit", *FAST, *options]) == 0
    card = export("run", "onnx")
    columns = card["model"]["inputs"]["columns"]
    trained = open_trained("test", "run", None)
    table = Path(__file__).parents[2] / "fedekd/data/files/heart_disease.csv"
    features = trained.data.read_features(table, 1)
    from fedekd.data.formats.table import read_features

    rows = torch.from_numpy(read_features(table, trained.data.samples.columns))
    assert rows.isnan().any()
    assert len(columns) == rows.shape[1]
    outputs = session_outputs(open_session(Path("out/model.onnx").read_bytes()), rows, single=False)
    expected = framework_outputs(trained.clients[1], None, features)
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-6)


class Unknown(nn.Module):
    """A network with an operator that ONNX lacks."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.odd = Odd()
        self.head = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.flat(x)))


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.special.airy_ai(x.detach())


def test_export_bad_input_prints_one_line_and_writes_nothing(
    blobs: Path, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(blobs, "run", "--method=Local")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("kept")
    for options, text in (
        (["run", "--client=0"], "--format: expected one of safetensors, torch, onnx, got none"),
        (
            ["run", "--format=onxx"],
            "--format: expected one of safetensors, torch, onnx, got 'onxx'. Did you mean 'onnx'",
        ),
        (["run", "--format=torch"], "--client: expected 0..1, got none"),
        (["run", "--format=torch", "--output=full"], "--output: expected a new folder or one of an earlier export"),
        (["nowhere", "--format=torch"], "export: expected the folder of a run, got 'nowhere'"),
    ):
        capsys.readouterr()
        assert main(["export", *options]) == 2
        assert text in error_line()
    command = ["export", "run", "--client=0", "--format=safetensors", "--output=out"]
    outputs = comparison.module_outputs

    def others(*arguments: object) -> dict:
        return {**outputs(*arguments), "exit": outputs(*arguments)["exit"] + 1}

    with monkeypatch.context() as patch:
        patch.setattr("fedekd.export.exporter.module_outputs", others)
        assert main(command) == 2
    assert "model.safetensors: expected the exits of the framework, got" in error_line()
    assert not Path("out").exists()
    fit(blobs, "diverged", "--method=Local", "--client.optimizer.lr=1e30")
    capsys.readouterr()
    assert main(["export", "diverged", "--client=0", "--format=onnx", "--output=out"]) == 2
    assert "Its training diverged" in error_line()
    assert not Path("out").exists()


def test_export_unsupported_operator_names_the_layer(
    blobs: Path, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = type(sys)("odd_networks")
    module.Unknown = Unknown
    monkeypatch.setitem(sys.modules, "odd_networks", module)
    fit(blobs, "run", "--method=Local", "--client.private_model=odd_networks.Unknown")
    capsys.readouterr()
    assert main(["export", "run", "--client=0", "--format=onnx", "--output=out"]) == 2
    assert "layer 'odd' (Odd) with the operator aten.special_airy_ai" in error_line()
    assert not Path("out").exists()


@pytest.mark.parametrize("has_earlier", [False, True])
@pytest.mark.parametrize(("function", "calls"), [("fsync", 2), ("rename", 1), ("rename", 2)])
def test_write_folder_killed_leaves_no_part_of_it(tmp_path: Path, has_earlier: bool, function: str, calls: int) -> None:
    folder = tmp_path / "out"
    if has_earlier:
        write_folder(folder, {"a": b"earlier", CARD: b'{"files": [{"name": "a"}]}'})
    elif calls == 2 and function == "rename":
        return  # one rename is enough
    owner = os if function == "fsync" else Path
    wrapped, made = getattr(owner, function), []

    def kill_at(*arguments: object) -> object:
        made.append(arguments)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped(*arguments)

    child = os.fork()
    if not child:
        setattr(owner, function, kill_at)
        write_folder(folder, dict.fromkeys("abc", b"new"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    check_folder(folder)  # as at the next start
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if has_earlier else [])
    assert [(folder / "a").read_text()] == ["earlier"] if has_earlier else not folder.exists()


def test_check_folder_with_files_of_the_user_raises_and_keeps_them(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_folder(folder, {"model.onnx": b"", CARD: b'{"files": [{"name": "model.onnx"}]}'})
    check_folder(folder)
    for name in ("notes.txt", "model.pt2"):
        (folder / name).write_text("kept")
        with pytest.raises(UserError, match="expected a new folder or one of an earlier export"):
            check_folder(folder)
        (folder / name).unlink()
    (folder / CARD).write_text("[]")
    with pytest.raises(UserError, match="which has other files"):
        check_folder(folder)
    with pytest.raises(UserError, match="--output: expected a folder, got '/'"):
        check_folder(Path("/"))
