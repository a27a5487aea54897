"""The embedded table of four hospitals."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedekd.cli import main
from fedekd.data import FederatedDataModule, load_samples


def test_heart_disease_has_four_hospitals_and_two_classes() -> None:
    data = FederatedDataModule("heart_disease", site_column="site")
    sizes = {splits.name: len(splits) for splits in data.clients}
    assert sizes == {"cleveland": 303, "hungarian": 294, "long beach va": 200, "switzerland": 123}
    assert data.samples.class_names == ("no", "yes")
    assert data.class_counts().tolist() == [[164, 139], [188, 106], [51, 149], [8, 115]]
    assert data.samples.input_shape == (25,)


def test_heart_disease_without_sites_has_no_feature_of_the_hospital() -> None:
    names = [column.name for column in load_samples("heart_disease").columns]
    assert len(names) == 13
    assert "site" not in names


def test_heart_disease_configuration_shows_hospitals_and_repeats_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "heart_disease.yaml", "--logger=null", "--rounds=1", "--trainer.loop=lean"]
    for run in ("a", "b"):
        assert main([*command, f"--output={run}", f"--baseline_dir={run}/local"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("cleveland", "hungarian", "long beach va", "switzerland"))
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()
