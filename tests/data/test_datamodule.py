from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule, Samples, dirichlet_label_partition
from fedekd.errors import UserError

WriteNpz = Any


@pytest.fixture
def tiny(write_npz: WriteNpz) -> str:
    return str(write_npz(sizes=(200, 40, 60)))


def indices_of(data: FederatedDataModule, client: int) -> Tensor:
    own = data.clients[client]
    return torch.cat([own.train, own.validation, own.test])


def test_clients_are_a_partition_of_the_images(tiny: str) -> None:
    data = FederatedDataModule(tiny, num_clients=4, alpha=0.5)
    everything = torch.cat([indices_of(data, client) for client in range(4)])
    assert everything.sort().values.tolist() == list(range(300))
    for k, own in enumerate(data.clients):
        assert own.client == k
        assert len(own) >= 10
        assert len(own.train) == int(0.6 * len(own) + 0.5)
        thirds = torch.cat([own.tuning, own.calibration, own.holdout])
        assert thirds.sort().values.tolist() == own.validation.tolist()
        assert own.train.dtype == torch.int64


def test_class_counts_equal_bincount(tiny: str) -> None:
    data = FederatedDataModule(tiny, num_clients=4, alpha=0.5, num_classes=5)
    counts = data.class_counts()
    assert counts.shape == (4, 5)
    assert counts.sum(0).tolist() == [101, 100, 99, 0, 0]
    for k in range(4):
        assert counts[k].tolist() == torch.bincount(data.samples.labels[indices_of(data, k)], minlength=5).tolist()


def test_setup_loads_and_partitions_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FederatedDataModule(tiny)
    data.prepare_data()
    Path(tiny).unlink()
    data.setup("fit")
    images, clients = data.samples, data.clients
    data.setup("test")
    assert data.samples is images
    assert data.clients is clients
    assert (data.task, data.num_classes) == ("classification", 3)


def test_constructor_loads_nothing() -> None:
    data = FederatedDataModule("gone.npz")
    assert "gone.npz" in str(data)
    with pytest.raises(UserError, match=r"file 'gone\.npz' not found"):
        data.setup()


def test_same_seed_gives_same_clients(tiny: str) -> None:
    one, again, other = (FederatedDataModule(tiny, num_clients=3, alpha=1.0, seed=seed) for seed in (0, 0, 1))
    for k in range(3):
        assert torch.equal(one.clients[k].train, again.clients[k].train)
        assert torch.equal(one.clients[k].holdout, again.clients[k].holdout)
    assert not all(torch.equal(one.clients[k].train, other.clients[k].train) for k in range(3))
    first, second, third = (torch.cat([y for _, y in data.train_dataloader()]) for data in (one, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_clients_have_separate_split_seeds(tiny: str) -> None:
    data = FederatedDataModule(tiny, num_clients=2, partition="iid")
    ranks = [torch.searchsorted(indices_of(data, k).sort().values, data.clients[k].train).tolist() for k in range(2)]
    assert ranks[0] != ranks[1]


def test_default_partition_follows_the_task(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for name in ("label", "cluster", "iid"):

        def note(*args: Any, name: str = name) -> list[Any]:
            chosen.append(name)
            return np.array_split(np.arange(300), 6)

        monkeypatch.setitem(sys.modules["fedekd.data.partition"].PARTITIONS, name, note)
    FederatedDataModule(tiny).setup()
    FederatedDataModule(tiny, task="regression").setup()
    FederatedDataModule(tiny, task="regression", partition="label").setup()
    FederatedDataModule(tiny, partition="iid").setup()
    assert chosen == ["label", "cluster", "label", "iid"]


def test_arguments_reach_the_partition(tiny: str) -> None:
    data = FederatedDataModule(tiny, num_clients=3, alpha=0.2, min_samples=40, seed=5)
    from fedekd.seeding import derive_seed

    expected = dirichlet_label_partition(data.samples.labels, 3, 0.2, derive_seed(5, "partition"), 40)
    for k in range(3):
        assert indices_of(data, k).sort().values.tolist() == expected[k].tolist()


def test_partition_by_import_path(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_partitions")
    module.halves = lambda images, k, alpha, seed, least: np.array_split(np.arange(len(images)), k)  # type: ignore[attr-defined]
    module.twice = lambda images, k, alpha, seed, least: [np.arange(20)] * k  # type: ignore[attr-defined]
    module.outside = lambda images, k, alpha, seed, least: [np.array([0, 1]), np.array([2, 300])]  # type: ignore[attr-defined]
    module.one = lambda images, k, alpha, seed, least: [np.arange(20)]  # type: ignore[attr-defined]
    module.table = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_partitions", module)
    data = FederatedDataModule(tiny, num_clients=2, partition="my_partitions.halves")
    assert indices_of(data, 1).sort().values.tolist() == list(range(150, 300))
    for name in ("twice", "outside", "one"):
        with pytest.raises(UserError, match=r"data\.partition: expected .* 0\.\.299, got"):
            FederatedDataModule(tiny, num_clients=2, partition=f"my_partitions.{name}").setup()
    with pytest.raises(UserError, match=r"expected a function, got 'my_partitions\.table', a dict"):
        FederatedDataModule(tiny, partition="my_partitions.table")
    with pytest.raises(UserError, match=r"imported, got 'my_partitions\.gone'\. "):
        FederatedDataModule(tiny, partition="my_partitions.gone")
    with pytest.raises(UserError, match=r"imported, got 'no_such_module\.f'\. "):
        FederatedDataModule(tiny, partition="no_such_module.f")


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"num_clients": 0}, ["data.num_clients: expected", "at least 1"]),
        ({"batch_size": 0}, ["data.batch_size: expected", "got 0"]),
        ({"eval_batch_size": -1}, ["data.eval_batch_size: expected", "got -1"]),
        ({"min_samples": 1}, ["data.min_samples: expected", "at least 2"]),
        ({"memory_limit": -1.0}, ["data.memory_limit: expected", "at least 0"]),
        ({"num_classes": 1}, ["data.num_classes: expected", "got 1"]),
        ({"alpha": 0.0}, ["data.alpha: expected", "got 0.0"]),
        ({"alpha": float("nan")}, ["data.alpha: expected", "got nan"]),
        ({"fractions": (0.5, 0.2, 0.2)}, ["data.fractions"]),
        ({"client": 6}, ["data.client: expected", "got 6", "0..5"]),
        ({"client": -1}, ["data.client: expected", "got -1"]),
        ({"partition": "lable"}, ["data.partition", "'lable'", "Did you mean 'label'?"]),
        ({"task": "rank"}, ["task", "'rank'"]),
    ],
)
def test_invalid_argument_raises_before_loading(kwargs: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        FederatedDataModule("gone.npz", **kwargs)
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def test_dataloaders_serve_all_clients_or_one(tiny: str) -> None:
    pooled = FederatedDataModule(tiny, num_clients=3, alpha=1.0, batch_size=16, eval_batch_size=50)
    single = FederatedDataModule(tiny, num_clients=3, alpha=1.0, client=2)
    for loader, split in (("train", "train"), ("val", "validation"), ("test", "test"), ("predict", "test")):
        expected = [getattr(own, split) for own in pooled.clients]
        both = getattr(pooled, f"{loader}_dataloader")(), getattr(single, f"{loader}_dataloader")()
        assert both[0].indices.tolist() == torch.cat(expected).tolist()
        assert both[1].indices.tolist() == expected[2].tolist()
    assert max(len(y) for _, y in pooled.test_dataloader()) == 50
    assert max(len(y) for _, y in pooled.train_dataloader()) == 16
    one, two = (torch.cat([y for _, y in pooled.train_dataloader()]) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, pooled.samples.targets[pooled.train_dataloader().indices])


def test_regression_batches_are_float(tiny: str) -> None:
    data = FederatedDataModule(tiny, task="regression", partition="iid")
    x, y = next(iter(data.test_dataloader()))
    assert x.dtype == y.dtype == torch.float32
    assert x.abs().max() <= 1


def test_client_digest_depends_on_contents_only(write_npz: WriteNpz) -> None:
    path = str(write_npz("one", sizes=(90, 0, 30)))
    data = FederatedDataModule(path, num_clients=2, partition="iid")
    again = FederatedDataModule(path, num_clients=2, partition="iid")
    digests = [own.digest(data.samples) for own in data.clients]
    assert digests == [own.digest(again.samples) for own in again.clients]
    assert digests[0] != digests[1]
    again.samples.inputs[again.clients[0].test[0], 0, 0, 0] += 1
    assert again.clients[0].digest(again.samples) != digests[0]
    assert again.clients[1].digest(again.samples) == digests[1]


class Linear(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 3)
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(batch[1])
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trainer_accepts_datamodule(tiny: str) -> None:
    data = FederatedDataModule(tiny, num_clients=3, alpha=1.0, client=1)
    module = Linear()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    labels = data.samples.labels[data.clients[1].train]
    assert torch.equal(torch.cat(module.seen).sort().values, torch.cat([labels, labels]).sort().values)


def test_jsonargparse_builds_datamodule(tiny: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    arguments = [
        f"--data.dataset={tiny}",
        "--data.alpha=0.5",
        "--data.fractions=[0.5,0.25,0.25]",
        "--data.client=1",
    ]
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert (data.alpha, tuple(data.fractions), data.client) == (0.5, (0.5, 0.25, 0.25), 1)
    assert len(data.clients[1].test) == len(data.test_dataloader().indices)
    help_text = parser.format_help()
    assert "Concentration of the Dirichlet partition" in help_text
    assert "a 2D flag of MedMNIST" in " ".join(help_text.split())


def grouped(groups: Any, split: Any = None, **options: Any) -> FederatedDataModule:
    """Return 12 images of three patients per site and two sites."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    fields = {"group": torch.as_tensor(groups), "split": None if split is None else torch.as_tensor(split)}
    site = torch.arange(24) // 12
    data = FederatedDataModule("patients", site_column="site", **options)
    data.adopt(
        Samples.from_arrays(
            "patients", images, np.arange(24) % 2, "classification", 2, site=site, site_names=("x", "y"), **fields
        )
    )
    return data


def test_groups_are_in_one_split_of_a_site() -> None:
    groups = np.arange(24) // 3
    for splits in grouped(groups).clients:
        parts = [splits.train, splits.tuning, splits.calibration, splits.holdout, splits.test]
        assert sum(len(set(groups[part].tolist())) for part in parts) == 4
        assert len(splits) == 12


def test_given_splits_are_kept() -> None:
    split = np.tile([0, 0, 1, 2, 0, 1], 4)
    for number, splits in enumerate(grouped(np.arange(24), split, splits="given").clients):
        for name, code in (("train", 0), ("validation", 1), ("test", 2)):
            expected = [index for index in range(12 * number, 12 * number + 12) if split[index] == code]
            assert getattr(splits, name).tolist() == expected


@pytest.mark.parametrize(
    ("groups", "split", "text"),
    [
        (np.arange(24), None, "data.splits: expected random, because the data have no splits, got given"),
        (np.arange(24), np.repeat([0, 2, 1], [20, 3, 1]), "site 'x': expected samples in the split test, got none"),
        (np.arange(24), np.repeat([2, 0], [12, 12]), "site 'x': expected samples in the split train, got none"),
        (np.arange(24) // 3, np.tile([0, 2], 12), "site 'x': expected each group in one split, got 4 groups in two"),
    ],
)
def test_given_splits_that_do_not_fit_raise(groups: Any, split: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        grouped(groups, split, splits="given").setup()


def test_transform_for_a_table_raises(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,label\n" + "".join(f"{row},{row % 2}\n" for row in range(40)))
    data = FederatedDataModule(
        str(tmp_path / "t.csv"), num_clients=2, partition="iid", transform="RandomHorizontalFlip"
    )
    with pytest.raises(UserError, match=r"data.transform: expected null for tables"):
        data.setup()
