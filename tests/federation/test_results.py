"""Progress of a run: names of sites, and what earlier versions stored."""

from __future__ import annotations

import json

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
