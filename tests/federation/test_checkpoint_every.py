"""`--checkpoint_every`: rounds between two checkpoints are lost by a stop, and no number changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from fedekd.errors import UserError
from fedekd.federation import RoundOptions, SilentObserver
from fedekd.federation import orchestrator as orchestrator_module
from fedekd.federation.checkpoint import CheckpointStore

from .conftest import Federate
from .runs import contents

ROUNDS = 6


@pytest.fixture(autouse=True)
def saved_rounds() -> None:
    """Keep the option, which other tests replace."""


class Clock(SilentObserver):
    """Observer whose clock goes on 4 s with each round, and that stops a run in a round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int = -1) -> None:
        self.now, self.stop, self.rows = 100.0, stop, list[int]()
        monkeypatch.setattr(orchestrator_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def round_started(self, round_idx: int) -> None:
        self.now += 4.0

    def phase_started(self, client: int, phase: str) -> None:
        if len(self.rows) == self.stop:
            raise KeyboardInterrupt

    def round_finished(self, row: Any) -> None:
        self.rows.append(int(row["round"]))


class Logger(CSVLogger):
    """Logger that records the rounds that it gets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows = list[int]()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(int(metrics["round"]))


def options(seconds: float) -> RoundOptions:
    return RoundOptions(rounds=ROUNDS, participation=0.3, checkpoint_every=seconds)


def test_run_with_any_interval_stopped_in_any_round_gives_equal_bytes(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10 s a round of 4 s is saved after rounds 0, 3 and 6, counted from the first round of the process."""
    parts = {"baseline_dir": tmp_path / "local"}
    federate(output=tmp_path / "whole", rounds=options(0.0), observer=Clock(monkeypatch), **parts).run()
    expected = contents(tmp_path / "whole")
    for seconds, stop, saved in ((10.0, 1, 1), (10.0, 5, 4), (0.0, 3, 4), (1e6, 5, 1)):
        run = tmp_path / f"{seconds}-{stop}"
        clock, loggers = Clock(monkeypatch, stop), [Logger(tmp_path), Logger(tmp_path)]
        with pytest.raises(KeyboardInterrupt):
            federate(output=run, rounds=options(seconds), observer=clock, loggers=loggers[:1], **parts).run()
        assert clock.rows == [*range(1, stop + 1)]  # shown at once
        assert CheckpointStore(run / "checkpoints").newest == saved
        assert loggers[0].rows == [*range(1, saved)]
        assert (run / "metrics.csv").exists() == (saved > 1)
        observer = Clock(monkeypatch)
        federate(output=run, rounds=options(5.0), observer=observer, loggers=loggers[1:], **parts).run()
        assert observer.rows == [*range(saved, ROUNDS + 1)]
        assert loggers[1].rows == [*range(1, ROUNDS + 1)]
        assert contents(run) == expected


def test_run_without_folder_logs_every_round_at_once(federate: Federate, tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    federate(rounds=RoundOptions(rounds=2, checkpoint_every=1e6), loggers=[logger]).run()
    assert logger.rows == [1, 2]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_round_options_invalid_interval_raises_user_error(value: float) -> None:
    with pytest.raises(UserError, match=r"^checkpoint_every: expected a finite number of at least 0, got"):
        RoundOptions(checkpoint_every=value)
