from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedekd.data import FederatedDataModule, Samples, data_warnings
from fedekd.data.near_copies import MAX_SHARE, MIN_COPIES, NearCopies, find_near_copies, near_copy_warning


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
    data.adopt(Samples.from_arrays("scans", images, labels, "classification", 2))
    return data


@pytest.mark.parametrize("size", [28, 64])
def test_scans_of_one_patient_in_two_splits_are_reported_once(size: int) -> None:
    data = module(scans(30, 10, size))
    [line] = data.warnings()
    assert "near-copies" in line
    assert "clients 0, 1" in line
    assert "one split" in line
    assert len(line) <= 400
    assert all(row.copies > 0.4 * row.checked for row in find_near_copies(data.samples.inputs, data.clients))


def test_one_image_per_patient_is_silent() -> None:
    assert module(scans(300, 1)).warnings() == []


def test_only_the_client_with_copies_is_named() -> None:
    data = module(np.concatenate([scans(30, 10), scans(300, 1)]))
    parts = [torch.arange(300), torch.arange(300, 600)]
    for splits, part in zip(data.clients, parts, strict=True):
        order = part[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
        for name, indices in zip(("train", "validation", "test"), order.split([180, 60, 60]), strict=True):
            object.__setattr__(splits, name, indices)
    [line] = data_warnings(data.samples, data.clients)
    assert "(clients 0)" in line


@pytest.mark.parametrize(("alpha", "num_clients"), [(0.1, 6), (100.0, 1)])
def test_digits_are_silent(alpha: float, num_clients: int) -> None:
    data = FederatedDataModule("digits", num_clients=num_clients, alpha=alpha)
    found = find_near_copies(data.samples.inputs, data.clients)
    assert sum(row.copies for row in found) < 0.2 * MAX_SHARE * sum(row.checked for row in found)
    assert near_copy_warning(found) is None


@pytest.mark.parametrize("per_patient", [1, 2, 50])
def test_exact_copies_are_found_in_groups_of_any_size(per_patient: int) -> None:
    data = module(np.repeat(scans(200 // per_patient, 1), per_patient, axis=0), num_clients=1)
    copies = near_copy_warning(find_near_copies(data.samples.inputs, data.clients))
    assert (copies is not None) == (per_patient > 1)


def test_few_held_out_images_and_tiny_clients_are_compared() -> None:
    data = module(scans(12, 1, size=8), num_clients=1)
    [row] = find_near_copies(data.samples.inputs, data.clients, max_checked=1)
    assert (row.client, row.checked) == (0, 1)


@pytest.mark.parametrize(("per_patient", "warns"), [(10, True), (1, False)])
def test_copies_at_many_small_clients_are_reported_together(per_patient: int, warns: bool) -> None:
    images = np.repeat(scans(3000 // per_patient, 1, size=8), per_patient, axis=0)
    everyone = torch.arange(3000).view(150, 20)  # a patient is at one client
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    clients = [
        SimpleNamespace(client=number, train=part[:12], validation=part[12:16], test=part[16:])
        for number, part in enumerate(everyone[:, order])
    ]
    found = find_near_copies(torch.from_numpy(images)[:, None], clients)  # type: ignore[arg-type]
    assert max(row.checked for row in found) < MIN_COPIES
    line = near_copy_warning(found)
    assert (line is not None) == warns
    if line is not None:
        assert ", ...)" in line
        assert len(line) <= 400


def test_near_copy_warning_with_groups_does_not_advise_them():
    clients: list[Any] = [SimpleNamespace(client=4, name="Zürich")]
    advice = {has: near_copy_warning([NearCopies(4, 9, 10)], clients, has) or "" for has in (False, True)}
    assert all("(sites 'Zürich')" in line for line in advice.values())
    assert "--data.group_column" in advice[False]
    assert "--data.group_column" not in advice[True]


def test_compared_images_are_thinned_before_they_are_copied() -> None:
    pixels = torch.zeros(40, 3, 280, 280, dtype=torch.uint8)
    splits = SimpleNamespace(client=0, train=torch.arange(30), validation=torch.arange(30, 40), test=torch.arange(0))
    with LargestTensor() as largest:
        find_near_copies(pixels, [splits])  # type: ignore[list-item]
    assert largest.bytes < pixels.numel() // 4


class LargestTensor(TorchDispatchMode):
    """Size of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None and not result.is_inference():
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result
