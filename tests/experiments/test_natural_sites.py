"""Tables of natural sites, made from the files of their authors."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.natural_sites import heart_disease, tcga_brca
from fedekd.data.sources import SOURCES

SHARED = Path(__file__).resolve().parents[3] / "shared/datasets/sites"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data sets")
def test_heart_disease_is_the_file_of_the_package(tmp_path: Path) -> None:
    heart_disease.main([str(SHARED / "heart"), str(tmp_path / "table.csv")])
    assert (tmp_path / "table.csv").read_bytes() == Path(str(SOURCES["heart_disease"].load)).read_bytes()


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data sets")
def test_tcga_brca_has_the_six_regions_of_flamby(tmp_path: Path) -> None:
    tcga_brca.main([str(SHARED / "tcga_brca"), str(tmp_path / "table.csv")])
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["region"].value_counts().to_dict() == {
        **{"Northeast": 311, "West": 206, "South": 196, "Midwest": 162, "Europe": 162, "Canada": 51},
    }
    assert len(table.columns) == 41
    assert set(table["event"]) == {"no", "yes"}


def test_tcga_brca_maps_the_site_in_the_barcode_to_its_region(tmp_path: Path) -> None:
    (tmp_path / "brca.csv").write_text("pid,age,E,T\nTCGA-BH-1,50,1.0,2\nTCGA-NA-2,40,0.0,3\nTCGA-QQ-3,40,0.0,3\n")
    (tmp_path / "centers.csv").write_text("TSS Code,Region\nBH,Northeast\nNA,Europe\nQQ,Other\n")
    table = tcga_brca.tcga_brca(tmp_path)
    assert table.to_dict("list") == {"region": ["Northeast", "Europe"], "age": [50, 40], "event": ["yes", "no"]}
