"""The modules with checkpoints, finders, compilation, LightningCLI and DDP, as in a project of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

from fedekd.errors import UserError
from fedekd.models import PrivateCNN, ProxyCNN, multi_exit
from fedekd.modules import (
    Energy,
    GatedPrivateModule,
    HeldOutTrust,
    MultiExitModule,
    MutualModule,
    ObjectiveModule,
    ProxyDistillModule,
    SupervisedModule,
)


def private(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return PrivateCNN(1, 8, 4, width=0.25)


def proxy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed + 10)
    return ProxyCNN(1, 8, 4, width=0.5)


def exits(seed: int = 0) -> nn.Module:
    return multi_exit(private(seed), 4, 3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def untrained(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def samples(n: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), self.batch_size)


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "limit_val_batches": 0}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


class ConfidenceGap(Energy):
    def forward(self, private: Any, proxy: Any) -> Tensor:
        return (private.output.amax(1) - proxy.output.amax(1)).abs().float()


#: Per module: arguments of the checkpoint that are not the defaults, and the networks, which are passed again.
MODULES: dict[type[ObjectiveModule], tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    ProxyDistillModule: ({"temperature": 3.0}, lambda seed: {"proxy": proxy(seed), "private": private()}),
    GatedPrivateModule: (
        {"energy": "entropy", "beta": 3.0, "lambda_kd": 0.5, "gate": "reversed", "energy_of": "private"},
        lambda seed: {"private": private(seed), "proxy": proxy()},
    ),
    MultiExitModule: (
        {"exit_weights": (0.5, 0.0, 2.0), "temperature": 2.0, "dkd_beta": 1.0, "ema_decay": 0.5},
        lambda seed: {"network": exits(seed)},
    ),
    SupervisedModule: ({"offset": torch.tensor([0.0, 1.0, 2.0, 0.5])}, lambda seed: {"network": private(seed)}),
    MutualModule: (
        {"private_weight": 0.25, "adaptive": True},
        lambda seed: {"private": private(seed), "proxy": proxy(seed)},
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_load_from_checkpoint_with_networks_restores_weights_and_arguments(kind: Any, tmp_path: Path) -> None:
    arguments, networks = MODULES[kind]
    module = kind(**networks(0), **arguments, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, Data())
    path = tmp_path / "module.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"].keys() >= arguments.keys()
    loaded = kind.load_from_checkpoint(path, **networks(1))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    if isinstance(module, MultiExitModule):
        loaded.distillation.warmup_factor = module.distillation.warmup_factor  # set by the epoch
    batch = samples()[:]
    assert torch.equal(loaded.training_step(batch, 0), module.training_step(batch, 0))


@pytest.mark.parametrize(
    ("kind", "object_"),
    [
        (GatedPrivateModule, {"energy": ConfidenceGap()}),
        (
            GatedPrivateModule,
            {"trust": HeldOutTrust("classification", torch.eye(4), torch.arange(4)), "gate": "correctness"},
        ),
        (MultiExitModule, {"teacher": exits(2)}),
    ],
    ids=["energy", "trust", "teacher"],
)
def test_load_from_checkpoint_without_an_object_of_training_raises_user_error(
    kind: Any, object_: dict[str, Any], tmp_path: Path
) -> None:
    networks, path = MODULES[kind][1], tmp_path / "module.ckpt"
    trainer = quiet_trainer(tmp_path, max_epochs=0)
    trainer.fit(kind(**networks(0), **object_), Data())
    trainer.save_checkpoint(path)
    name = next(iter(object_))
    with pytest.raises(UserError, match=f"^{name}: expected .*{type(object_[name]).__name__}"):
        kind.load_from_checkpoint(path, **networks(0))
    kind.load_from_checkpoint(path, **networks(0), **{name: object_[name]})


def test_lr_find_sets_the_rate_of_the_next_fit(tmp_path: Path) -> None:
    module = GatedPrivateModule(private(), proxy(), optimizer=sgd)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    finder = Tuner(trainer).lr_find(module, datamodule=Data(batch_size=2), num_training=20)
    assert finder is not None
    assert module.lr == finder.suggestion() != 0.1
    trainer.fit(module, Data())
    [group] = trainer.optimizers[0].param_groups
    assert (group["lr"], group["momentum"]) == (module.lr, 0.5)


def test_scale_batch_size_then_fit_averages_once_per_optimizer_step(tmp_path: Path) -> None:
    module, data = MultiExitModule(exits()), Data(batch_size=2)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2)
    assert Tuner(trainer).scale_batch_size(module, datamodule=data, steps_per_trial=1, max_trials=2) == 4
    trainer.fit(module, data)  # 6 batches of 4
    assert module.average is not None
    assert module.samples_seen == 24
    assert int(module.average.n_averaged) == trainer.global_step == 3


class Graphs(Callback):
    """Number of compiled graphs after each epoch."""

    def __init__(self, counter: CompileCounter) -> None:
        self.counter = counter
        self.counts: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(self.counter.frame_count)


@pytest.mark.slow
def test_compiled_module_compiles_no_graph_after_the_first_epoch(tmp_path: Path) -> None:
    weights = []
    torch._dynamo.reset()
    counter = CompileCounter()
    graphs = Graphs(counter)
    for compiled in (False, True):
        module = GatedPrivateModule(private(), proxy(), optimizer=sgd)
        fitted = torch.compile(module, backend=counter) if compiled else module
        quiet_trainer(tmp_path, max_epochs=3, callbacks=[graphs]).fit(fitted, Data())
        weights.append(nn.utils.parameters_to_vector(module.network.parameters()))
    assert graphs.counts[3] == graphs.counts[5] > 0
    assert torch.equal(*weights)


class TwoSchedulers(LightningCLI):
    """CLI of a user: a warm-up per step, and a decay per epoch."""

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: torch.optim.Optimizer, lr_scheduler: Any = None
    ) -> Any:
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 2, 1.0))
        return [optimizer], [{"scheduler": warmup, "interval": "step"}, lr_scheduler]


def test_lightning_cli_overridden_configure_optimizers_steps_both_schedulers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "fedekd.models.PrivateCNN", "init_args": {"in_channels": 1, "image_size": 8}}
    cli = TwoSchedulers(
        SupervisedModule,
        Data,
        save_config_callback=None,
        args={
            "subcommand": "fit",
            "fit": {
                "model": {"network": network, "optimizer": "torch.optim.Adam"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
                "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 9}},
                "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
            },
        },
    )
    assert [type(optimizer) for optimizer in cli.trainer.optimizers] == [torch.optim.SGD]
    assert [config.scheduler.last_epoch for config in cli.trainer.lr_scheduler_configs] == [6, 2]
    loaded = SupervisedModule.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path)
    assert isinstance(loaded.network, PrivateCNN)
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(cli.model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


class Record(Callback):
    """Write the results of each process to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        results = {
            "means": pl_module.epoch_means,
            "scores": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "weights": [float(tensor.double().sum()) for tensor in pl_module.state_dict().values()],
            "teacher": None if pl_module.teacher is None else [float(w.sum()) for w in pl_module.teacher.parameters()],
        }
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(results))


class OwnTeacher(Callback):
    """Give each process another teacher, to see that none is synchronised."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        next(pl_module.teacher.parameters()).data.add_(trainer.global_rank)


def fit_in_processes(module: LightningModule, processes: int, folder: Path, *callbacks: Callback) -> list[Any]:
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        limit_val_batches=None,
        callbacks=[Record(folder), *callbacks],
    )
    trainer.fit(module, Data(batch_size=8 // processes))
    return [json.loads((folder / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_ddp_means_are_those_of_all_samples_and_teachers_are_not_synchronised(tmp_path: Path) -> None:
    results = []
    for processes in (1, 2):
        module = ProxyDistillModule(
            proxy(), private(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)
        )
        results += fit_in_processes(module, processes, tmp_path)
    single, first, second = results
    assert first == second
    for name in ("means", "scores"):
        assert first[name] == pytest.approx(single[name], rel=1e-5)
    module = ProxyDistillModule(proxy(), private(), optimizer=sgd)
    first, second = fit_in_processes(module, 2, tmp_path, OwnTeacher())
    assert first.pop("teacher") != second.pop("teacher")
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GatedPrivateModule, MultiExitModule, MutualModule])
def test_ddp_processes_have_equal_means_scores_and_weights(kind: Any, tmp_path: Path) -> None:
    first, second = fit_in_processes(kind(**MODULES[kind][1](0), optimizer=sgd), 2, tmp_path)
    assert first == second
    assert all(value == value for value in first["means"].values())
