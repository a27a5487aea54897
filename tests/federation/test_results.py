"""Progress of a run: names of sites, and what earlier versions stored."""

from __future__ import annotations

import json
import math

from fedekd.federation.results import Progress


def test_progress_of_an_earlier_version_has_numbered_clients():
    stored = json.loads(json.dumps(Progress(names=["Basel", "Zürich"]).to_json()))
    assert Progress.from_json(stored).names == ["Basel", "Zürich"]
    del stored["names"]
    assert Progress.from_json(stored).names == []


def test_progress_keeps_columns_of_named_sites():
    row = {"round": 1, "client_Zürich (CH) no. 1/delta": 0.5, "client_St. Gallen/gate/weight_mean": 0.1, "bad name!": 1}
    stored = json.loads(json.dumps(Progress(history=[row], names=["Zürich (CH) no. 1", "St. Gallen"]).to_json()))
    assert list(Progress.from_json(stored).history[0]) == list(row)[:3]


def test_progress_stores_each_column_name_once():
    rows = [{"round": 1, "client_0/auroc": math.nan, "delta/avg": 0.1}, {"round": 2, "client_1/auroc": 0.1 + 0.2}]
    progress = Progress(history=rows, local_metrics={1: [{"auroc": 0.5}, {"auroc": 1 / 3}]})
    text = json.dumps(progress.to_json())
    assert text.count("client_0/auroc") == text.count('"auroc"') == 1
    stored = Progress.from_json(json.loads(text))
    assert str(stored) == str(progress)
    assert stored.history[1] == rows[1]


def test_progress_of_an_earlier_version_has_rows_by_name():
    rows, metrics = [{"round": 1, "delta/avg": 0.1}], {"1": [{"auroc": 0.5}]}
    stored = json.loads(json.dumps(Progress().to_json())) | {"history": rows, "local_metrics": metrics}
    progress = Progress.from_json(stored)
    assert progress.history == rows
    assert progress.local_metrics == {1: [{"auroc": 0.5}]}
