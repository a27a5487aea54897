"""Loading of data sets by name or from a file."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, partial
from hashlib import md5
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from fedekd.atomic import atomic_file
from fedekd.data.assemble import assemble
from fedekd.data.formats import format_of, read_path
from fedekd.data.formats.npz import Splits, pool, read_npz
from fedekd.data.formats.torch_dataset import is_dataset, read_dataset
from fedekd.data.raw import SPLITS, RawSamples, ReadOptions
from fedekd.data.samples import Samples
from fedekd.data.sites import error_at_site, find_sites, skipped_warnings
from fedekd.data.tiny_imagenet import NUM_CLASSES, read_tiny_imagenet
from fedekd.errors import UserError, describe_error, nearest, shorten, shorten_path
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
"""Errors of packages for missing, truncated or altered files and failed downloads."""

_TIMEOUT = 30.0
"""Seconds without data after which a download fails."""

_SIZES = ("", "_64", "_128", "_224")
"""Suffixes of MedMNIST's flags for images of 28, 64, 128 and 224 pixels."""


DATA_OPTIONS = (
    *("root", "task", "num_classes", "download", "ignore_label", "sites"),
    *(field.name for field in fields(ReadOptions) if field.name not in ("task", "num_classes", "ignore_label")),
)
"""Arguments of a data module that decide which samples are loaded, in addition to `dataset`."""


class Source(NamedTuple):
    """One row of `SOURCES`.

    Attributes:
        task: Task of the data set.
        num_classes: Number of classes or grades; None if it follows from the data.
        load: `(name, root, download) -> splits or samples`, which may raise the errors of `_FAILURES`; or a file of the
            package.
        by_hand: Where under the root the package looks for files that were placed by hand.
        options: Fields of `ReadOptions` for a file of the package.
    """

    task: Task
    num_classes: int | None
    load: Callable[[str, Path, bool], Splits | RawSamples] | Path
    by_hand: str = ""
    options: Mapping[str, Any] = MappingProxyType({})

    def complete(self, read: ReadOptions) -> ReadOptions:
        """Return options with task and number of classes, if none are given."""
        inferred = read.num_classes is None and read.classes is None
        return replace(
            read,
            task=read.task or self.task,
            num_classes=self.num_classes if inferred else read.num_classes,
        )

    def with_columns(self, read: ReadOptions) -> ReadOptions:
        """Return options with `options` where none are given."""
        return replace(read, **{name: value for name, value in self.options.items() if getattr(read, name) is None})


def load_samples(
    name: str | None = None,
    root: str | Path = "data",
    task: Task | None = None,
    num_classes: int | None = None,
    download: bool = True,
    ignore_label: int | None = None,
    sites: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Samples:
    """Load a data set or the sites of a federation, with given splits pooled.

    Args:
        name: Path of a file or folder in one of `FORMATS`, or a name. A name is first searched as ROOT/NAME.npz, then
            loaded by a package: `digits` (scikit-learn), `fashionmnist`, `cifar10` and `cifar100` (torchvision), each
            2D flag of MedMNIST (`retinamnist`, `organamnist_64`, ...), `diabetic_retinopathy` (MedIMeta),
            `tinyimagenet` (the folder `tiny-imagenet-200`, unzipped by hand), `heart_disease` (a table of this
            package). None with `sites`.
        root: Folder of the data files. Default `data`.
        task: `classification` or `regression`. None (default): the task of the data set; `classification` for other
            files.
        num_classes: Number of classes or grades. None (default): that of the data set; the largest label + 1 for other
            files.
        download: Let packages download missing files. Default True.
        ignore_label: Samples with this label are left out of every split. Default None.
        sites: A folder with a file or subfolder per site, or a mapping from names of sites to paths or to data sets by
            class_path; see `find_sites`. Default None.
        **options: Other fields of `ReadOptions`.

    Returns:
        The samples.

    Raises:
        UserError: If the name is unknown, or the data are missing, corrupt or not as described.

    Example:
        >>> digits = load_samples("digits")
        >>> digits.inputs.shape, digits.num_classes, digits.task
        (torch.Size([1797, 1, 8, 8]), 10, 'classification')
    """
    options |= {"task": task, "num_classes": num_classes, "ignore_label": ignore_label}
    read = ReadOptions(**options)
    if (name is None) == (sites is None):
        raise UserError(
            "data.dataset: expected a data set or data.sites, got "
            + ("neither" if name is None else f"{shorten(repr(name))} and data.sites. Omit one")
        )
    if sites is not None:
        return _load_sites(sites, read)
    assert name is not None
    folder = Path(root).expanduser()
    path = Path(name).expanduser()
    is_path = format_of(path) is not None
    if not is_path:
        path = folder / f"{name}.npz"
    key = path.stem
    source = (SOURCES.get(key) or _medmnist_sources().get(key)) if path.suffix == ".npz" else None
    if source is None and not is_path and key in _refused():
        raise UserError(f"data.dataset: {name!r} is not supported: {_refused()[key]}")
    if source is not None:
        read = source.complete(read)
    if is_path or path.is_file():
        raw = read_path(path, read)
    elif source is not None and isinstance(source.load, Path):
        read = source.with_columns(read)
        raw = read_path(source.load, read)
    elif source is None and Path(name).expanduser().exists():
        raw = read_path(Path(name).expanduser(), read)  # raises the error for an unknown format
    elif source is not None:
        raw = _from_package(name, source, folder, download, read)
    else:
        raise UserError(
            f"data.dataset: expected a known name or the path of a file or folder, got {shorten(repr(name))} (file"
            f" '{shorten_path(path)}' not found). {_hint(name)}"
        )
    return assemble(key, {None: raw}, read)


def _load_sites(sites: str | Mapping[str, Any], options: ReadOptions) -> Samples:
    """Load the sites of a folder or mapping."""
    name = Path(sites).expanduser().resolve().name if isinstance(sites, str) else "sites"
    # The limit of memory is that of all sites together: `assemble` reads their images.
    described = replace(options, memory_limit=0.0)
    parts: dict[str | None, RawSamples] = {
        site: _read_site(site, source, described) for site, source in find_sites(sites).items()
    }
    samples = assemble(name, parts, options)
    return replace(samples, warnings=(*skipped_warnings(sites), *samples.warnings))


def _read_site(site: str, source: Any, options: ReadOptions) -> RawSamples:
    """Read the samples of one site.

    Raises:
        UserError: As `read_path`, with the name of the site.
    """
    if is_dataset(source):
        return read_dataset(site, source, options)
    if not isinstance(source, str | Path):
        raise UserError(
            f"data.sites: {site!r}: expected a path, or class_path and init_args of a data set, got"
            f" {shorten(repr(source))}"
        )
    try:
        return read_path(Path(source).expanduser(), options)
    except UserError as error:
        raise error_at_site(error, site) from error


@cache
def _medmnist_sources() -> dict[str, Source]:
    """Return a row per 2D flag and size of MedMNIST, whose import takes a second."""
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
    """Return the flags of MedMNIST that are not supported, with the reason."""
    from medmnist import INFO

    reasons = {}
    for flag, info in INFO.items():
        for size in _SIZES:
            if flag.endswith("3d"):
                reasons[f"{flag}{size}"] = "it holds volumes. Use a 2D set."
            elif info["task"].startswith("multi-label"):
                reasons[f"{flag}{size}"] = "it is multi-label. Use a set with one class or grade per image."
    return reasons


def _digits(name: str, root: Path, download: bool) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"train": (np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target)}


def _torchvision(class_name: str, name: str, root: Path, download: bool) -> Splits:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    dataset = getattr(datasets, class_name)
    try:
        train, test = (dataset(root, train=is_train) for is_train in (True, False))
    except RuntimeError:  # files are missing or corrupt
        if not download:
            raise
        # Not download=True: it has no timeout, and some versions print.
        if hasattr(dataset, "resources"):
            folder = root / class_name / "raw"
            archives = [
                ([mirror + file for mirror in dataset.mirrors], folder / file, digest)
                for file, digest in dataset.resources
            ]
        else:
            archives = [([dataset.url], root / dataset.filename, dataset.tgz_md5)]
        for urls, path, digest in archives:
            if not check_integrity(path, digest):
                _download(urls, path, digest)
            extract_archive(path, path.parent)
        train, test = (dataset(root, train=is_train) for is_train in (True, False))
    return {
        "train": (np.asarray(train.data), np.asarray(train.targets)),
        "test": (np.asarray(test.data), np.asarray(test.targets)),
    }


def _tiny_imagenet(name: str, root: Path, download: bool) -> Splits:
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise FileNotFoundError(
            "Tiny ImageNet must be downloaded by hand from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        )
    return read_tiny_imagenet(folder)


def _medmnist(info: dict[str, Any], size: str, name: str, root: Path, download: bool) -> Splits:
    if not download:
        raise FileNotFoundError("file not found")
    _download([info[f"url{size}"]], root / f"{name}.npz", info[f"MD5{size}"])
    return read_npz(root / f"{name}.npz")


def _medimeta(name: str, root: Path, download: bool) -> Splits:
    """Load DeepDRiD's regular fundus images from MedIMeta, task `DR level`."""
    dataset_id = "dr_regular"
    folders = [folder for folder in (root / "MedIMeta", root) if (folder / dataset_id / "info.yaml").is_file()]
    if not folders:
        raise FileNotFoundError("MedIMeta must be downloaded by hand from https://zenodo.org/records/7884735")
    try:
        from medimeta import MedIMeta
    except ImportError as error:
        raise UserError(
            f"data.dataset: {name!r} needs the package medimeta ({describe_error(error)});"
            " pip install 'fedekd[medimeta]'"
        ) from error
    data_path = str(folders[0])
    info = MedIMeta.get_info_dict(data_path, dataset_id)
    # Two quality scores also have five steps, numbered 1, 4, 6, 8, 10.
    graded = [
        task["task_name"]
        for task in info["tasks"]
        if task["task_target"] == "ORDINAL_REGRESSION" and sorted(task["labels"]) == [0, 1, 2, 3, 4]
    ]
    if len(graded) != 1:
        tasks = ", ".join(repr(task["task_name"]) for task in info["tasks"])
        raise UserError(
            f"data.dataset: {name!r}: expected one ordinal task with the grades 0..4, such as 'DR level', got the "
            f"tasks {tasks} in '{folders[0] / dataset_id}'"
        )
    has_hdf5 = (folders[0] / dataset_id / "images.hdf5").is_file()
    dataset = MedIMeta(data_path, dataset_id, graded[0], transform=np.asarray, use_hdf5=has_hdf5)
    splits: Splits = {}
    for split in SPLITS:
        if info["splits_num_samples"].get(split, 0):
            indices = dataset.get_split_indices(split)
            pixels, labels = zip(*(dataset[index] for index in indices), strict=True)
            splits[split] = np.stack(pixels), np.asarray([int(label) for label in labels])
    return splits


def _from_package(name: str, source: Source, root: Path, download: bool, options: ReadOptions) -> RawSamples:
    assert not isinstance(source.load, Path)
    try:
        splits = source.load(name, root, download)
    except UserError:
        raise
    except _FAILURES as error:
        reason = "the download failed" if download else "data.download is false"
        by_hand = f" or as '{source.by_hand}' in this folder" if source.by_hand else ""
        raise UserError(
            f"data.dataset: cannot read {name!r} in data.root, and {reason} ({describe_error(error, 115)})."
            f" Place it as '{shorten_path(root / name)}.npz' in MedMNIST's layout{by_hand}."
        ) from error
    return splits if isinstance(splits, RawSamples) else pool(name, splits, options)


def _download(urls: Sequence[str], path: Path, digest: str) -> None:
    """Download a file from the first address that has it, and verify its MD5.

    Raises:
        Exception: The error of the last address, if all fail.
    """
    for url in urls[:-1]:
        with suppress(*_FAILURES):
            return _download_from(url, path, digest)
    return _download_from(urls[-1], path, digest)


def _download_from(url: str, path: Path, digest: str) -> None:
    """Download a file, with a bar on a terminal's standard error, and verify its MD5.

    An interrupted or corrupt download leaves no file.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fedekd"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, atomic_file(path) as file:
        size = {"total": response.length, "unit": "B", "unit_scale": True}
        with tqdm.wrapattr(file, "write", desc=path.name, disable=None, leave=False, **size) as output:
            checked = md5(usedforsecurity=False)
            while block := response.read(1 << 20):
                checked.update(block)
                output.write(block)
        if checked.hexdigest() != digest:
            raise RuntimeError(f"the file of {url} does not match its MD5")


def _hint(name: str) -> str:
    # Without the larger sizes, which would make a list of fifty names.
    known = [flag for flag in _medmnist_sources() if "_" not in flag]
    return nearest(name, [*SOURCES, *known])


_FILES = Path(__file__).resolve().parent / "files"

SOURCES = {
    "digits": Source("classification", 10, _digits),
    "fashionmnist": Source("classification", 10, partial(_torchvision, "FashionMNIST"), "FashionMNIST/raw/*-ubyte"),
    "cifar10": Source("classification", 10, partial(_torchvision, "CIFAR10"), "cifar-10-batches-py/*"),
    "cifar100": Source("classification", 100, partial(_torchvision, "CIFAR100"), "cifar-100-python/*"),
    "tinyimagenet": Source("classification", NUM_CLASSES, _tiny_imagenet, "tiny-imagenet-200/*"),
    "diabetic_retinopathy": Source("regression", 5, _medimeta, "MedIMeta/dr_regular/*"),
    "heart_disease": Source(
        "classification",
        None,
        _FILES / "heart_disease.csv",
        options={
            "target_column": "disease",
            "categorical_columns": ("sex", "cp", "fbs", "restecg", "exang", "slope", "thal"),
            "ignored_columns": ("site",),
        },
    ),
}
"""Known names in addition to MedMNIST's flags. A new data set is one function and one row."""
