"""HTTP service of an exported model: a real client gets the predictions of the framework."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from fedekd.cli import main

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.export, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder of 300 images in three classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(300):
        pixels = rng.integers(0, 80, (8, 8)) + 80 * (number % 3)
        folder = tmp_path / "scans" / ("cold", "mild", "warm")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return tmp_path / "scans"


@pytest.fixture
def service(images: Path) -> Iterator[str]:
    """The address of a service of a calibrated and exported run."""
    data = ["--data.dataset=scans", "--data.num_clients=1", "--data.batch_size=16", "--client.optimizer.lr=0.001"]
    assert main(["fit", *FAST, *data, "--method=SafeKD", "--client.exits=3", "--rounds=2", "--output=run"]) == 0
    assert main(["calibrate", "run", "--target_risk=0.3", "--confidence=0.7"]) == 0
    assert main(["export", "run", "--format=onnx", "--output=exported"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.serve", str(images.parent / "exported"), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None
            try:
                assert request(f"{address}/health")["status"] == "ok"
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def request(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    call = urllib.request.Request(url, body, {"content-type": kind})
    with urllib.request.urlopen(call, timeout=60) as response:
        return json.loads(response.read())


def test_service_predictions_equal_those_of_the_framework(service: str, images: Path) -> None:
    assert main(["predict", "run", "--input=scans", "--output=out.csv", "--probabilities=true"]) == 0
    with Path("out.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    paths = sorted(images.rglob("*.png"))
    assert len({row["exit"] for row in expected}) > 1
    single = [request(f"{service}/predict", path.read_bytes(), "image/png")["predictions"][0] for path in paths[::3]]
    pixels = [np.asarray(Image.open(path))[None].tolist() for path in paths]
    batch = request(f"{service}/predict", json.dumps({"inputs": pixels}).encode())["predictions"]
    largest = 0.0
    for rows, references in ((single, expected[::3]), (batch, expected)):
        assert len(rows) == len(references)
        for row, reference in zip(rows, references, strict=True):
            assert (row["exit"], row["class"]) == (int(reference["exit"]), reference["class"])
            probabilities = [float(reference[f"probability_{name}"]) for name in ("cold", "mild", "warm")]
            largest = max(largest, float(np.abs(np.subtract(row["probabilities"], probabilities)).max()))
    print(f"largest difference {largest:.2g}")
    assert largest < 2e-6
    for body, kind, text in (
        (b"no image", "image/png", "expected an image file"),
        (b"{}", "application/json", "expected an object with"),
        (json.dumps({"inputs": [[[[0.5] * 8] * 8]]}).encode(), "application/json", "expected whole numbers 0..255"),
        (json.dumps({"inputs": [[1, 2]]}).encode(), "application/json", "expected shape (batch, 1, 8, 8), got (1, 2)"),
    ):
        with pytest.raises(HTTPError) as error:
            request(f"{service}/predict", body, kind)
        assert error.value.code == 422
        assert text in json.loads(error.value.read())["detail"]


def test_service_changed_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"changed")
    card = {"files": [{"name": "model.onnx", "sha256": "0" * 64}]}
    (tmp_path / "model_card.json").write_text(json.dumps(card))
    command = [sys.executable, "-m", "examples.serve", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "expected the SHA-256 of the model card" in result.stderr
    assert result.stderr.count("\n") == 1
