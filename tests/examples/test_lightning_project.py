"""The example of a LightningCLI project: three trainings, and its checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.lightning_project.__main__ import main
from examples.lightning_project.networks import Large, Small
from fedekd import GatedPrivateModule, ProxyDistillModule

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT / 'examples' / 'lightning_project' / 'config.yaml'}"
NETWORKS = "examples.lightning_project.networks"
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false")
TEACHER = (f"--model.network={NETWORKS}.Large", "--data.site=0", "--trainer.logger.name=site_0")
PROXY = (
    f"--model.proxy={NETWORKS}.Small",
    f"--model.private={NETWORKS}.trained",
    f"--model.private.network={NETWORKS}.Large",
    "--model.private.checkpoint=runs/lightning/site_0/checkpoints/best.ckpt",
    "--data.site=0",
    "--trainer.logger.name=proxy",
)


def best(name: str) -> Path:
    return Path("runs", "lightning", name, "checkpoints", "best.ckpt")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def network_state(name: str) -> dict[str, torch.Tensor]:
    state = torch.load(best(name), weights_only=True)["state_dict"]
    return {key.removeprefix("network."): tensor for key, tensor in state.items() if key.startswith("network.")}


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden", "ignore:LightningCLI's args parameter")
def test_lightning_project_trains_both_modules_from_one_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best("site_0").parent.mkdir(parents=True)
    teacher = Large().state_dict()
    torch.save({"state_dict": {f"network.{name}": tensor for name, tensor in teacher.items()}}, best("site_0"))
    proxy = main(["fit", CONFIG, *SHORT, "--model=ProxyDistillModule", *PROXY])
    assert isinstance(proxy.model, ProxyDistillModule)
    assert isinstance(proxy.model.network, Small)
    assert_equal(proxy.model.teacher.state_dict(), teacher)
    main(["fit", CONFIG, *SHORT, "--model.beta=2"])
    header = Path("runs/lightning/site_1/metrics.csv").read_text().partition("\n")[0]
    assert {"val/accuracy", "gate/weight_mean", "lr-AdamW"} <= set(header.split(","))
    # The checkpoint has the class paths: nothing is passed. The proxy's weights come from its own checkpoint.
    loaded = GatedPrivateModule.load_from_checkpoint(best("site_1"))
    assert isinstance(loaded.network, Large)
    assert loaded.hparams["beta"] == 2
    assert_equal(loaded.network.state_dict(), network_state("site_1"))
    assert_equal(loaded.teacher.state_dict(), network_state("proxy"))


@pytest.mark.slow
def test_lightning_project_with_two_processes_loads_in_a_new_process(tmp_path: Path) -> None:
    project = [sys.executable, "-m", "examples.lightning_project"]
    words = [CONFIG, *SHORT, "--model=SupervisedModule", *TEACHER]
    load = (
        "from fedekd.modules import SupervisedModule\n"
        f"module = SupervisedModule.load_from_checkpoint({str(best('site_0'))!r}, weights_only=True)\n"
        "assert type(module.network).__name__ == 'Large'"
    )
    for command in (
        [*project, "fit", *words, "--trainer.devices=2", "--trainer.strategy=ddp"],
        [*project, "test", *words, f"--ckpt_path={best('site_0')}"],
        [sys.executable, "-c", load],
    ):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
