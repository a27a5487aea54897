"""The paper's cells are all there, hang together, and those that cannot be right are marked."""

from __future__ import annotations

from collections import Counter

import pytest

from fedekd.benchmark.published import ALPHAS, DATASETS, PublishedCell, published

PRINTED = [cell for cell in published() if not cell.derived]
OF_TABLE = {(cell.table, *cell.place): cell for cell in published()}


def test_every_printed_cell_is_there_once() -> None:
    assert len(PRINTED) == 456
    assert len({(cell.table, *cell.place) for cell in PRINTED}) == 456
    assert Counter(cell.table for cell in PRINTED) == {1: 72, 2: 24, 4: 72, 5: 24, 6: 72, 7: 24, 8: 72, 9: 24, 10: 72}
    assert {cell.dataset for cell in PRINTED} == set(DATASETS)
    assert {cell.alpha for cell in PRINTED} == set(ALPHAS)


def test_some_cells_against_the_paper() -> None:
    fedekd = OF_TABLE[1, "FedeKD", "fashionmnist", 0.1]
    assert (fedekd.mean, fedekd.std, fedekd.fault) == (-0.0065, 0.0066, "")
    assert OF_TABLE[9, "FedeKD", "retinamnist", 0.1].mean == 1.2428
    assert OF_TABLE[10, "LogSumExp", "octmnist", 0.3].mean == -0.004


def test_local_follows_from_every_method_alike() -> None:
    local = {cell.place[1:]: cell.mean for cell in published() if cell.derived}
    assert len(local) == 18
    assert local["fashionmnist", 0.1] == 0.9338
    assert local["diabetic_retinopathy", 0.5] == 1.3334
    for cell in PRINTED:
        if cell.table in (8, 9):
            gain = OF_TABLE[cell.table - 7, *cell.place].mean
            # Three figures rounded to 1e-4 each; they must not be off by more.
            assert cell.mean - gain == pytest.approx(local[cell.place[1:]], abs=1.5001e-4)


def faulty(reason: str) -> list[PublishedCell]:
    return [cell for cell in PRINTED if reason in cell.fault]


def test_the_faulty_cells_are_those_of_the_specification() -> None:
    copied = faulty("plain FedAvg's cell of Table 1")
    assert {cell.place for cell in copied} == {
        ("No gating", dataset, alpha)
        for dataset in ("fashionmnist", "cifar10", "octmnist", "organamnist")
        for alpha in (0.3, 0.5)
    }
    for cell in copied:
        plain = OF_TABLE[1, "FedAvg", cell.dataset, cell.alpha]
        assert (cell.mean, cell.std) == (plain.mean, plain.std)
    assert {cell.place for cell in faulty("at another alpha")} == {
        (energy, "octmnist", alpha) for energy in ("Entropy", "LogSumExp", "Feature") for alpha in (0.1, 0.5)
    }
    assert len(faulty("FedDyn's server state")) == 4 * 12 + 4 * 6
    assert all(cell.method == "FedDyn" for cell in faulty("FedDyn's server state"))
    weak = faulty("one shared initialization")
    assert len(weak) == 2 * 2 * 4 * 3
    assert {(cell.method, cell.dataset) for cell in weak} == {
        (method, dataset) for method in ("FedAvg", "FedProx") for dataset in ("fashionmnist", "retinamnist")
    }
    assert [cell.place for cell in faulty("not seen")] == [("No gating", "fashionmnist", 0.1)]
    assert not any(cell.fault for cell in PRINTED if cell.method == "FedeKD")
