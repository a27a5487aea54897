"""The paper's Table 3: what the data sets hold, as loaded here and as the paper has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedekd.benchmark.measured import title
from fedekd.benchmark.published import DATASETS
from fedekd.data import load_images
from fedekd.errors import UserError


@dataclass(frozen=True)
class DatasetFacts:
    """What a data set holds.

    Attributes:
        task: classification or regression.
        classes: Classes or grades.
        size: Height and width in pixels.
        channels: Of an image.
        splits: Samples of the official splits that are not empty, in their order.
    """

    task: str
    classes: int
    size: tuple[int, int]
    channels: int
    splits: tuple[int, ...]

    @property
    def samples(self) -> int:
        """All splits together."""
        return sum(self.splits)


_PUBLISHED = {
    "fashionmnist": DatasetFacts("classification", 10, (28, 28), 1, (60_000, 10_000)),
    "cifar10": DatasetFacts("classification", 10, (32, 32), 3, (50_000, 10_000)),
    "octmnist": DatasetFacts("classification", 4, (28, 28), 1, (97_477, 10_832, 1_000)),
    "organamnist": DatasetFacts("classification", 11, (28, 28), 1, (34_561, 6_491, 17_778)),
    "retinamnist": DatasetFacts("regression", 5, (28, 28), 3, (1_080, 120, 400)),
    "diabetic_retinopathy": DatasetFacts("regression", 5, (224, 224), 3, (1_400, 300, 300)),
}


@dataclass(frozen=True)
class DatasetLine:
    """A line of Table 3.

    Attributes:
        name: Our name.
        title: Its name to be read.
        loaded: As loaded here; None if it is not here.
        paper: As the paper has it; None if the paper does not use it.
        per_class: Samples of each class, as loaded.
        missing: Why it was not loaded; empty if it was.
    """

    name: str
    title: str
    loaded: DatasetFacts | None
    paper: DatasetFacts | None
    per_class: tuple[int, ...] = ()
    missing: str = ""

    @property
    def verdict(self) -> str:
        """What is to be said of ours beside the paper's."""
        if self.loaded is None:
            return "not here"
        if self.paper is None:
            return "not in the paper"
        return "agrees" if self.loaded == self.paper else "differs"


def dataset_lines(root: str, others: Sequence[str] = ()) -> list[DatasetLine]:
    """The paper's data sets, and others, as they lie under a root; nothing is downloaded.

    Args:
        root: Folder of the data files.
        others: Names of further data sets.
    """
    return [_line(name, root) for name in dict.fromkeys((*DATASETS, *others))]


def _line(name: str, root: str) -> DatasetLine:
    called, paper = title(name), _PUBLISHED.get(name)
    try:
        data = load_images(name, root, download=False)
    except UserError as error:
        return DatasetLine(name, called, None, paper, missing=str(error))
    splits = tuple(size for size in data.splits.values() if size)
    loaded = DatasetFacts(data.task, data.num_classes, data.image_size, data.in_channels, splits)
    counts = tuple(data.labels.bincount(minlength=data.num_classes).tolist())
    return DatasetLine(name, called, loaded, paper, counts)
