from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
import sys
import tarfile
from hashlib import md5
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from medmnist import INFO

from fedekd.data import load_samples
from fedekd.errors import UserError

WriteNpz = Any


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network: every address is recorded and refused, and the defaults of the process are unchanged."""
    asked: list[str] = []
    stdout = sys.stdout

    def refuse(request: Any, timeout: float | None = None) -> Any:
        asked.append(getattr(request, "full_url", request))
        assert timeout == 30
        assert sys.stdout is stdout
        assert socket.getdefaulttimeout() is None
        raise URLError("no network\nin a test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


def write_idx(path: Path, array: Any) -> None:
    """An array of uint8 in the format of the MNIST files."""
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def write_fashionmnist(root: Path) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 3, 1, 2, 8, 4], np.uint8)
    for part, chosen in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        write_idx(root / f"FashionMNIST/raw/{part}-images-idx3-ubyte", images[chosen])
        write_idx(root / f"FashionMNIST/raw/{part}-labels-idx1-ubyte", labels[chosen])
    return images, labels


def test_digits_are_scaled_to_full_range() -> None:
    digits = load_samples("digits", download=False)
    assert digits.inputs.shape == (1797, 1, 8, 8)
    assert digits.split_sizes == {"train": 1797, "val": 0, "test": 0}
    assert (digits.name, digits.task, digits.num_classes) == ("digits", "classification", 10)
    assert torch.bincount(digits.targets).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = sorted(set(digits.inputs.flatten().tolist()))
    assert levels == [round(level * 255 / 16) for level in range(17)]


def test_path_defaults_to_classification(write_npz: WriteNpz) -> None:
    data = load_samples(str(write_npz("mine", classes=4, shape=(8, 10, 3))))
    assert (data.name, data.task, data.num_classes) == ("mine", "classification", 4)
    assert data.inputs.shape == (42, 3, 8, 10)
    assert data.split_sizes == {"train": 30, "val": 0, "test": 12}


def test_task_and_num_classes_override_defaults(write_npz: WriteNpz) -> None:
    data = load_samples(str(write_npz("mine")), task="regression", num_classes=7)
    assert (data.task, data.num_classes, data.targets.dtype) == ("regression", 7, torch.float32)
    known = load_samples(str(write_npz("retinamnist")), task="classification", num_classes=3)
    assert (known.task, known.num_classes) == ("classification", 3)


def test_name_is_first_searched_in_root(write_npz: WriteNpz, tmp_path: Path, offline: list[str]) -> None:
    write_npz("digits")
    assert len(load_samples("digits", tmp_path)) == 42
    assert len(load_samples("digits", tmp_path / "elsewhere")) == 1797
    write_npz("anything")
    assert load_samples("anything", str(tmp_path)).num_classes == 3
    assert not offline


@pytest.mark.parametrize(
    ("name", "task", "num_classes"),
    [
        ("cifar10", "classification", 10),
        ("cifar100", "classification", 100),
        ("tinyimagenet", "classification", 200),
        ("octmnist", "classification", 4),
        ("organamnist", "classification", 11),
        ("organamnist_64", "classification", 11),
        ("pneumoniamnist_224", "classification", 2),
        ("retinamnist", "regression", 5),
        ("retinamnist_128", "regression", 5),
        ("diabetic_retinopathy", "regression", 5),
    ],
)
def test_known_name_has_task_and_classes(
    write_npz: WriteNpz, tmp_path: Path, name: str, task: str, num_classes: int
) -> None:
    path = write_npz(name, classes=2)
    for data in (load_samples(name, tmp_path, download=False), load_samples(str(path))):
        assert (data.name, data.task, data.num_classes) == (name, task, num_classes)


def test_label_outside_known_classes_raises(write_npz: WriteNpz, tmp_path: Path) -> None:
    write_npz("retinamnist", classes=6)
    with pytest.raises(UserError, match=r"'retinamnist': expected labels 0\.\.4 for 5 classes, got label 5"):
        load_samples("retinamnist", tmp_path)
    assert load_samples("retinamnist", tmp_path, num_classes=6).num_classes == 6


def test_fashionmnist_through_torchvision(
    tmp_path: Path, offline: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = write_fashionmnist(tmp_path)
    data = load_samples("fashionmnist", tmp_path)
    assert np.array_equal(data.inputs.numpy()[:, 0], images)
    assert data.targets.tolist() == labels.tolist()
    assert data.split_sizes == {"train": 5, "val": 0, "test": 2}
    assert (data.task, data.num_classes) == ("classification", 10)
    assert not offline
    assert capsys.readouterr().out == ""


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """7 images in the official layout, under checksums of their own; coarse labels lie beside the fine ones."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    labels = [99, 0, 3, 42, 2, 98, 57]
    folder = root / "cifar-100-python"
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5((folder / name).read_bytes()).hexdigest()

    for part, chosen in (("train", slice(0, 5)), ("test", slice(5, 7))):
        pixels = images[chosen].transpose(0, 3, 1, 2).reshape(-1, 3072)
        coarse = [label // 5 for label in labels[chosen]]
        digest = write(part, {"data": pixels, "fine_labels": labels[chosen], "coarse_labels": coarse})
        monkeypatch.setattr(f"torchvision.datasets.CIFAR100.{part}_list", [[part, digest]])
    names = {"fine_label_names": [f"class {number}" for number in range(100)]}
    meta = {"filename": "meta", "key": "fine_label_names", "md5": write("meta", names)}
    monkeypatch.setattr("torchvision.datasets.CIFAR100.meta", meta)
    return images, labels


def test_cifar100_through_torchvision(
    tmp_path: Path, offline: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = write_cifar100(tmp_path, monkeypatch)
    data = load_samples("cifar100", tmp_path)
    assert np.array_equal(data.inputs.numpy().transpose(0, 2, 3, 1), images)
    assert data.targets.tolist() == labels
    assert data.split_sizes == {"train": 5, "val": 0, "test": 2}
    assert (data.task, data.num_classes) == ("classification", 100)
    assert not offline
    assert capsys.readouterr().out == ""


def test_corrupt_cifar100_raises(tmp_path: Path, offline: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch)
    path = tmp_path / "cifar-100-python/test"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read 'cifar100' in .* or as 'cifar-100-python/\*'"):
        load_samples("cifar100", tmp_path)


def test_corrupt_fashionmnist_raises(tmp_path: Path, offline: list[str]) -> None:
    write_fashionmnist(tmp_path)
    path = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read 'fashionmnist' in"):
        load_samples("fashionmnist", tmp_path)


@pytest.mark.parametrize("name", ["fashionmnist", "cifar10", "cifar100", "octmnist", "retinamnist_64"])
def test_failed_download_names_the_path_to_use(
    tmp_path: Path, offline: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root = tmp_path / "new"
    with pytest.raises(UserError) as caught:
        load_samples(name, root)
    line = str(caught.value)
    assert "\n" not in line
    assert f"'{name}'" in line
    assert "the download failed" in line
    assert str(root / f"{name}.npz") in line
    assert offline
    assert capsys.readouterr().out == ""
    assert not list(root.glob("*.npz"))
    assert not [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["fashionmnist", "cifar10", "cifar100", "octmnist"])
def test_download_false_downloads_nothing(tmp_path: Path, offline: list[str], name: str) -> None:
    with pytest.raises(UserError, match=r"data\.download is false"):
        load_samples(name, tmp_path, download=False)
    assert not offline


class Response(BytesIO):
    """An answer of a server, of unknown length."""

    length = None


def test_download_with_wrong_checksum_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Response(b"half a file"))
    with pytest.raises(UserError, match="the download failed"):
        load_samples("octmnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_is_kept_in_root(write_npz: WriteNpz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_npz("source", classes=4).read_bytes()
    asked = []

    def download(request: Any, timeout: float) -> Response:
        asked.append(request.full_url)
        return Response(content)

    monkeypatch.setattr("urllib.request.urlopen", download)
    monkeypatch.setitem(INFO["octmnist"], "MD5_64", md5(content).hexdigest())
    root = tmp_path / "root"
    for _ in range(2):
        assert len(load_samples("octmnist_64", root)) == 42
    assert len(asked) == 1
    assert "octmnist_64.npz" in asked[0]
    assert [path.name for path in root.iterdir()] == ["octmnist_64.npz"]


def packed(folder: Path, name: str) -> bytes:
    """Return a .tar.gz of a folder."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, arcname=name)
    return file.getvalue()


@pytest.mark.parametrize("name", ["cifar100", "fashionmnist"])
def test_torchvision_archives_are_downloaded_and_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    archives = {}
    if name == "cifar100":
        images, labels = write_cifar100(tmp_path, monkeypatch)
        images = images.transpose(0, 3, 1, 2)
        archives["cifar-100-python.tar.gz"] = packed(tmp_path / "cifar-100-python", "cifar-100-python")
        digest = md5(archives["cifar-100-python.tar.gz"]).hexdigest()
        monkeypatch.setattr("torchvision.datasets.CIFAR100.tgz_md5", digest)
    else:
        images, labels = write_fashionmnist(tmp_path)
        images = images[:, None]
        for path in (tmp_path / "FashionMNIST/raw").iterdir():
            archives[f"{path.name}.gz"] = gzip.compress(path.read_bytes())
        resources = [(file, md5(content).hexdigest()) for file, content in archives.items()]
        monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", resources)
    asked = []

    def download(request: Any, timeout: float) -> Response:
        asked.append(request.full_url.rpartition("/")[2])
        return Response(archives[asked[-1]])

    monkeypatch.setattr("urllib.request.urlopen", download)
    for _ in range(2):
        data = load_samples(name, tmp_path / "new")
        assert np.array_equal(data.inputs.numpy(), images)
        assert data.targets.tolist() == list(labels)
    assert sorted(asked) == sorted(archives)
    assert capfd.readouterr() == ("", "")


def test_download_tries_each_mirror_and_names_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalled(Response):
        def read(self, *_: Any) -> bytes:
            raise TimeoutError("The read operation timed out")

    asked = []

    def download(request: Any, timeout: float) -> Response:
        asked.append(request.full_url)
        return Stalled()

    monkeypatch.setattr("urllib.request.urlopen", download)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://one/", "http://two/"])
    with pytest.raises(UserError, match=r"the download failed \(TimeoutError: The read operation timed out\)"):
        load_samples("fashionmnist", tmp_path / "new")
    assert [url.rpartition("/")[0] for url in asked] == ["http://one", "http://two"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("cifra10", ["got 'cifra10'", "cifra10.npz", "Did you mean 'cifar10'?"]),
        ("tiny-imagenet", ["Did you mean 'tinyimagenet'?"]),
        ("organmnist", ["Did you mean 'organ"]),
        ("zzz", ["Choose from: bloodmnist, ", "(18 in all)"]),
        ("chestmnist", ["'chestmnist' is not supported", "multi-label"]),
        ("chestmnist_128", ["multi-label"]),
        ("nodulemnist3d", ["'nodulemnist3d' is not supported", "volumes"]),
        ("gone.npz", ["file 'gone.npz' not found"]),
    ],
)
def test_unsupported_name_raises_one_line(tmp_path: Path, offline: list[str], name: str, texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_samples(name, tmp_path)
    assert "\n" not in str(caught.value)
    for text in ("data.dataset", *texts):
        assert text in str(caught.value)
    assert not offline


GRADES = {"task_name": "DR level", "task_target": "ORDINAL_REGRESSION", "labels": dict.fromkeys(range(5), "")}
CLARITY = {
    "task_name": "Clarity",
    "task_target": "ORDINAL_REGRESSION",
    "labels": dict.fromkeys((1, 4, 6, 8, 10), ""),
}


def fake_medimeta(monkeypatch: pytest.MonkeyPatch, tasks: list[Any]) -> None:
    """A stand-in for the package, with what it offers of one data set of 9 images."""

    class MedIMeta:
        def __init__(self, data_path: str, dataset_id: str, task_name: str, *, transform: Any, use_hdf5: bool) -> None:
            assert (dataset_id, task_name, use_hdf5) == ("dr_regular", "DR level", False)
            self.transform = transform

        @staticmethod
        def get_info_dict(data_path: str, dataset_id: str) -> dict[str, Any]:
            return {"tasks": tasks, "splits_num_samples": {"train": 5, "val": 0, "test": 4}}

        def get_split_indices(self, split: str) -> list[int]:
            return {"train": [0, 2, 4, 6, 8], "test": [1, 3, 5, 7]}[split]

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return self.transform(np.full((16, 16, 3), index, np.uint8)), torch.as_tensor(index % 5)

    module = ModuleType("medimeta")
    module.MedIMeta = MedIMeta  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medimeta", module)


@pytest.mark.parametrize("folder", ["MedIMeta/dr_regular", "dr_regular"])
def test_diabetic_retinopathy_through_medimeta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    fake_medimeta(monkeypatch, [CLARITY, GRADES])
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "info.yaml").touch()
    data = load_samples("diabetic_retinopathy", tmp_path)
    assert data.inputs.shape == (9, 3, 16, 16)
    assert data.inputs[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert data.targets.tolist() == [0, 2, 4, 1, 3, 1, 3, 0, 2]
    assert data.split_sizes == {"train": 5, "val": 0, "test": 4}
    assert (data.task, data.num_classes) == ("regression", 5)


def test_medimeta_without_graded_task_lists_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_medimeta(monkeypatch, [CLARITY])
    (tmp_path / "dr_regular").mkdir()
    (tmp_path / "dr_regular/info.yaml").touch()
    with pytest.raises(UserError, match=r"grades 0\.\.4, such as 'DR level', got the tasks 'Clarity'"):
        load_samples("diabetic_retinopathy", tmp_path)


def test_medimeta_package_or_data_missing_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"zenodo.*MedIMeta/dr_regular"):
        load_samples("diabetic_retinopathy", tmp_path)
    monkeypatch.setitem(sys.modules, "medimeta", None)
    (tmp_path / "dr_regular").mkdir()
    (tmp_path / "dr_regular/info.yaml").touch()
    with pytest.raises(UserError, match=r"pip install 'fedekd\[medimeta\]'"):
        load_samples("diabetic_retinopathy", tmp_path)


def shared_root(file: str) -> Path:
    root = Path(os.environ.get("FEDEKD_DATA", Path(__file__).parents[2] / "data"))
    if not (root / file).exists():
        pytest.skip(f"no {file} in {root}: set FEDEKD_DATA to a folder of the real data sets")
    return root


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "file", "splits", "counts"),
    [
        ("fashionmnist", "FashionMNIST/raw", (60000, 0, 10000), [7000] * 10),
        ("retinamnist", "retinamnist.npz", (1080, 120, 400), [714, 186, 326, 282, 92]),
        ("cifar10", "cifar10.npz", (50000, 0, 10000), [6000] * 10),
        ("cifar100", "cifar-100-python", (50000, 0, 10000), [600] * 100),
        ("tinyimagenet", "tiny-imagenet-200", (100000, 0, 10000), [550] * 200),
    ],
)
def test_real_data_have_known_counts(name: str, file: str, splits: tuple[int, int, int], counts: list[int]) -> None:
    data = load_samples(name, shared_root(file), download=False)
    assert tuple(data.split_sizes.values()) == splits
    assert len(data) == sum(splits)
    assert torch.bincount(data.labels).tolist() == counts
    assert data.task == ("regression" if name == "retinamnist" else "classification")
