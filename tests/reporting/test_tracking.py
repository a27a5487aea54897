"""metrics.csv and the Tracker of loggers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedekd.atomic import atomic_file
from fedekd.errors import UserError
from fedekd.reporting import Tracker, read_metrics_csv, write_metrics_csv


def test_write_metrics_csv_gives_exact_bytes(tmp_path):
    rows = [
        {"client_10/delta": 0.1, "round": 1, "delta/avg": 0.1 + 0.2, "comm/bytes_up": 12},
        {"round": 2, "client_2/delta": -1e-17, "delta/avg": float("nan"), "accuracy/mean": 1.0},
    ]
    write_metrics_csv(rows, tmp_path / "new" / "metrics.csv")
    assert (tmp_path / "new" / "metrics.csv").read_bytes() == (
        b"round,accuracy/mean,comm/bytes_up,delta/avg,client_2/delta,client_10/delta\n"
        b"1,,12,0.30000000000000004,,0.1\n"
        b"2,1.0,,nan,-1e-17,\n"
    )
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["metrics.csv"]


def test_write_metrics_csv_bytes_do_not_depend_on_types_or_order(tmp_path):
    plain = [{"round": 1, "a": 0.1, "b": 7}]
    numpy = [{"b": np.int64(7), "a": np.float64(0.1), "round": np.int32(1)}]
    for name, rows in (("plain", plain), ("numpy", numpy)):
        write_metrics_csv(rows, tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "numpy").read_bytes() == b"round,a,b\n1,0.1,7\n"


def test_write_metrics_csv_without_rounds_writes_a_header(tmp_path):
    write_metrics_csv([], tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_bytes() == b"round\n"
    assert read_metrics_csv(tmp_path / "metrics.csv") == []


@settings(max_examples=40)
@given(st.dictionaries(st.from_regex(r"[a-z]+/[a-z]+", fullmatch=True), st.floats(allow_nan=False) | st.integers()))
def test_read_metrics_csv_returns_the_written_rows(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    rows = [{"round": 1, **numbers}, {"round": 2}]
    write_metrics_csv(rows, path)
    back = read_metrics_csv(path)
    assert back == rows
    assert {name: type(value) for name, value in back[0].items()} == {
        name: type(value) for name, value in rows[0].items()
    }


def test_atomic_file_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with atomic_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


class RecordingLogger:
    """Stands for a Lightning logger, and records its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name in {"log_hyperparams", "log_metrics", "save", "finalize"}:
            return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))
        raise AttributeError(name)


class HoldingLogger(RecordingLogger):
    """FederationLogger that has stored two rounds."""

    def bind(self, run_dir, warn):
        self.calls.append(("bind", run_dir))

    def rounds_held(self):
        return 2

    def log_summary(self, summary):
        self.calls.append(("log_summary", summary))

    def log_artifacts(self, folder, names, metadata):
        self.calls.append(("log_artifacts", folder, names, metadata()))

    def finish(self, status):
        self.calls.append(("finish", status))


def test_tracker_sends_each_logger_the_rounds_it_lacks(tmp_path, make_row):
    plain, holding = RecordingLogger(), HoldingLogger()
    tracker = Tracker([plain, holding], tmp_path)
    tracker.log_config({"seed": 0})
    tracker.replay([make_row(1), make_row(2)])
    tracker.log_round(make_row(3))
    tracker.log_round(make_row(3))
    tracker.log_summary({"mean": 1.0})
    tracker.log_artifacts(tmp_path, ["checkpoints"], lambda: {"rounds": 3})
    tracker.close()
    tracker.close()
    logged = [("log_metrics", make_row(round_idx), round_idx) for round_idx in (1, 2, 3)]
    assert [call for call in plain.calls if call[0] == "log_metrics"] == logged
    assert [call[0] for call in plain.calls[:3]] == ["log_hyperparams", "log_metrics", "save"]
    assert plain.calls[-1] == ("finalize", "success")
    assert holding.calls == [
        ("bind", tmp_path),
        ("log_hyperparams", {"seed": 0}),
        logged[2],
        ("save",),
        ("log_summary", {"mean": 1.0}),
        ("log_artifacts", tmp_path, ["checkpoints"], {"rounds": 3}),
        ("finalize", "success"),
        ("finish", "success"),
    ]


class FailingLogger(HoldingLogger):
    """HoldingLogger of which one call raises an error of two lines, or the given one."""

    def __init__(self, method, error=None):
        super().__init__()
        self.method, self.error = method, error or OSError("no space\nleft " + 500 * "!")

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "method"):

            def fail(*_, **__):
                raise self.error

            return fail
        return super().__getattribute__(name)

    def rounds_held(self):
        return 0


def track(tracker, tmp_path, make_row):
    """Make every call of a run."""
    tracker.log_config({"seed": 0})
    tracker.replay([make_row(1)])
    tracker.log_round(make_row(2))
    tracker.log_artifacts(tmp_path, ["checkpoints"], lambda: {"rounds": 3})
    tracker.log_summary({"mean": 1.0})
    tracker.close()


METHODS = ("bind", "log_hyperparams", "rounds_held", "log_metrics", "save", "log_summary", "log_artifacts")


@pytest.mark.parametrize("method", [*METHODS, "finalize", "finish"])
def test_tracker_failing_logger_is_one_warning_and_the_others_continue(tmp_path, make_row, method):
    before, failing, after, reference = RecordingLogger(), FailingLogger(method), HoldingLogger(), HoldingLogger()
    warned = []
    track(Tracker([before, failing, after], tmp_path, warned.append), tmp_path, make_row)
    track(Tracker([reference], tmp_path), tmp_path, make_row)
    assert after.calls == reference.calls
    assert [call[0] for call in before.calls].count("log_metrics") == 2
    [line] = warned
    assert line.startswith("logger: FailingLogger failed and gets nothing more of this run (OSError: no space left !!")
    assert "\n" not in line
    assert len(line) <= 400
    if method in METHODS:  # closed all the same: the rows until then are worth keeping
        assert failing.calls[-2:] == [("finalize", "success"), ("finish", "success")]


def test_tracker_user_error_is_raised_before_training_and_warned_of_later(tmp_path, make_row):
    error = UserError("logger: expected a project, got '/'")
    with pytest.raises(UserError, match="expected a project"):
        Tracker([FailingLogger("rounds_held", error)], tmp_path).replay([])
    warned = []
    tracker = Tracker([FailingLogger("log_summary", error)], tmp_path, warned.append)
    track(tracker, tmp_path, make_row)
    assert len(warned) == 1


@pytest.mark.parametrize(("status", "expected"), [("success", "success"), ("interrupted", "failed")])
def test_tracker_close_gives_lightning_loggers_their_own_status(tmp_path, status, expected):
    plain, holding = RecordingLogger(), HoldingLogger()
    Tracker([plain, holding], tmp_path).close(status)
    assert plain.calls == [("finalize", expected)]
    assert holding.calls[1:] == [("finalize", expected), ("finish", status)]


def test_tracker_urls_are_those_of_loggers_that_have_one(tmp_path):
    online, offline = HoldingLogger(), HoldingLogger()
    online.url, offline.url = "https://example.org/run", None
    assert Tracker([RecordingLogger(), offline, online], tmp_path).urls() == ["https://example.org/run"]


def test_tracker_interrupt_in_a_logger_is_raised(tmp_path, make_row):
    with pytest.raises(KeyboardInterrupt):
        track(Tracker([FailingLogger("log_metrics", KeyboardInterrupt())], tmp_path), tmp_path, make_row)


def test_tracker_csv_logger_has_all_rounds_after_a_resume(tmp_path, make_row):
    from lightning.pytorch.loggers import CSVLogger

    tracker = Tracker([CSVLogger(tmp_path, name="log", version="v")], tmp_path)
    tracker.log_round(make_row(1))  # no close: a kill right after the round must not lose it
    assert len(read_metrics_csv(tmp_path / "log" / "v" / "metrics.csv")) == 1
    tracker = Tracker([CSVLogger(tmp_path, name="log", version="v")], tmp_path)
    tracker.replay([make_row(1)])
    tracker.log_round(make_row(2))
    tracker.close()
    rows = read_metrics_csv(tmp_path / "log" / "v" / "metrics.csv")
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[1]["delta/avg"] == make_row(2)["delta/avg"]
