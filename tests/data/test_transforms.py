from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedekd.data import FederatedDataModule, TensorBatches, build_transform
from fedekd.data.transforms import augment, check_transform
from fedekd.errors import UserError

USER = "tests.data.user_data"
IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CROP = {"class_path": "torchvision.transforms.v2.RandomCrop", "init_args": {"size": 8, "padding": 2}}


def test_augment_is_seeded_per_batch_and_leaves_generators() -> None:
    transform = build_transform([CROP, "RandomHorizontalFlip", {"class_path": f"{USER}.Halve"}])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = (augment(IMAGES, transform, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    flips = augment(IMAGES[:1].repeat(8, 1, 1, 1), build_transform("RandomHorizontalFlip"), 0)
    assert len({image.numpy().tobytes() for image in flips}) == 2  # each sample has its own draw


def test_build_transform_builds_nested_class_paths() -> None:
    inner = {"class_path": "RandomHorizontalFlip", "init_args": {"p": 1.0}}
    outer = {"class_path": "RandomApply", "init_args": {"transforms": [inner], "p": 1.0}}
    assert torch.equal(augment(IMAGES, build_transform(outer), 0), IMAGES.flip(-1))


def test_batches_transform_differs_per_epoch_and_repeats() -> None:
    def epochs() -> list[torch.Tensor]:
        made = TensorBatches(
            IMAGES,
            torch.arange(12),
            torch.arange(12),
            5,
            generator=torch.Generator().manual_seed(0),
            transform=build_transform(CROP),
        )
        # In order of the samples: what differs is the augmentation.
        return [
            torch.cat([x for x, _ in batches])[torch.cat([y for _, y in batches]).argsort()]
            for batches in [list(made), list(made)]
        ]

    one, two = epochs(), epochs()
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], one[1])
    assert one[0].dtype == torch.float32


def test_augment_float_images_are_transformed_in_0_to_1() -> None:
    images = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8)
    doubled = augment(images, build_transform({"class_path": f"{USER}.Scaled", "init_args": {"factor": 0.5}}), 0)
    torch.testing.assert_close(doubled, images / 2 - 0.5)
    jitter = build_transform({"class_path": "ColorJitter", "init_args": {"brightness": 0.01}})
    torch.testing.assert_close(augment(images, jitter, 0), images, atol=0.021, rtol=0)
    flipped = augment(images, build_transform({"class_path": "RandomHorizontalFlip", "init_args": {"p": 1.0}}), 0)
    torch.testing.assert_close(flipped, images.flip(-1))
    assert (flipped.min(), flipped.max()) == (-1, 1)


def test_evaluation_loaders_have_no_transform(npz: Path) -> None:
    blobs = FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8)
    plain = torch.cat([x for x, _ in blobs.test_dataloader()])
    augmented = FederatedDataModule(str(npz), num_clients=3, alpha=1.0, batch_size=8, transform=CROP)
    assert torch.equal(torch.cat([x for x, _ in augmented.test_dataloader()]), plain)
    assert not torch.equal(
        torch.cat([x for x, _ in augmented.train_dataloader()]), torch.cat([x for x, _ in blobs.train_dataloader()])
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("RandomHorizontalFlop", "expected a class of torchvision.transforms.v2, got 'RandomHorizontalFlop'. Did you"),
        ({"class_path": "no_such_module.X"}, "expected a class that can be imported, got 'no_such_module.X'"),
        ({"class_path": f"{USER}.NotCallable"}, "expected a transform, got a NotCallable, which is not callable"),
        ({"class_path": f"{USER}.Failing"}, r"expected to accept a torch.uint8 tensor \(1, 8, 8\). It failed: Runtime"),
        (
            {"class_path": f"{USER}.Cropped"},
            r"expected to keep shape and type, \(1, 8, 8\) and torch.uint8, got \(1, 7",
        ),
        ({"class_path": "ToDtype", "init_args": {"dtype": "x"}}, "expected .*"),
        ({"class_path": "RandomCrop"}, "expected arguments of RandomCrop, got .*, which failed with TypeError"),
        ({"name": "RandomCrop"}, "expected class_path and optionally init_args, got"),
        ([], "expected at least one transform"),
    ],
)
def test_setup_invalid_transform_raises_one_line(npz: Path, spec: Any, message: str) -> None:
    data = FederatedDataModule(str(npz), num_clients=3, alpha=1.0, transform=spec)
    with pytest.raises(UserError, match=f"^data.transform: {message}") as caught:
        data.setup()
    assert "\n" not in str(caught.value)


def test_check_transform_refuses_tables() -> None:
    with pytest.raises(UserError, match=r"^data.transform: expected null for tables"):
        check_transform("RandomHorizontalFlip", torch.from_numpy(np.zeros((2, 5), np.float32)))
