"""Compare FedAvg in fedekd with a bare loop and with other libraries.

Run as `make bench-peers`. All of them train PrivateCNN in float32 with SGD on one core, from the same initial weights
on the same images, two epochs of batches of 64 per round. Where a client has one batch, the order of its images does
not matter, and the global models must be equal. Each contender runs in a separate process, one after the other, in
turns. The time of a round is measured after the first one. fedekd also evaluates each client's test split; the others
do not. Flower's simulation runs clients in one Ray actor: its CPU time and memory are those of all its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from perf.machine import machine

#: Batch size of all contenders, as in `workload`, which imports torch.
BATCH = 64

ROOT = Path(__file__).resolve().parents[2]

#: By name: module in this package, its options, and the library that it needs.
CONTENDERS = {
    "bare loop": ("bare_loop", (), None),
    "fedekd": ("fedekd_run", (), None),
    "fedekd, every round saved": ("fedekd_run", ("--every_round",), None),
    "fluke": ("fluke_run", (), "fluke"),
    "pfl-research": ("pfl_run", (), "pfl"),
    "Flower's simulation": ("flower_run", (), "flwr"),
}

#: Clients, training images of each, and their height and width.
SETTINGS = ((20, 9, 8), (20, 60, 8), (6, 704, 28))


#: Largest relative difference of the norms of equal models: float32 sums in another order.
TOLERANCE = 1e-5


def measure(python: Path, module: str, options: Sequence[str], setting: Sequence[int], rounds: int) -> dict[str, float]:
    """Run a contender, and return what `Clock.report` prints.

    Raises:
        SystemExit: It failed.
    """
    command = [str(python), "-m", f"perf.peers.{module}", *map(str, setting), str(rounds), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr[-2000:]}")
    values: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return values


def has_library(python: Path, name: str) -> bool:
    """Return whether an environment has a library."""
    command = [str(python), "-c", f"import {name}"]
    return shutil.which(python) is not None and not subprocess.run(command, capture_output=True).returncode


def require_equal_models(norms: dict[str, float]) -> None:
    """Check that all contenders have trained the same global model.

    Raises:
        SystemExit: The norm of one differs from that of the bare loop.
    """
    expected = norms["bare loop"]
    for name, norm in norms.items():
        if abs(norm - expected) > TOLERANCE * expected:
            sys.exit(f"{name}: expected a global model of the norm {expected:.6f}, as of the bare loop, got {norm:.6f}")


def main() -> None:
    """Measure all contenders, and print a table."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=4, help="rounds per run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs per contender (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=0, help="number of clients in all settings")
    options = parser.parse_args()
    for name, least in (("rounds", 2), ("repetitions", 1), ("clients", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    print(f"# make bench-peers\n\n{machine()}\n")
    contenders = {}
    for name, row in CONTENDERS.items():
        if row[2] is None or has_library(options.peers, row[2]):
            contenders[name] = row
        else:
            print(f"{name}: left out, {options.peers} has no module {row[2]}\n")
    heads = ["clients", "images each", "contender", "CPU ms per visit (lowest, highest)", "/ bare loop"]
    heads += ["wall ms per visit", "CPU s up to the end of round 1", "peak MiB"]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for clients, images, size in SETTINGS:
        setting = (options.clients or clients, images, size)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(options.repetitions):
            for name, (module, arguments, library) in contenders.items():
                python = options.peers if library else Path(sys.executable)
                runs[name].append(measure(python, module, arguments, setting, options.rounds))
        if images <= BATCH:
            require_equal_models({name: rows[0]["norm"] for name, rows in runs.items()})
        bare = median(row["cpu"] for row in runs["bare loop"])
        for name, rows in runs.items():
            cpu, wall = ([1e3 * row[kind] / setting[0] for row in rows] for kind in ("cpu", "wall"))
            cells = [
                f"{median(cpu):.1f} ({min(cpu):.1f}, {max(cpu):.1f})",
                f"{median(cpu) * setting[0] / (1e3 * bare):.2f}",
            ]
            cells += [f"{median(wall):.1f}", f"{median(row['start_up'] for row in rows):.1f}"]
            cells += [f"{median(row['peak'] for row in rows):,.0f}"]
            print(f"| {setting[0]} | {images} ({size}x{size}) | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
