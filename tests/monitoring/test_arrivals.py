"""Cells of arrivals: labels, prediction sets, times and outputs that are not finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest

from fedekd.errors import UserError
from fedekd.monitoring import Arrivals, MonitorStart, Quantity, read_arrivals

NETWORK = "ab" * 16
NAMES = ("hot dog", "cat", "dog")
COVERAGE = Quantity("coverage", "coverage", 0.1)
HARM = Quantity("do_no_harm", "do_no_harm", 0.1)


def read(folder: Path, quantity: Quantity, names: Sequence[str] = NAMES, **columns: Sequence[object]) -> Arrivals:
    """Read a file with the given columns, of classification if classes have names."""
    rows = len(next(iter(columns.values())))
    table = {
        "sample": [f"{row:016X}" for row in range(rows)],
        "model": f"H{NETWORK[:12]}",
        "policy": "None",
        "exit": 1,
    }
    pd.DataFrame(table | columns).to_csv(folder / "a.csv", index=False)
    task = "classification" if names else "regression"
    start = MonitorStart(
        task, 0, "", NETWORK, True, (quantity,), 0.9, class_names=tuple(names), clip=1.0 if names else 4.0
    )
    return read_arrivals(folder / "a.csv", start)


def test_read_arrivals_sets_have_numbers_or_names(tmp_path: Path) -> None:
    """Each set by hand: numbers by spaces, names by semicolons, or one name, or nothing."""
    rows = {
        "0 1": ("hot dog", 0),
        "2": ("dog", 0),
        "hot dog": ("0", 0),
        "cat; hot dog": ("hot dog", 0),
        "dog;": (1, 1),
        "1.0 2.0": ("2.0", 0),
        "": ("cat", 1),
        "0 2": ("cat", 1),
    }
    found = read(tmp_path, COVERAGE, set=list(rows), target=[target for target, _ in rows.values()])
    assert found.values["coverage"].tolist() == [omitted for _, omitted in rows.values()]


@pytest.mark.parametrize(
    ("names", "cells", "target", "message"),
    [
        (NAMES, "cat dog", "cat", "line 2: set: expected numbers separated by spaces, or names by ';', of hot dog"),
        (NAMES, "cat;bird", "cat", "line 2: set: expected numbers separated by spaces, or names by ';'"),
        (NAMES, "0 3", "cat", "line 2: set: expected numbers"),
        (NAMES, "0", "1.5", "line 2: target: expected one of the labels hot dog, cat, dog, got '1.5'"),
        (("1", "2", "9"), "0 2", "9", "line 2: set: expected a label of one class, of 1, 2, 9, got '0 2'"),
        (("1", "2", "9"), "0", "1.0", "It is the number of one class and the name of another"),
    ],
)
def test_read_arrivals_unknown_label_raises(
    tmp_path: Path, names: tuple[str, ...], cells: str, target: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, COVERAGE, names, set=[cells], target=[target])
    assert message in str(error.value)


def test_read_arrivals_outputs_that_are_not_finite_are_wrong(tmp_path: Path) -> None:
    labels = {"label_federated": [-1, 0, -1], "label_local": [0, -1, -1]}
    assert read(tmp_path, HARM, target=[0, 0, 0], **labels).values["do_no_harm"].tolist() == [1, -1, 0]
    values = {"value_federated": ["inf", 1, "inf"], "value_local": [1, "inf", "inf"]}
    # The last: against the federated model, as in the rule.
    assert read(tmp_path, HARM, (), target=[1, 1, 1], **values).values["do_no_harm"].tolist() == [1, -1, 1]
    limits = {"lower": ["-inf", 2], "upper": [0, "inf"]}
    assert read(tmp_path, COVERAGE, (), target=[-9, 1], **limits).values["coverage"].tolist() == [0, 1]
    with pytest.raises(UserError, match="line 3: value_local: expected a value, got an empty cell"):
        read(tmp_path, HARM, (), target=[1, 1], value_federated=[1, 1], value_local=[1, ""])


def test_read_arrivals_naive_times_are_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    times = ["2026-07-01T12:00:00", "2026-07-01T13:30:00+01:00", "2026-07-01T12:45:00"]
    columns = {"target": [0, 0, 0], "set": ["0", "0", "0"]}
    assert read(tmp_path, COVERAGE, time=times, **columns).rows == 3
    with pytest.raises(UserError, match="line 3: time: expected times that do not decrease"):
        read(tmp_path, COVERAGE, time=[times[0], "2026-07-01T12:59:00+01:00", times[2]], **columns)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("start", "end", "message"), [("\ufeff", "", ""), ("", ",", "the rows have more cells")])
def test_read_arrivals_of_a_spreadsheet(tmp_path: Path, start: str, end: str, message: str) -> None:
    """A byte order mark is no part of a name; a comma after the last cell does not shift the columns."""
    read(tmp_path, COVERAGE, set=["0", "1"], target=[0, 0])
    header, *rows = (tmp_path / "a.csv").read_text().splitlines()
    text = "\n".join([start + header, *(row + end for row in rows), ""])
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    settings = MonitorStart("classification", 0, "", NETWORK, True, (COVERAGE,), 0.9, class_names=NAMES)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        assert read_arrivals(tmp_path / "a.csv", settings).values["coverage"].tolist() == [0, 1]
