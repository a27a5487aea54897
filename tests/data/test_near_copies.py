from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedekd.data import FederatedDataModule, ImageData, data_warnings
from fedekd.data.near_copies import MAX_SHARE, find_near_copies, near_copy_warning


def scans(patients: int, per_patient: int, size: int = 28) -> npt.NDArray[np.uint8]:
    """Return scans of smooth random images: shifted by a pixel, noisy, brighter or darker."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(patients):
        coarse = torch.from_numpy(rng.uniform(40, 215, (1, 1, 6, 6)))
        whole = torch.nn.functional.interpolate(coarse, size=(size + 2, size + 2), mode="bicubic")[0, 0].numpy()
        for _ in range(per_patient):
            row, column = rng.integers(0, 3, 2)
            scan = whole[row : row + size, column : column + size] * rng.uniform(0.9, 1.1)
            images.append(scan + rng.uniform(-20, 20) + rng.normal(0, 8, (size, size)))
    return np.clip(images, 0, 255).astype(np.uint8)


def module(images: npt.NDArray[np.uint8], num_clients: int = 2) -> FederatedDataModule:
    """Return random labels, partitioned iid."""
    labels = np.random.default_rng(1).integers(0, 2, len(images))
    data = FederatedDataModule("scans", num_clients=num_clients, partition="iid")
    data.adopt(ImageData.from_arrays("scans", images, labels, "classification", 2, {"train": len(images)}))
    return data


@pytest.mark.parametrize("size", [28, 64])
def test_scans_of_one_patient_in_two_splits_are_reported_once(size: int) -> None:
    data = module(scans(30, 10, size))
    [line] = data.warnings()
    assert "near-copies" in line
    assert "clients 0, 1" in line
    assert "one split" in line
    assert len(line) <= 400
    assert all(row.copies > 0.4 * row.checked for row in find_near_copies(data.images.pixels, data.clients))


def test_one_image_per_patient_is_silent() -> None:
    assert module(scans(300, 1)).warnings() == []


def test_only_the_client_with_copies_is_named() -> None:
    data = module(np.concatenate([scans(30, 10), scans(300, 1)]))
    parts = [torch.arange(300), torch.arange(300, 600)]
    for splits, part in zip(data.clients, parts, strict=True):
        order = part[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
        for name, indices in zip(("train", "validation", "test"), order.split([180, 60, 60]), strict=True):
            object.__setattr__(splits, name, indices)
    [line] = data_warnings(data.images, data.clients)
    assert "(clients 0)" in line


@pytest.mark.parametrize(("alpha", "num_clients"), [(0.1, 6), (100.0, 1)])
def test_digits_are_silent(alpha: float, num_clients: int) -> None:
    data = FederatedDataModule("digits", num_clients=num_clients, alpha=alpha)
    found = find_near_copies(data.images.pixels, data.clients)
    assert sum(row.copies for row in found) < 0.2 * MAX_SHARE * sum(row.checked for row in found)
    assert near_copy_warning(found) is None


@pytest.mark.parametrize("per_patient", [1, 2, 50])
def test_exact_copies_are_found_in_groups_of_any_size(per_patient: int) -> None:
    data = module(np.repeat(scans(200 // per_patient, 1), per_patient, axis=0), num_clients=1)
    copies = near_copy_warning(find_near_copies(data.images.pixels, data.clients))
    assert (copies is not None) == (per_patient > 1)


def test_few_held_out_images_and_tiny_clients_are_compared() -> None:
    data = module(scans(12, 1, size=8), num_clients=1)
    [row] = find_near_copies(data.images.pixels, data.clients, max_checked=1)
    assert (row.client, row.checked) == (0, 1)
