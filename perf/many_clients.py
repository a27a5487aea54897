"""Time, memory and disk of fedekd in one process with many clients of few images.

Run as `python -m perf.many_clients`. Each client has 9 digits for training: digits are repeated where there are not
enough. FedeKD with its local baselines runs in a separate program per number of clients, one after the other on one
core. `--against CHECKOUT` measures another version in the same way, in turn with this one, and compares metrics.csv and
the digests of the final states.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

#: Samples per client, of which 60% are for training.
SAMPLES = 15

ROOT = Path(__file__).resolve().parents[1]


def write_digits(path: Path, clients: int) -> None:
    """Write a data set of digits for some clients, repeated where they are too few."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.arange(clients * SAMPLES) % len(digits.target)
    images = (digits.images[rows] * 255 / 16).astype(np.uint8)
    none = {"val_images": images[:0], "val_labels": digits.target[:0, None], "test_images": images[:0]}
    arrays = {"train_images": images, "train_labels": digits.target[rows, None], "test_labels": none["val_labels"]}
    np.savez(path, **arrays, **none)


def train(folder: Path, clients: int, rounds: int, engine: str) -> dict[str, Any]:
    """Run a federation, and return its times in seconds and its memory in MiB.

    A round is timed from the end of the first one to the end of the last but one, with its checkpoints.
    """
    from fedekd.data import FederatedDataModule
    from fedekd.federation import MultiProcess, Orchestrator, RoundOptions, Sequential, SilentObserver
    from fedekd.federation.engines.performance import gc_frozen
    from fedekd.methods import ClientOptions, FedeKD
    from fedekd.modules import TrainerFactory

    class Clock(SilentObserver):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []
            self.start_up = memory()

        def warn(self, text: str) -> None:
            """Print nothing."""

        def round_started(self, round_idx: int) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

    write_digits(folder / "digits.npz", clients)
    name, _, value = engine.partition("=")
    chosen = {"Sequential": Sequential, "MultiProcess": MultiProcess}[name]
    began, clock = time.perf_counter(), Clock()
    federation = Orchestrator(
        FedeKD(),
        FederatedDataModule(str(folder / "digits.npz"), num_clients=clients, partition="iid", min_samples=2),
        ClientOptions(),
        TrainerFactory(accelerator="cpu", threads=1),
        RoundOptions(rounds=rounds),
        output=folder / "run",
        baseline_dir=folder / "local",
        engine=chosen(float(value)) if value else chosen(),
        observer=clock,
    )
    with gc_frozen():
        federation.run()
    # The first round has no training of private models, the last no update.
    wall, cpu = ((last - first) / (rounds - 1) for first, last in zip(clock.ends[1], clock.ends[-1], strict=True))
    states = [entry["sha256"] for entry in newest_manifest(folder / "run")["files"].values()]
    content = (folder / "run/metrics.csv").read_bytes() + json.dumps(sorted(states)).encode()
    return {
        "clients": clients,
        "s a round": round(wall, 3),
        "CPU s a round": round(cpu, 3),
        "ms a visit": round(1000 * cpu / clients, 1),
        "MiB above start-up": round(peak_memory() - clock.start_up),
        "checkpoints, MB": round(sum(path.stat().st_size for path in (folder / "run/checkpoints").iterdir()) / 1e6),
        "whole, s": round(time.perf_counter() - began, 1),
        "results": hashlib.sha256(content).hexdigest()[:12],
    }


def newest_manifest(run: Path) -> dict[str, Any]:
    """Return the newest manifest of a run of any version."""
    manifest: dict[str, Any] = json.loads(max((run / "checkpoints").glob("manifest-*.json")).read_text())
    return manifest


def memory() -> float:
    """Return the resident memory of this process in MiB (Linux only)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_memory() -> float:
    """Return the largest resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(source: Path, clients: int, rounds: int, engine: str) -> dict[str, Any]:
    """Run `train` with the package of a checkout in a separate program.

    Raises:
        RuntimeError: If it fails, with the end of its output.
    """
    with TemporaryDirectory(prefix="fedekd-many-") as folder:
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, f"--folder={folder}", f"--clients={clients}", f"--rounds={rounds}"]
        done = subprocess.run([*command, f"--engine={engine}"], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError("\n".join(done.stderr.splitlines()[-10:]))
        values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return values


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a Markdown table.

    Returns:
        Exit code: 1 if two versions have other results.
    """
    parser = argparse.ArgumentParser(prog="python -m perf.many_clients", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 200], help="numbers of clients")
    parser.add_argument("--rounds", type=int, default=4, help="at least 2 (default: 4)")
    parser.add_argument("--engine", default="Sequential", help="Sequential=CACHE or MultiProcess=PROCESSES")
    parser.add_argument("--against", type=Path, default=None, help="another checkout of fedekd")
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {chosen.rounds}")
    if chosen.folder is not None:
        print(json.dumps(train(chosen.folder, chosen.clients[0], chosen.rounds, chosen.engine)))
        return 0
    sources = {} if chosen.against is None else {"before": chosen.against.resolve()}
    same, header = True, False
    for clients in chosen.clients:
        results = set()
        for version, source in {**sources, "this": ROOT}.items():
            values = {"version": version, **measure(source, clients, chosen.rounds, chosen.engine)}
            results.add(values["results"])
            if not header:
                print("| " + " | ".join(values) + " |\n" + "| --- " * len(values) + "|")
                header = True
            print("| " + " | ".join(map(str, values.values())) + " |", flush=True)
        same = same and len(results) == 1
    if sources:
        print("\nThe results are equal, byte for byte." if same else "\nThe results differ.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
