"""Where images come from: a file of one's own, or a known data set by name."""

from __future__ import annotations

import io
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedekd.data.images import ImageData
from fedekd.data.npz import SPLITS, Splits, one_line, pool, read_npz
from fedekd.data.tiny_imagenet import NUM_CLASSES, read_tiny_imagenet
from fedekd.errors import UserError, nearest
from fedekd.tasks import Task

_FAILURES = (
    OSError,  # URLError and HTTPError are among them
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
    TypeError,
    AssertionError,
    MemoryError,
    ImportError,
)
"""What packages raise for files that are missing, cut short or altered, and for downloads that fail."""


_SIZES = ("", "_64", "_128", "_224")
"""What MedMNIST appends to a flag for images larger than 28 x 28."""


class Source(NamedTuple):
    """A known data set.

    `load(name, root, download)` gives its splits or raises one of `_FAILURES`; `by_hand` says where under the
    root its package looks for files.
    """

    task: Task
    num_classes: int
    load: Callable[[str, Path, bool], Splits]
    by_hand: str = ""


def load_images(
    name: str,
    root: str | Path = "data",
    task: Task | None = None,
    num_classes: int | None = None,
    download: bool = True,
) -> ImageData:
    """Load a data set, all its official splits pooled.

    Args:
        name: The path of an .npz file in MedMNIST's layout (`{train,val,test}_{images,labels}`, splits may be
            missing or empty), or a name. A name is first looked for as ROOT/NAME.npz, then loaded by its own
            package: `digits` (scikit-learn), `fashionmnist`, `cifar10` and `cifar100` (torchvision), every 2D
            flag of MedMNIST (`retinamnist`, `organamnist_64`, ...), `diabetic_retinopathy` (MedIMeta); or, for
            `tinyimagenet`, from the folder `tiny-imagenet-200`, unzipped by hand.
        root: Folder of the data files.
        task: `classification` or `regression`; None takes the data set's own (an unknown file:
            classification).
        num_classes: Number of classes or grades; None takes the data set's own (an unknown file: the largest
            label + 1).
        download: Whether a package may download what is not there.

    Returns:
        The images and targets, in memory.

    Raises:
        UserError: If the name is unknown, or the data are missing, damaged or not of the kind described.

    Example:
        >>> digits = load_images("digits")
        >>> digits.pixels.shape, digits.num_classes, digits.task
        (torch.Size([1797, 1, 8, 8]), 10, 'classification')
    """
    folder = Path(root).expanduser()
    is_path = name.endswith(".npz")
    path = Path(name).expanduser() if is_path else folder / f"{name}.npz"
    key = path.stem
    source = SOURCES.get(key) or _medmnist_sources().get(key)
    if source is None and not is_path and key in _refused():
        raise UserError(f"data.dataset: {name!r} cannot be used, {_refused()[key]}")
    if is_path or path.is_file():
        splits = read_npz(path)
    elif source is not None:
        splits = _from_package(name, source, folder, download)
    else:
        raise UserError(
            f"data.dataset: unknown data set {name!r} and no file '{path}'; "
            f"give the path of an .npz file or a known name: {_hint(name)}"
        )
    if source is not None:
        task = task or source.task
        num_classes = source.num_classes if num_classes is None else num_classes
    images, labels, sizes = pool(key, splits)
    del splits  # or they would lie beside the pooled copy while that is laid out anew
    return ImageData.from_arrays(key, images, labels, task or "classification", num_classes, sizes)


@cache
def _medmnist_sources() -> dict[str, Source]:
    """A row for each 2D flag of MedMNIST and each of its sizes; asked last, for the import takes a second."""
    from medmnist import INFO

    tasks: dict[str, Task] = {
        "binary-class": "classification",
        "multi-class": "classification",
        "ordinal-regression": "regression",
    }
    return {
        f"{flag}{size}": Source(tasks[info["task"]], len(info["label"]), partial(_medmnist, info, size))
        for flag, info in INFO.items()
        if info["task"] in tasks and not flag.endswith("3d")
        for size in _SIZES
    }


@cache
def _refused() -> dict[str, str]:
    """MedMNIST's flags that are no images with one label each, and why."""
    from medmnist import INFO

    reasons = {}
    for flag, info in INFO.items():
        for size in _SIZES:
            if flag.endswith("3d"):
                reasons[f"{flag}{size}"] = "it holds volumes; only MedMNIST's 2D sets are images"
            elif info["task"].startswith("multi-label"):
                reasons[f"{flag}{size}"] = "it is multi-label; one class or grade an image is needed"
    return reasons


def _digits(name: str, root: Path, download: bool) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"train": (np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target)}


def _torchvision(class_name: str, name: str, root: Path, download: bool) -> Splits:
    from torchvision import datasets

    dataset = getattr(datasets, class_name)
    train, test = (dataset(root, train=is_train, download=download) for is_train in (True, False))
    return {
        "train": (np.asarray(train.data), np.asarray(train.targets)),
        "test": (np.asarray(test.data), np.asarray(test.targets)),
    }


def _tiny_imagenet(name: str, root: Path, download: bool) -> Splits:
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise FileNotFoundError(
            "Tiny ImageNet is downloaded by hand, from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        )
    return read_tiny_imagenet(folder)


def _medmnist(info: dict[str, Any], size: str, name: str, root: Path, download: bool) -> Splits:
    if not download:
        raise FileNotFoundError("no such file")
    from torchvision.datasets.utils import download_url

    root.mkdir(parents=True, exist_ok=True)
    # Moved into place only once its checksum is right: an interrupted download leaves no broken file behind.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        download_url(info[f"url{size}"], folder, f"{name}.npz", info[f"MD5{size}"])
        (Path(folder) / f"{name}.npz").replace(root / f"{name}.npz")
    return read_npz(root / f"{name}.npz")


def _medimeta(name: str, root: Path, download: bool) -> Splits:
    """The grades of DeepDRiD's regular fundus images: MedIMeta's `dr_regular`, task `DR level`."""
    dataset_id = "dr_regular"
    folders = [folder for folder in (root / "MedIMeta", root) if (folder / dataset_id / "info.yaml").is_file()]
    if not folders:
        raise FileNotFoundError("MedIMeta is downloaded by hand, from https://zenodo.org/records/7884735")
    try:
        from medimeta import MedIMeta
    except ImportError as error:
        raise UserError(
            f"data.dataset: {name!r} needs the package medimeta ({one_line(error)}); pip install 'fedekd[medimeta]'"
        ) from error
    data_path = str(folders[0])
    info = MedIMeta.get_info_dict(data_path, dataset_id)
    # Two of its quality scores have five steps as well, but they count 1, 4, 6, 8, 10.
    graded = [
        task["task_name"]
        for task in info["tasks"]
        if task["task_target"] == "ORDINAL_REGRESSION" and sorted(task["labels"]) == [0, 1, 2, 3, 4]
    ]
    if len(graded) != 1:
        tasks = ", ".join(repr(task["task_name"]) for task in info["tasks"])
        raise UserError(
            f"data.dataset: {name!r} needs one ordinal task with the grades 0..4, such as 'DR level'; "
            f"'{folders[0] / dataset_id}' has the tasks {tasks}"
        )
    has_hdf5 = (folders[0] / dataset_id / "images.hdf5").is_file()
    dataset = MedIMeta(data_path, dataset_id, graded[0], transform=np.asarray, use_hdf5=has_hdf5)
    splits: Splits = {}
    for split in SPLITS:
        if info["splits_num_samples"].get(split, 0):
            chosen = dataset.get_split_indices(split)
            pixels, labels = zip(*(dataset[index] for index in chosen), strict=True)
            splits[split] = np.stack(pixels), np.asarray([int(label) for label in labels])
    return splits


def _from_package(name: str, source: Source, root: Path, download: bool) -> Splits:
    try:
        with _quiet_network():
            splits = source.load(name, root, download)
    except UserError:
        raise
    except _FAILURES as error:
        how = "could not be downloaded" if download else "may not be downloaded (data.download is false)"
        places = f"'{root / name}.npz' in MedMNIST's layout"
        if source.by_hand:
            places += f", or '{root}/{source.by_hand}'"
        raise UserError(
            f"data.dataset: {name!r} is not readable under '{root}' and {how} ({one_line(error)}); put it "
            f"there as {places}"
        ) from error
    return splits


@contextmanager
def _quiet_network(seconds: float = 30.0) -> Iterator[None]:
    """Keep packages off stdout and let a network that does not answer fail within `seconds`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _hint(name: str) -> str:
    # The larger sizes would make it a list of fifty names.
    known = [flag for flag in _medmnist_sources() if "_" not in flag]
    return nearest(name, [*SOURCES, *known])


SOURCES = {
    "digits": Source("classification", 10, _digits),
    "fashionmnist": Source("classification", 10, partial(_torchvision, "FashionMNIST"), "FashionMNIST/raw/*-ubyte"),
    "cifar10": Source("classification", 10, partial(_torchvision, "CIFAR10"), "cifar-10-batches-py/*"),
    "cifar100": Source("classification", 100, partial(_torchvision, "CIFAR100"), "cifar-100-python/*"),
    "tinyimagenet": Source("classification", NUM_CLASSES, _tiny_imagenet, "tiny-imagenet-200/*"),
    "diabetic_retinopathy": Source("regression", 5, _medimeta, "MedIMeta/dr_regular/*"),
}
"""Known names beside MedMNIST's flags. A new data set is one function and one row."""
