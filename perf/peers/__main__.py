"""Compare FedAvg in fedekd with a bare loop, fluke and pfl-research.

Run as `make bench-peers`. All of them train PrivateCNN in float32 with SGD on one core, two epochs of batches of 64 per
round. Each runs in a process of its own, one after the other, in turns. The time of a round is measured after the first
one. fedekd also evaluates each client's test split, and saves checkpoints; the others do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from perf.machine import machine

ROOT = Path(__file__).resolve().parents[2]

#: By name: module in this package, and whether it needs the environment of the peers.
CONTENDERS = {
    "bare loop": ("bare_loop", False),
    "fedekd": ("fedekd_run", False),
    "fluke": ("fluke_run", True),
    "pfl-research": ("pfl_run", True),
}

#: Clients, training images of each, and their height and width.
SETTINGS = ((20, 9, 8), (20, 60, 8), (6, 704, 28))


def measure(python: Path, module: str, setting: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Run a contender, and return the seconds of a round, `wall` and `cpu`.

    Raises:
        SystemExit: It failed.
    """
    command = [str(python), "-m", f"perf.peers.{module}", *map(str, setting), str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}: exit code {found.returncode}\n{found.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Measure all contenders, and print a table."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=4, help="rounds per run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs per contender (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=0, help="number of clients in all settings")
    options = parser.parse_args()
    imports = [str(options.peers), "-c", "import fluke, pfl"]
    needs_peers = any(is_peer for _, is_peer in CONTENDERS.values())
    if needs_peers and (not shutil.which(options.peers) or subprocess.run(imports, capture_output=True).returncode):
        sys.exit(
            f"--peers: expected a Python with fluke and pfl, got '{options.peers}'. make bench-peers installs them"
        )
    print(f"# make bench-peers\n\n{machine()}\n")
    print(
        "| clients | images each | contender | CPU ms per visit (lowest, highest) | / bare loop | wall ms per visit |"
    )
    print("| --- " * 6 + "|")
    for clients, images, size in SETTINGS:
        setting = (options.clients or clients, images, size)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(options.repetitions):
            for name, (module, is_peer) in CONTENDERS.items():
                python = options.peers if is_peer else Path(sys.executable)
                seconds[name].append(measure(python, module, setting, options.rounds))
        bare = median(row["cpu"] for row in seconds["bare loop"])
        for name, rows in seconds.items():
            cpu, wall = ([1e3 * row[kind] / setting[0] for row in rows] for kind in ("cpu", "wall"))
            spread = f"{median(cpu):.1f} ({min(cpu):.1f}, {max(cpu):.1f})"
            ratio = median(cpu) * setting[0] / (1e3 * bare)
            row = [setting[0], f"{images} ({size}x{size})", name, spread, f"{ratio:.2f}", f"{median(wall):.1f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
