"""Attack the networks that methods send by membership inference.

Run `python -m experiments.privacy --methods FedeKD ProxyEnsemble`. Finished cells with the same options are not
repeated, and the shadow federations of an unfinished one are kept. Rows with `client` -1 pool the samples of all
clients.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.hospital_runs import SETTING, add_seeds, commit, is_stored, seeds, store
from experiments.privacy.federations import ADJUSTMENTS, TARGETS, Confidences, Federation
from experiments.privacy.membership import evaluate_attack, lira_scores
from fedekd.atomic import atomic_file

RESULTS = Path(__file__).resolve().parents[2] / "results" / "privacy" / "membership.csv"

#: Hospital scale, on the CPU.
OPTIONS = (*SETTING, "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--metrics=[accuracy]")

#: False positive rates of the reported true positive rates, with their columns.
LIMITS = {"tpr_at_fpr_0.01": 0.01, "tpr_at_fpr_0.001": 0.001}


@dataclass(frozen=True)
class Cell:
    """One federation: data, method and noise. Its fields are the key of its rows.

    Attributes:
        dataset: Name of the data set, of which there is a configuration.
        alpha: Concentration of the partition.
        seed: Seed.
        method: Name of the method.
        noise_multiplier: Noise per clipping norm; NaN without clipping and noise.
        clipping_norm: Clipping norm; NaN without.
        shadows: Number of shadow federations; 0 for the loss-threshold attack on a federation of all samples.
        options: Further options of `fit`, separated by spaces; `default` without.
    """

    dataset: str
    alpha: float
    seed: int
    method: str
    noise_multiplier: float
    clipping_norm: float
    shadows: int
    options: str

    def arguments(self, extra: list[str]) -> list[str]:
        """Return the options of `fit`."""
        noise = (
            []
            if np.isnan(self.noise_multiplier)
            else [
                f"--privacy.noise_multiplier={self.noise_multiplier}",
                f"--privacy.clipping_norm={self.clipping_norm}",
            ]
        )
        data = [f"--config={self.dataset}.yaml", f"--data.alpha={self.alpha}", f"--seed={self.seed}"]
        # A configuration has arguments of its method: name the class first.
        return [*data, *OPTIONS, f"--method={self.method}", *noise, *extra]

    @property
    def name(self) -> str:
        """Name of the folder of its shadow federations, which are those of one commit."""
        parts = (self.dataset, self.alpha, self.seed, self.method, self.noise_multiplier, self.clipping_norm)
        code = hashlib.sha256(f"{self.options} {commit()}".encode()).hexdigest()[:8]
        return "-".join([*(str(part).lower() for part in parts), code])


def figures(scores: npt.ArrayLike, is_member: npt.ArrayLike, threshold: float) -> dict[str, Any]:
    """Return the columns of one attack."""
    result = evaluate_attack(scores, is_member, threshold, limits=tuple(LIMITS.values()))
    row: dict[str, Any] = {"members": result.members, "others": result.others}
    for name, value, interval in (
        ("auc", result.auc, result.auc_interval),
        ("advantage", result.advantage, result.advantage_interval),
        *((column, result.tpr[limit], result.tpr_interval[limit]) for column, limit in LIMITS.items()),
    ):
        row |= {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return row


def networks() -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield the indices and the names of each attacked output."""
    for first, target in enumerate(TARGETS):
        for second, adjustment in enumerate(ADJUSTMENTS):
            yield first, second, {"target": target, "adjustment": adjustment}


def loss_threshold_rows(confidences: Confidences) -> Iterator[dict[str, Any]]:
    """Yield the rows of the loss-threshold attack on train and test samples."""
    for first, second, names in networks():
        # -log p = log(1 + exp(-phi)); the threshold is the mean training loss (Yeom et al., Adversary 1).
        losses = {
            number: tuple(np.logaddexp(0.0, -split[number][first, second]) for split in vars(confidences).values())
            for number in confidences.train
        }
        pooled = tuple(np.concatenate(parts) for parts in zip(*losses.values(), strict=True))
        for number, (train, test) in {-1: pooled, **losses}.items():
            row = {"attack": "loss_threshold", **names, "client": number}
            is_member = np.arange(len(train) + len(test)) < len(train)
            yield row | figures(-np.concatenate([train, test]), is_member, -float(train.mean()))


def lira_rows(used: list[list[npt.NDArray[np.bool_]]], shadows: list[Confidences]) -> Iterator[dict[str, Any]]:
    """Yield the rows of LiRA on each shadow federation, by the others."""
    count, clients = len(shadows), list(shadows[0].train)
    inside = {client: np.stack([halves[client] for halves in used]) for client in clients}
    for (first, second, names), online in ((network, online) for network in networks() for online in (True, False)):
        scores = {client: np.empty(inside[client].shape) for client in clients}
        for client in clients:
            phi = np.stack([shadow.train[client][first, second] for shadow in shadows])
            for attacked in range(count):
                # The complement of the attacked half shows its membership by the balance of the others.
                rest = [index for index in range(count) if index // 2 != attacked // 2]
                scores[client][attacked] = lira_scores(
                    phi[attacked], phi[rest], inside[client][rest], online=online, variance="global"
                )
        pooled = np.concatenate(list(scores.values()), axis=1), np.concatenate(list(inside.values()), axis=1)
        for client, sides in {-1: pooled, **{client: (scores[client], inside[client]) for client in clients}}.items():
            row = {"attack": "lira_online" if online else "lira_offline", **names, "client": client}
            yield row | figures(*sides, 0.0)


def run_shadow(federation: Federation, number: int, folder: Path) -> tuple[list[npt.NDArray[np.bool_]], Confidences]:
    """Return a shadow federation, trained unless its file exists."""
    path = folder / f"shadow-{number:03d}.npz"
    clients = range(len(federation.data.clients))
    if not path.is_file():
        used, confidences = federation.run_shadow(number)
        arrays = {f"used_{client}": used[client] for client in clients}
        for split, values in vars(confidences).items():
            arrays |= {f"{split}_{client}": values[client] for client in clients}
        with atomic_file(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    with np.load(path) as stored:
        splits = ({client: stored[f"{split}_{client}"] for client in clients} for split in ("train", "test"))
        return [stored[f"used_{client}"] for client in clients], Confidences(*splits)


def run(cell: Cell, output: Path, extra: list[str]) -> list[dict[str, Any]]:
    """Run one cell and return its rows."""
    federation = Federation(cell.arguments(extra))
    if cell.shadows:
        shadows = [run_shadow(federation, number, output / cell.name) for number in range(cell.shadows)]
        rows = lira_rows([used for used, _ in shadows], [confidences for _, confidences in shadows])
        return list(rows)
    summary, confidences = federation.run(str(output / "local"))
    account = summary.get("privacy", {})
    mean = account.get("epsilon_of_mean") or [None]
    epsilon = {
        "epsilon": max(account["epsilon"], key=lambda value: np.inf if value is None else value) if account else None,
        "epsilon_of_mean": max(mean, key=lambda value: np.inf if value is None else value),
    }
    scores = {"score": summary["mean"], "local": summary["local_mean"], "delta": summary["delta"]["avg"]}
    return [row | scores | epsilon for row in loss_threshold_rows(confidences)]


def cells(arguments: argparse.Namespace, extra: list[str]) -> Iterator[Cell]:
    """Yield the cells of the command line, those without noise first."""
    options = " ".join(extra) or "default"
    for noise in arguments.noise:
        for seed in seeds(arguments):
            for dataset in arguments.datasets:
                for alpha in arguments.alphas:
                    for method in arguments.methods:
                        norm = np.nan if np.isnan(noise) else arguments.clipping_norm
                        for shadows in arguments.shadows:
                            yield Cell(dataset, alpha, seed, method, noise, norm, shadows, options)


def main() -> None:
    """Run the cells of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.privacy", description=__doc__)
    parser.add_argument("--datasets", nargs="+", default=["fashionmnist"], help="Configurations of data sets.")
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5], help="Concentrations (default 0.5).")
    add_seeds(parser)
    parser.add_argument("--methods", nargs="+", default=["FedeKD", "ProxyEnsemble"], help="Names of methods.")
    parser.add_argument(
        "--noise", nargs="+", type=float, default=[np.nan], help="Noise multipliers; nan is neither clipping nor noise."
    )
    parser.add_argument("--clipping_norm", type=float, default=1.0, help="Clipping norm with noise (default 1).")
    parser.add_argument(
        "--shadows", nargs="+", type=int, default=[0], help="Shadow federations of LiRA, even; 0: loss threshold."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/privacy"), help="Folder of shadow federations.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which rows are written.")
    arguments, extra = parser.parse_known_args()
    if any(shadows % 2 or 0 < shadows < 6 for shadows in arguments.shadows):
        parser.error("--shadows: expected 0, or an even number of at least 6: halves come in pairs")
    for cell in cells(arguments, extra):
        if is_stored(asdict(cell), arguments.results):
            continue
        start = time.monotonic()
        rows = run(cell, arguments.output, extra)
        store(asdict(cell), rows, arguments.results)
        print(f"{cell.name}, {cell.shadows} shadows: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
