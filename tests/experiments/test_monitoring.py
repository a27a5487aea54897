"""Streams of `experiments.monitoring` on synthetic scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.monitoring import __main__ as experiment
from experiments.monitoring.scores import CLEAN, Scores
from experiments.monitoring.streams import Design, Streams, draw, mapie_alarms, monitor_alarms, window_alarms
from fedekd.functional import betting_e_process, error_payoffs, first_alarm

DESIGN = Design(streams=12, arrivals=200, change=80, reference=40, windows=(50,))


def scores(error_rate: float, shift: float = 0.0, size: int = 300) -> Scores:
    rng = np.random.default_rng(0)
    exits = rng.integers(1, 4, size)
    return {
        "exits": exits,
        "errors": (rng.random(size) < error_rate).astype(float),
        "excess": np.zeros(size),
        "confidence": rng.random(size) - shift,
        "disagreement": rng.random(size),
        "thresholds": np.array([0.8, np.inf, -np.inf]),
    }


NOISE = scores(0.6, shift=1)
POOLS = {CLEAN: scores(0.01), "gaussian_noise-3": NOISE, "contrast-3": scores(0.01), "gaussian_noise-5": NOISE}


def test_draw_corrupts_all_samples_after_the_change() -> None:
    pools = {
        name: {**values, "confidence": np.arange(300.0) + 1000 * (name != CLEAN)} for name, values in POOLS.items()
    }
    streams = draw(DESIGN, pools, "contrast-3")
    values = np.concatenate([streams.reference["confidence"], streams.values["confidence"]])
    assert values.shape == (240, 12)
    assert len({tuple(column) for column in values.T}) == 12
    assert ((values >= 1000).sum(axis=0) == 120).all()
    assert (values[-120:] >= 1000).all()


def test_monitor_alarms_equal_one_stream_at_a_time() -> None:
    streams = draw(DESIGN, POOLS, "gaussian_noise-3")
    found = monitor_alarms(DESIGN, streams, "exit 1", 2)
    for column in range(DESIGN.streams):
        rows = np.flatnonzero(streams.values["exits"][:, column] == 1)
        evidence = betting_e_process(error_payoffs(streams.values["errors"][rows, column], DESIGN.target_risk))
        index = first_alarm(evidence, DESIGN.level / 2)
        assert index is not None
        assert found[column] == rows[index]


def test_window_alarms_are_at_the_ends_of_windows() -> None:
    streams = draw(DESIGN, POOLS, "gaussian_noise-3")
    for quantity in ("exit 1", "confidence"):
        rows = window_alarms(DESIGN, streams, quantity, 2, 50)
        assert set(rows) <= {99.0, 149.0, 199.0}
    never = Streams({}, {**streams.values, "excess": np.zeros((200, 12))})
    assert np.isinf(window_alarms(DESIGN, never, "do_no_harm", 2, 50)).all()


def test_mapie_alarms_count_the_samples_of_the_exit() -> None:
    pytest.importorskip("mapie")
    exits, errors = np.tile([[1], [2]], (100, 3)), np.zeros((200, 3))
    errors[1::2, 0] = 1  # of the other exit
    errors[0::2, 1] = 1
    errors[100::2, 2] = 1
    rows = mapie_alarms(DESIGN, Streams({}, {"exits": exits, "errors": errors}), "exit 1", 1)
    assert np.isinf(rows[0])
    assert 0 < rows[1] < 100 < rows[2]
    assert rows[1] % 2 == rows[2] % 2 == 0


def test_main_stores_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mapie")
    monkeypatch.setattr(experiment, "Design", lambda: DESIGN)
    monkeypatch.setattr(experiment, "LATER_CHANGES", (90,))
    monkeypatch.setattr(experiment, "train", lambda *arguments: None)
    monkeypatch.setattr(experiment, "scores_of", lambda *arguments: POOLS)
    options = [f"--results={tmp_path}", "--streams=12"]
    experiment.main(options)
    before = (tmp_path / "streams.csv").read_bytes()
    monkeypatch.setattr(experiment, "train", None)
    experiment.main(options)
    assert (tmp_path / "streams.csv").read_bytes() == before
    rows = pd.read_csv(tmp_path / "streams.csv").set_index(["scenario", "change", "test", "quantity"])
    for change in (80, 90):
        assert rows.loc[("gaussian_noise-3", change, "monitor", "exit 1"), "alarms_after"].item() == 12
    assert rows.loc[(CLEAN, 80, "monitor", "exit 1"), "false_alarms"].item() == 0
    assert len(pd.read_csv(tmp_path / "pools.csv")) == 4 * 4
