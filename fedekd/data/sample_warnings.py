"""Warnings on samples and splits before training."""

from __future__ import annotations

from collections.abc import Sequence

from fedekd.data.client_splits import ClientSplits
from fedekd.data.near_copies import find_near_copies, near_copy_warning
from fedekd.data.samples import Samples
from fedekd.data.stored import StoredInputs


def data_warnings(samples: Samples, clients: Sequence[ClientSplits]) -> list[str]:
    """Return warnings on samples and splits, one line each.

    Args:
        samples: The samples.
        clients: Splits of the clients; held-out images are compared with training images of the same client, unless
            they are stored: that would read all of them.
    """
    if isinstance(samples.inputs, StoredInputs):
        if samples.group is not None:
            return list(samples.warnings)
        return [
            *samples.warnings,
            "data.dataset: inputs are read from files, and validation and test are not searched for near-copies of"
            " training images. Give --data.group_column if several are of one patient",
        ]
    copies = None
    if samples.inputs.ndim == 4:  # images
        copies = near_copy_warning(find_near_copies(samples.inputs, clients), clients, samples.group is not None)
    return [*samples.warnings, *([] if copies is None else [copies])]
