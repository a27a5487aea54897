"""Warnings on the classes and sizes of sites."""

from __future__ import annotations

import numpy as np

from fedekd.data.site_warnings import site_warnings
from fedekd.errors import LONGEST_ERROR


def test_site_warnings_name_all_sites_in_one_line_per_kind():
    counts = [[9, 0, 4, 0], [9, 1, 0, 0], [9, 9, 9, 0]]
    lines = site_warnings(["Basel", "Zürich", "Bern"], counts, ["a", "b", "c", "d"], [2, 9, 10])
    assert lines == [
        "data.sites: 2 of 3 sites lack classes that others have: 'Basel' (b), 'Zürich' (c)",
        "data.sites: fewer than 10 test samples, so that scores are imprecise: 'Basel' (2), 'Zürich' (9)",
    ]


def test_site_warnings_without_classes_or_cause_are_empty():
    assert site_warnings(["a", "b"], np.zeros((2, 0)), [], [10, 10]) == []
    assert site_warnings(["a", "b"], [[1, 1], [1, 1]], ["x", "y"], [10, 10]) == []


def test_site_warnings_of_many_sites_and_classes_are_short():
    names, classes = [f"site {number}" * 7 for number in range(200)], ["long name " * 20] * 100
    counts = 1 - np.eye(200, 100, dtype=np.int64)
    counts[0] = 0
    for line in site_warnings(names, counts, classes, [1] * 200):
        assert len(line) <= LONGEST_ERROR
        assert "in all" in line
