"""Measurements of many clients: the table, and the comparison of two versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedekd.data import FederatedDataModule
from perf import many_clients
from perf.many_clients import main, write_digits


def test_write_digits_gives_each_client_nine_for_training(tmp_path: Path) -> None:
    write_digits(tmp_path / "d.npz", 150)  # more than there are
    data = FederatedDataModule(str(tmp_path / "d.npz"), num_clients=150, partition="iid", min_samples=2)
    assert {len(splits.train) for splits in data.clients} == {9}


@pytest.mark.parametrize("is_equal", [True, False])
def test_main_against_another_version_compares_results(
    is_equal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measure(source: Path, clients: int, *others: Any) -> dict[str, Any]:
        return {"clients": clients, "results": "same" if is_equal or source == many_clients.ROOT else "other"}

    monkeypatch.setattr(many_clients, "measure", measure)
    assert main(["--clients", "3", "5", f"--against={tmp_path}"]) == (0 if is_equal else 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| version | clients | results |"
    assert lines[-3] == "| this | 5 | same |"
    assert lines[-1] == ("The results are equal, byte for byte." if is_equal else "The results differ.")
