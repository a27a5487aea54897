"""Make the package's table of four hospitals from UCI's Heart Disease data.

Run: python -m experiments.natural_sites.heart_disease UCI_FOLDER heart_disease.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

#: Name of each hospital, by the file of UCI.
HOSPITALS = {
    "processed.cleveland.data": "cleveland",
    "processed.hungarian.data": "hungarian",
    "processed.switzerland.data": "switzerland",
    "processed.va.data": "long beach va",
}

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal"),
    "num",
)

#: Measurements of a living patient: UCI's files have 0 where they are missing.
POSITIVE = ("trestbps", "chol")


def heart_disease(folder: Path) -> pd.DataFrame:
    """Return one row per patient, with the columns `site` and `disease`."""
    frames = []
    for name, hospital in HOSPITALS.items():
        frame = pd.read_csv(folder / name, names=list(COLUMNS), na_values="?")
        frame.insert(0, "site", hospital)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    for name in POSITIVE:
        table[name] = table[name].where(table[name] > 0)
    whole = [name for name in COLUMNS if name not in ("oldpeak", "num")]
    table[whole] = table[whole].astype("Int64")
    table["disease"] = table.pop("num").gt(0).map({False: "no", True: "yes"})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Folder with UCI's processed.*.data.")
    parser.add_argument("output", type=Path, help="CSV file to write.")
    arguments = parser.parse_args(argv)
    heart_disease(arguments.folder).to_csv(arguments.output, index=False)


if __name__ == "__main__":
    main()
