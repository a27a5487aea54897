"""Warnings on the sites of a federation before training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedekd.errors import listed, shorten

#: Test samples of a site below which its scores are reported as imprecise.
FEW_SAMPLES = 10

_LONGEST_CLASS = 24


def site_warnings(
    names: Sequence[str], class_counts: npt.ArrayLike, class_names: Sequence[str], test_sizes: Sequence[int]
) -> list[str]:
    """Return a line on missing classes of sites, and one on few test samples.

    Args:
        names: Names of the sites.
        class_counts: Samples per site and class, shape (sites, classes); no class in regression.
        class_names: Names of the classes.
        test_sizes: Test samples of each site.

    Example:
        >>> for line in site_warnings(["north", "south"], [[5, 0], [20, 20]], ["well", "sick"], [1, 12]):
        ...     print(line)
        data.sites: 1 of 2 sites lack classes that others have: 'north' (sick)
        data.sites: fewer than 10 test samples, so that scores are imprecise: 'north' (1)
    """
    counts = np.asarray(class_counts)
    missing = (counts == 0) & (counts.sum(axis=0) > 0)
    lines = []
    if missing.any():
        lacking = []
        for site in np.flatnonzero(missing.any(axis=1)).tolist():
            labels = np.flatnonzero(missing[site]).tolist()
            classes = listed(shorten(class_names[label], _LONGEST_CLASS) for label in labels)
            lacking.append(f"{names[site]!r} ({classes})")
        lines.append(
            f"data.sites: {len(lacking)} of {len(names)} sites lack classes that others have: {listed(lacking)}"
        )
    if few := [f"{name!r} ({size})" for name, size in zip(names, test_sizes, strict=True) if size < FEW_SAMPLES]:
        lines.append(f"data.sites: fewer than {FEW_SAMPLES} test samples, so that scores are imprecise: {listed(few)}")
    return lines
