"""Values that `TrainerFactory.resolve` chooses for a machine."""

from __future__ import annotations

import pytest

from fedekd.modules import TrainerFactory, trainer_factory


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("2,1", 2), ("8", 4), ("", 4), ("0", 4), ("many", 4)])
def test_auto_threads_are_the_cores_or_fewer_by_omp_num_threads(
    limit: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_factory, "usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert TrainerFactory(accelerator="cpu").resolve().threads == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert TrainerFactory(accelerator="cpu").resolve().threads == 4
