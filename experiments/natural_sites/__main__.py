"""Run methods on natural sites and store the scores of each site.

Run `python -m experiments.natural_sites heart_disease --seeds 20`. The other federations read files that are not
included; `--root` names their folder. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from experiments.hospital_runs import Row, fit, store

RESULTS = Path(__file__).resolve().parents[2] / "results" / "natural_sites" / "sites.csv"

METRICS = ("accuracy", "balanced_accuracy", "auroc")
METHODS = {"FedAvg": ["--method=FedAvg"], "FedeKD": ["--method=FedeKD"]}

_IMAGES = ["--client.local_epochs=1", "--client.optimizer.lr=1e-3", "--trainer.threads=1"]
_TABLE = ["--config=heart_disease.yaml", "--data.dataset={root}/tcga_brca.csv", "--data.site_column=region"]

#: Options of each federation; `{root}` is replaced by the folder of its files.
FEDERATIONS = {
    "heart_disease": ["--config=heart_disease.yaml"],
    "digits3": ["--data.dataset={root}/digits3/digits3_16.npz", "--data.site_column=split", "--rounds=3", *_IMAGES],
    "pacs": ["--data.sites={root}/pacs_32", "--rounds=5", *_IMAGES],
    "tcga_brca": [*_TABLE, "--data.target_column=event", "--data.categorical_columns=null"],
}


def run(name: str, method: str, seed: int, root: str, output: Path) -> Path:
    """Run one method on one federation unless it is finished; return its folder."""
    folder = output / f"{name}-{method.lower()}-{seed:02d}"
    options = [option.format(root=root) for option in FEDERATIONS[name]]
    fixed = [f"--seed={seed}", f"--baseline_dir={output / 'local'}", "--logger=null"]
    fit(folder, [*options, *METHODS[method], f"--metrics=[{','.join(METRICS)}]", *fixed])
    return folder


def rows_of(folder: Path) -> list[Row]:
    """Return one row per site and metric of a finished run, after the last round."""
    last = pd.read_csv(folder / "metrics.csv").iloc[-1]
    sites = [column.split("/")[0] for column in last.index if column.endswith(f"/{METRICS[0]}") and "client_" in column]
    rows = []
    for site in sites:
        for metric in METRICS:
            is_primary = metric == METRICS[0]
            local, delta = ("local", "delta") if is_primary else (f"local/{metric}", f"delta/{metric}")
            rows.append(
                {
                    "site": site.removeprefix("client_"),
                    "metric": metric,
                    "score": last[f"{site}/{metric}"],
                    "local": last[f"{site}/{local}"],
                    "delta": last[f"{site}/{delta}"],
                }
            )
    return rows


def main() -> None:
    """Run the federations of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.natural_sites", description=__doc__)
    parser.add_argument("federations", nargs="+", choices=FEDERATIONS)
    parser.add_argument("--seeds", type=int, default=4, help="Number of seeds, from 0 (default 4).")
    parser.add_argument("--root", default="data/sites", help="Folder of the files (default data/sites).")
    parser.add_argument("--output", type=Path, default=Path("runs/natural_sites"), help="Folder of the runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which the scores are written.")
    arguments = parser.parse_args()
    for name in arguments.federations:
        for seed in range(arguments.seeds):
            for method in METHODS:
                folder = run(name, method, seed, arguments.root, arguments.output)
                store({"federation": name, "method": method, "seed": seed}, rows_of(folder), arguments.results)
                print(f"{name}, seed {seed}, {method}: {folder}")


if __name__ == "__main__":
    main()
