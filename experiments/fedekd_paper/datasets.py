"""Table 3 of the paper: properties of the data sets, as loaded and as published."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.published import DATASETS
from fedekd.data import load_samples
from fedekd.errors import UserError

#: Task, classes, image size, channels, and samples of the official splits.
_FACTS = ("task", "classes", "size", "channels", "splits")
_PUBLISHED = {
    "fashionmnist": ("classification", 10, "28x28", 1, (60_000, 10_000)),
    "cifar10": ("classification", 10, "32x32", 3, (50_000, 10_000)),
    "octmnist": ("classification", 4, "28x28", 1, (97_477, 10_832, 1_000)),
    "organamnist": ("classification", 11, "28x28", 1, (34_561, 6_491, 17_778)),
    "retinamnist": ("regression", 5, "28x28", 3, (1_080, 120, 400)),
    "diabetic_retinopathy": ("regression", 5, "224x224", 3, (1_400, 300, 300)),
}


def dataset_table(root: str, others: Sequence[str] = ()) -> pd.DataFrame:
    """Compare local data sets with the paper's Table 3, without downloads.

    Args:
        root: Folder of the data files.
        others: Names of further data sets.

    Returns:
        One row per data set and source (loaded, paper): facts, samples, per_class (loaded only), verdict, and the
        reason if it could not be loaded.
    """
    rows = []
    for name in dict.fromkeys((*DATASETS, *others)):
        loaded, per_class, reason = None, "", ""
        try:
            data = load_samples(name, root, download=False)
        except UserError as error:
            reason = str(error)
        else:
            splits = tuple(size for size in data.split_sizes.values() if size)
            channels, height, width = data.input_shape
            loaded = (data.task, data.num_classes, f"{height}x{width}", channels, splits)
            per_class = " ".join(map(str, data.labels.bincount(minlength=data.num_classes).tolist()))
        paper = _PUBLISHED.get(name)
        verdict = "agrees" if loaded == paper else "differs"
        verdict = "not loaded" if loaded is None else "not in the paper" if paper is None else verdict
        for source, facts in (("loaded", loaded), ("paper", paper)):
            if facts is not None:
                row = {"data set": display_name(name), "source": source, **dict(zip(_FACTS, facts, strict=True))}
                row |= {"splits": " / ".join(f"{size:,}" for size in facts[-1]), "samples": f"{sum(facts[-1]):,}"}
                more = {"verdict": verdict, "reason": reason if source == "paper" else ""}
                rows.append(row | {"per class": per_class if source == "loaded" else ""} | more)
    return pd.DataFrame(rows)
