"""`--client.lora` on the command line: options, use of the run, and the merged export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedekd.cli import main
from fedekd.configuration.trained import open_trained
from fedekd.early_exit import network_fingerprint
from fedekd.export import load_network
from fedekd.export.comparison import framework_outputs, open_session, session_outputs
from fedekd.models import MultiExitNetwork, PrivateCNN
from fedekd.models.lora import merged

pytest.importorskip("peft")
pytestmark = pytest.mark.lora

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]
LORA = ("--client.lora.r=4", "--client.lora.lora_alpha=8", "--client.lora.target_modules=stages.*")


def fit(npz: Path, output: str, *options: str) -> int:
    data = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=50", "--data.batch_size=16"]
    optimizer = ("--client.optimizer.lr=0.01", "--baseline_dir=local")
    return main(["fit", *FAST, *data, "--rounds=2", f"--output={output}", *optimizer, *options])


@pytest.fixture
def blobs(workdir: Path, write_blobs: Callable[..., Path]) -> Path:
    torch.manual_seed(0)
    torch.save(PrivateCNN(1, 8, 3).state_dict(), "w.pt")
    return write_blobs(workdir / "blobs.npz", num_samples=600)


def test_fit_with_lora_is_used_by_all_commands(blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(blobs, "run", "--method=FedAvg", "--client.private_weights=w.pt", "--client.exits=2", *LORA) == 0
    lora = yaml.safe_load(Path("run/config.yaml").read_text())["client"]["lora"]
    assert lora == {
        **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "stages.*", "modules_to_save": None}
    }
    assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0
    assert main(["test", "run"]) == 0
    assert main(["predict", "run", "--client=1", f"--input={blobs}", "--output=out.csv"]) == 0
    sizes = {path.stat().st_size for path in Path("run/checkpoints").glob("states-*.bin")}
    assert max(sizes) < Path("w.pt").stat().st_size
    for options, words in (
        (["--client.lora.r=0"], "error: client.lora.r: expected a whole number of at least 1, got 0"),
        (["--client.lora.target_modules=[q]"], "error: client.lora.target_modules: expected names of layers of Priv"),
    ):
        capsys.readouterr()
        assert fit(blobs, "wrong", "--method=FedAvg", *options) == 2
        text = capsys.readouterr().err
        assert text.startswith(words)
        assert text.count("\n") == 1


@pytest.mark.export
@pytest.mark.parametrize("method", ["FedAvg", "ProxyEnsemble"])
def test_export_merges_adapters_into_the_base(method: str, blobs: Path) -> None:
    """The policy holds for the merged network; it gives the outputs and exits of the calibrated one."""
    pytest.importorskip("safetensors")
    pytest.importorskip("onnxruntime")
    assert fit(blobs, "run", f"--method={method}", "--client.private_weights=w.pt", "--client.exits=2", *LORA) == 0
    assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0
    trained = open_trained("test", "run", None)
    client: Any = trained.clients[1]
    policy = trained.policy(client)
    pixels = client.samples.inputs[client.splits.train]
    expected = framework_outputs(client, policy, pixels)
    assert main(["export", "run", "--client=1", "--format=safetensors", "--output=out"]) == 0
    network = load_network("out/model.safetensors")
    assert isinstance(network, MultiExitNetwork)
    assert not [name for name in network.state_dict() if "lora" in name]
    assert network_fingerprint(network) == network_fingerprint(merged(client.deployed_model))
    assert main(["export", "run", "--client=1", "--format=onnx", "--output=out"]) == 0
    outputs = session_outputs(open_session(Path("out/model.onnx").read_bytes()), pixels, False)
    assert outputs["exit"].tolist() == expected["exit"].tolist()
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-5)
    if method == "FedAvg":
        assert main(["export", "run", "--client=1", "--format=safetensors", "--output=out"]) == 0
        weights = ("--client.private_weights=out/model.safetensors", "--client.exits=2")
        assert fit(blobs, "next", "--method=Local", *weights, *LORA) == 0
