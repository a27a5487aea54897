"""Runs on inputs that are read when needed: the bytes of resident ones, on every engine, and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedekd.cli import main
from fedekd.data import FederatedDataModule
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions
from fedekd.federation.baseline_key import baseline_key
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.methods import ClientOptions, FedAvg, FedeKD, FedType
from fedekd.modules import ObjectiveModule, TrainerFactory
from fedekd.modules.prediction import teacher_forward
from tests.data.user_data import Blobs

USER = "tests.data.user_data"
SITES: dict[str, Any] = {
    name: {"class_path": f"{USER}.Blobs", "init_args": {"seed": seed}} for seed, name in enumerate(("north", "south"))
}
MODEL = {"class_path": f"{USER}.WithDropout"}
CROP = [{"class_path": "RandomCrop", "init_args": {"size": 8, "padding": 1}}, {"class_path": f"{USER}.Halve"}]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The sites as .npz files, which are resident."""
    paths = {}
    for seed, name in enumerate(SITES):
        items = [Blobs(seed=seed)[index] for index in range(60)]
        arrays = {"train_images": np.stack([x[0].numpy() for x, _ in items]), "train_labels": [[y] for _, y in items]}
        for split in ("val", "test"):
            arrays |= {f"{split}_{part}": np.asarray(arrays[f"train_{part}"])[:0] for part in ("images", "labels")}
        paths[name] = str(tmp_path / f"{name}.npz")
        np.savez(paths[name], **{key: np.asarray(value, np.uint8) for key, value in arrays.items()})
    return paths


def run(folder: Path, sites: dict[str, Any], method: Any = None, **options: Any) -> dict[str, bytes]:
    """Train two sites, and return the files that must not depend on how inputs are held."""
    engine = {"engine": options.pop("engine")} if "engine" in options else {}
    data = FederatedDataModule(sites=sites, batch_size=8, **options)
    # Its dropout draws from the generator that readers must not advance.
    client = ClientOptions(local_epochs=2, private_model=MODEL, proxy_model=MODEL)
    made = Orchestrator(
        method or FedeKD(),
        data=data,
        client=client,
        trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
        rounds=RoundOptions(rounds=2),
        output=folder / "run",
        baseline_dir=folder / "local",
        **engine,
    )
    made.run()
    return CheckpointStore(folder / "run/checkpoints").digests() | {"rows": (folder / "run/metrics.csv").read_text()}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("transform", [None, CROP])
def test_stored_run_has_the_bytes_of_the_resident_one(files: dict[str, str], tmp_path: Path, transform: Any) -> None:
    resident = run(tmp_path / "0", files, transform=transform)
    assert len(resident) > 3
    for number, options in enumerate(
        ({"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "engine": MultiProcess(2)}), start=1
    ):
        assert run(tmp_path / str(number), SITES, transform=transform, **options) == resident, options


@pytest.mark.slow
def test_killed_stored_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    config = {
        "data": {"sites": SITES, "num_workers": 2, "transform": CROP, "batch_size": 8},
        "method": "FedAvg",
        "rounds": 3,
        "client": {"private_model": "ProxyCNN", "local_epochs": 1},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "threads": 1},
    }
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(config))

    def fit(name: str) -> list[str]:
        base = tmp_path / f"local-{name}"
        return ["fit", f"--config={tmp_path}/sites.yaml", f"--output={tmp_path}/{name}", f"--baseline_dir={base}"]

    assert main([*fit("whole"), "--quiet"]) == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "fedekd", *fit("killed"), "--quiet"], start_new_session=True)
    while not list(killed.glob("checkpoints/manifest-*1.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # not its readers, which must end by themselves and free the folder
    process.wait()
    assert main(["fit", f"--resume={killed}", "--data.num_workers=0", "--quiet"]) == 0
    assert (killed / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    digests = [CheckpointStore(folder / "checkpoints").digests() for folder in (killed, tmp_path / "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("method", [FedeKD(), FedType()])
@pytest.mark.usefixtures("undrawn")
def test_teacher_with_transform_sees_the_augmented_batch(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    steps: list[bool] = []
    plain = ObjectiveModule._teacher_output

    def record(self: ObjectiveModule, x: Any, teacher_outputs: Any) -> Any:
        output = plain(self, x, teacher_outputs)
        if self.teacher is not None:
            assert not teacher_outputs
            expected = teacher_forward(self.teacher, x, self.with_features)
            steps.append(output is not None and torch.equal(output.output, expected.output))
        return output

    monkeypatch.setattr(ObjectiveModule, "_teacher_output", record)
    run(tmp_path, files, method, transform=CROP)
    assert steps
    assert all(steps)


@pytest.mark.usefixtures("undrawn")
def test_baseline_key_includes_the_transform_and_not_the_workers(files: dict[str, str]) -> None:
    def key(**options: Any) -> str:
        data = FederatedDataModule(sites=options.pop("sites", files), batch_size=8, **options)
        made: Any = Orchestrator(
            FedAvg(),
            data=data,
            client=ClientOptions(private_model=MODEL),
            trainer=TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
            rounds=RoundOptions(rounds=1),
        )
        return baseline_key(made.engine.client(0))

    keys = [key(), key(transform="RandomHorizontalFlip"), key(transform=CROP), key(sites=SITES)]
    assert len({*keys}) == 4
    assert key(sites=SITES, num_workers=0) == keys[3]
