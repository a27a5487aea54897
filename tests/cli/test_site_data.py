"""`fit` on sites, groups and given splits: what is refused, and what a user is warned of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedekd.cli import main

from .conftest import OPTIONS

CLASSES = ["well", "sick", "un|known <b>"]

SITE_OPTIONS = [option for option in OPTIONS if not option.startswith(("--data.num_clients", "--data.alpha"))]

ErrorLine = Callable[[], str]


MLPS = ["--client.private_model=fedekd.models.MLP", "--client.proxy_model=fedekd.models.MLP"]

SPLITS = np.repeat(["train", "val", "test"], [40, 8, 12])


def fit(*options: str) -> int:
    return main(["fit", *SITE_OPTIONS, "--rounds=1", "--baseline_dir=local", "--output=run", "--quiet", *options])


def write(path: str, size: int = 60, classes: int = 3, **arrays: Any) -> None:
    """Write one site: images (.npz), or a table (.csv) with other columns, as `site` and `group`."""
    rng = np.random.default_rng(size)
    labels = np.arange(size) % classes
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    if path.endswith(".csv"):
        values = {"age": rng.normal(labels), "dose": rng.normal(size=size)}
        pd.DataFrame({**values, "label": np.asarray(CLASSES)[labels], **arrays}).to_csv(path, index=False)
    else:
        images = (rng.integers(0, 80, (size, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
        np.savez(path, train_images=images, train_labels=labels)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.npz": 40, "b.npz": 1}, "data.sites: site 'b': expected at least 2 samples"),
        ({"a.npz": 40, "A.npz": 40}, "data.sites: expected different names, got 'A' and 'a'"),
        ({"a.npz": 40, "_b.npz": 40}, "data.sites: expected a name of at most 60 letters"),
        ({}, "data.sites: expected a file or subfolder per site"),
        ({"a.npz": 40, "b.npz": 0}, "site 'b'"),
    ],
)
def test_fit_sites_unusable_prints_one_line_error(
    files: dict[str, int], words: str, workdir: Path, error_line: ErrorLine
) -> None:
    Path("sites").mkdir()
    for name, size in files.items():
        write(f"sites/{name}", size)
    assert fit("--data.sites=sites") == 2
    assert words in error_line()
    assert not Path("run").exists()


def test_fit_site_name_with_slash_prints_one_line_error(workdir: Path, error_line: ErrorLine) -> None:
    write("a.npz")
    Path("sites.yaml").write_text("data:\n  sites:\n    north/1: a.npz\n    south: a.npz\n")
    assert fit("--config=sites.yaml") == 2
    assert "data.sites: expected a name of at most 60 letters" in error_line()


def test_fit_sites_warn_of_missing_classes_and_few_test_samples(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("sites/large.csv", 60)
    write("sites/small.csv", 20, classes=2)
    assert fit("--data.sites=sites", *MLPS) == 0
    text = capsys.readouterr().err
    assert text.count("1 of 2 sites lack classes that others have: 'small' (un|known <b>)") == 1
    assert text.count("fewer than 10 test samples, so that scores are imprecise: 'small' (4)") == 1


def test_fit_site_column_makes_named_clients(workdir: Path) -> None:
    write("all.csv", 60, site=np.repeat(["south", "north"], 30))
    assert fit("--data.dataset=all.csv", "--data.site_column=site", *MLPS) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert [row["name"] for row in summary["clients"]] == ["north", "south"]
    assert "alpha" not in summary
    assert main(["test", "run"]) == 0


def test_fit_groups_stay_in_one_split_and_given_splits_are_kept(workdir: Path) -> None:
    write("sites/a.csv", 60, group=np.arange(60) // 4, split=SPLITS)
    write("sites/b.csv", 60, group=np.arange(60) // 4, split=SPLITS)
    assert fit("--data.sites=sites", "--data.group_column=group", "--data.splits=given", *MLPS) == 0
    rows = json.loads(Path("run/summary.json").read_text())["clients"]
    assert [(row["train"], row["test"]) for row in rows] == [(40, 12), (40, 12)]


def test_fit_group_in_two_given_splits_prints_its_name_and_site(workdir: Path, error_line: ErrorLine) -> None:
    group = np.asarray([f"patient {index // 4}" for index in range(60)])
    group[40:44] = "patient 7"
    write("sites/a.csv", 60, group=np.arange(60), split=SPLITS)
    write("sites/b.csv", 60, group=group, split=SPLITS)
    assert fit("--data.sites=sites", "--data.group_column=group", "--data.splits=given", *MLPS) == 2
    assert "data.splits: site 'b': expected each group in one split, got 1 groups in two, such as 'patient 7'" in (
        error_line()
    )


def test_fit_near_copies_name_sites_and_advise_groups(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (12, 8, 8), np.uint8), 10, axis=0)
    Path("sites").mkdir()
    np.savez("sites/a.npz", train_images=images, train_labels=np.repeat(np.arange(12), 10) % 3)
    write("sites/b.npz", 60)
    assert fit("--data.sites=sites") == 0
    text = capsys.readouterr().err
    assert "near-copies of training images of the same client (sites 'a')" in text
    assert text.count("by --data.group_column") == 1
