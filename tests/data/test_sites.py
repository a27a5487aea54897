from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedekd.data import FederatedDataModule
from fedekd.data.sites import find_sites
from fedekd.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with the sites `b` (30 samples), `a c` (20) and a file that is no site."""
    rng = np.random.default_rng(0)
    for name, size in (("b", 30), ("a c", 20)):
        images = rng.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=np.arange(size) % 3)
    (tmp_path / "classes.txt").write_text("x")
    return tmp_path


def test_sites_of_folder_are_clients_in_order_of_names(folder: Path) -> None:
    data = FederatedDataModule(sites=str(folder))
    assert [splits.name for splits in data.clients] == ["a c", "b"]
    assert [len(splits) for splits in data.clients] == [20, 30]
    assert data.num_clients == 2
    with np.load(folder / "b.npz") as file:
        first = int(data.clients[1].train[0])
        assert np.array_equal(data.samples.inputs[first, 0], file["train_images"][first - 20])


def test_sites_of_mapping_keep_its_order_and_names(folder: Path) -> None:
    paths = {"Zürich (1)": str(folder / "b.npz"), "Ann Arbor": str(folder / "a c.npz")}
    data = FederatedDataModule(sites=paths)
    assert [(splits.name, len(splits)) for splits in data.clients] == [("Zürich (1)", 30), ("Ann Arbor", 20)]


def test_splits_of_a_site_do_not_depend_on_samples_of_others(folder: Path) -> None:
    alone = FederatedDataModule(sites={"a c": str(folder / "a c.npz")})
    both = FederatedDataModule(sites=str(folder))
    assert both.clients[0].digest(both.samples) == alone.clients[0].digest(alone.samples)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 0.5}, "data.alpha: expected no value with data.sites"),
        ({"num_clients": 2}, "data.num_clients: expected no value with data.sites"),
        ({"partition": "iid"}, "data.partition: expected no value with data.sites"),
        ({"min_samples": 5}, "data.min_samples: expected no value with data.sites"),
        ({"site_column": "x"}, "data.site_column: expected null with data.sites"),
        ({"dataset": "digits"}, "data.dataset: expected a data set or data.sites, got 'digits' and data.sites"),
        ({"client": 2}, r"data.client: expected 0..1 \(2 sites\), got 2"),
    ],
)
def test_sites_with_other_options_raise(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        FederatedDataModule(sites=str(folder), **options).setup()


def test_neither_dataset_nor_sites_raises() -> None:
    with pytest.raises(UserError, match=r"data.dataset: expected a data set or data.sites, got neither"):
        FederatedDataModule().setup()


@pytest.mark.parametrize("name", ["", " a", "a/b", "a\nb", "..", "-x", "a" * 61, 3, None])
def test_find_sites_invalid_name_raises(name: Any) -> None:
    with pytest.raises(UserError, match=r"data.sites: expected a name of at most 60 letters"):
        find_sites({name: "x.npz"})


def test_find_sites_names_that_differ_in_case_only_raise() -> None:
    with pytest.raises(UserError, match=r"expected different names, got 'Basel' and 'basel'"):
        find_sites({"Basel": "x.npz", "basel": "y.npz"})


def test_find_sites_folder_without_sites_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file or subfolder per site in a known format, got none"):
        find_sites(str(tmp_path))
    with pytest.raises(UserError, match=r"expected a folder with a file or subfolder per site, got '.*absent'"):
        find_sites(str(tmp_path / "absent"))


def test_find_sites_subfolder_without_readable_content_raises(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "Bern").mkdir()
    with pytest.raises(UserError, match=r"data.sites: expected .* in each subfolder, got none in 'Bern'"):
        find_sites(str(folder))
    (folder / "Bern" / "scan.svg").write_text("<svg/>")
    (folder / "Uri").mkdir()
    with pytest.raises(UserError, match=r"got none in 'Bern' and 'Uri'|got none in 'Bern', 'Uri'"):
        find_sites(str(folder))


def test_files_of_a_folder_of_sites_that_are_no_sites_are_reported(folder: Path) -> None:
    (folder / "Uri.png").write_bytes(b"PK")
    (folder / ".hidden").write_text("x")
    [line] = [line for line in FederatedDataModule(sites=str(folder)).warnings() if "no sites" in line]
    assert line == "data.sites: 2 files have no known format and are no sites: 'Uri.png', 'classes.txt'"


def test_damaged_file_of_a_site_is_named(folder: Path) -> None:
    (folder / "b.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"^data.sites: site 'b': '.*b.npz' cannot be read"):
        FederatedDataModule(sites=str(folder)).setup()


def test_site_with_one_sample_raises(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", train_images=np.arange(64, dtype=np.uint8).reshape(1, 8, 8), train_labels=[0])
    np.savez(
        tmp_path / "a.npz",
        train_images=np.arange(640, dtype=np.int64).reshape(10, 8, 8).astype(np.uint8),
        train_labels=np.arange(10) % 2,
    )
    with pytest.raises(
        UserError, match=r"^data.sites: site 'b': expected at least 2 samples, to train and test, got 1"
    ):
        FederatedDataModule(sites=str(tmp_path)).setup()
