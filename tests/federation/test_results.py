"""Progress of a run as JSON values."""

from __future__ import annotations

import json
import math

from fedekd.federation.results import Progress


def test_progress_stores_each_column_name_once():
    rows = [{"round": 1, "client_0/auroc": math.nan, "delta/avg": 0.1}, {"round": 2, "client_1/auroc": 0.1 + 0.2}]
    names = ["Zürich (CH) no. 1", "St. Gallen"]
    progress = Progress(history=rows, local_metrics={1: [{"auroc": 0.5}, {"auroc": 1 / 3}]}, names=names)
    text = json.dumps(progress.to_json())
    assert text.count("client_0/auroc") == text.count('"auroc"') == 1
    stored = Progress.from_json(json.loads(text))
    assert str(stored) == str(progress)
    assert stored.history[1] == rows[1]
