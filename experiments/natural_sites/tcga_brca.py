"""Make one table of FLamby's Fed-TCGA-BRCA with the region of each patient.

Run: python -m experiments.natural_sites.tcga_brca FLAMBY_FOLDER tcga_brca.csv

The region follows from the code of the tissue source site in the patient's barcode (`TCGA-CODE-...`), and the event
`E` (death) is the class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

#: Region of eight patients of other countries, whom FLamby leaves out.
LEFT_OUT = "Other"


def tcga_brca(folder: Path) -> pd.DataFrame:
    """Return one row per patient, with the columns `region` and `event`."""
    table = pd.read_csv(folder / "brca.csv")
    centers = pd.read_csv(folder / "centers.csv", keep_default_na=False)
    region_of = dict(zip(centers["TSS Code"], centers["Region"], strict=True))
    regions = table["pid"].str.split("-").str[1].map(region_of)
    if missing := table["pid"][regions.isna()].tolist():
        raise SystemExit(f"centers.csv: expected the site of every patient, got none for {missing[0]}")
    table.insert(0, "region", regions)
    table["event"] = table.pop("E").map({0: "no", 1: "yes"})
    # The time until the event is no feature.
    return table[regions != LEFT_OUT].drop(columns=["pid", "T"])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Folder with FLamby's brca.csv and centers.csv.")
    parser.add_argument("output", type=Path, help="CSV file to write.")
    arguments = parser.parse_args(argv)
    tcga_brca(arguments.folder).to_csv(arguments.output, index=False)


if __name__ == "__main__":
    main()
