"""Time and memory of fedekd's engines and Flower's simulation with many clients.

Run as `python -m perf.clients` after `make extras`. FedeKD on digits (iid partition) runs in one process, in Ray
actors, and in Flower's simulation, which uses Ray actors, too; one after the other, each as a separate program. Clients
have few images, so the overhead of the engine dominates. All runs must have equal metrics and an equal proxy, bit for
bit. 200 clients need about 8 GB in the temporary folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from perf.process_tree import Memory, peak_memory

# torch is imported only after the measurements: otherwise this process would share the pages of its libraries.

#: Options of `fit`.
OPTIONS = (
    *("--config", "digits.yaml", "--data.partition", "iid", "--data.min_samples", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.threads", "1", "--logger", "null", "--quiet", "true"),
    *("--checkpoint_every", "0"),  # rounds are timed by their checkpoints
)

#: Engines and their names in the table.
ENGINES = {
    "Sequential": "fedekd, in one process",
    "Ray": "fedekd, {} actors of Ray",
    "Flower": "Flower's simulation, {} actors of Ray",
}

#: Disables usage reports, keeps GPUs visible to actors that request none, and runs actors at normal priority (Ray's
#: default is nice 15, behind Flower's server).
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Measured:
    """Time and memory of an engine.

    Attributes:
        start_up: Seconds until the first local baseline is stored. With Flower, all sites have registered by then.
        rounds: Seconds per round, from checkpoint to checkpoint. In a counted round each client receives, is scored and
            sends an update; the first round (no receive) and the last (no update) are left out.
        whole: Seconds from start to end of the program.
        peak: Peak memory of the program and its descendants.
    """

    start_up: float
    rounds: list[float]
    whole: float
    peak: Memory


class Clock:
    """Times of a run's progress, from the files that it writes.

    Args:
        folder: Folder of all files of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.time()
        self.checkpoints: dict[int, float] = {}  # by the number of the next round
        self.first_trained = 0.0

    def look(self) -> None:
        """Record new files; call often, because old manifests are removed."""
        for manifest in self.folder.glob("run/checkpoints/manifest-*.json"):
            with suppress(FileNotFoundError):
                self.checkpoints[int(manifest.stem.removeprefix("manifest-"))] = manifest.stat().st_mtime
        if not self.first_trained:
            trained = [path.stat().st_mtime for path in self._baselines()]
            self.first_trained = min(trained, default=0.0)

    def _baselines(self) -> Iterator[Path]:
        for pattern in ("local/*.pt", "sites/*/local/*.pt"):
            yield from self.folder.glob(pattern)

    def rounds(self, rounds: int) -> list[float]:
        """Return the seconds of each recorded round but the first and the last."""
        seen = self.checkpoints
        return [
            seen[round_idx + 1] - seen[round_idx]
            for round_idx in range(1, rounds)
            if {round_idx, round_idx + 1} <= seen.keys()
        ]


def measure(engine: str, chosen: argparse.Namespace, folder: Path) -> Measured:
    """Run the federation with an engine in a separate program.

    Raises:
        RuntimeError: If it fails (with the end of its output), or is too fast to record its rounds.
    """
    folder.mkdir()
    options = federation(chosen)
    if engine == "Flower":
        own = [f"--{name}={value}" for name, value in vars(chosen).items() if name != "simulate"]
        command = ["-m", "perf.clients", *own, f"--simulate={folder}"]
    else:
        own = ["--engine", engine, *([] if engine == "Sequential" else [f"--engine.actors={chosen.processes}"])]
        command = ["orchestrator.py", "fit", *options, *own]
        command += ["--output", str(folder / "run"), "--baseline_dir", str(folder / "local")]
    environment = {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(folder / "flower")}
    log, clock = folder / "log", Clock(folder)
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)
        try:
            peak = peak_memory(process, clock.look)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{engine} failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    whole, rounds = time.time() - clock.start, clock.rounds(chosen.rounds)
    if not rounds:
        raise RuntimeError(f"{engine} was too fast to record its rounds. Raise --clients.")
    return Measured(clock.first_trained - clock.start, rounds, whole, peak)


def federation(chosen: argparse.Namespace) -> list[str]:
    """Return the options of `fit`."""
    return [*OPTIONS, f"--data.num_clients={chosen.clients}", f"--rounds={chosen.rounds}", *shlex.split(chosen.options)]


def simulate(chosen: argparse.Namespace, folder: Path) -> None:
    """Run the federation with Flower's simulation."""
    from flwr.simulation import run_simulation

    from fedekd.flower.apps import Settings, make_client_app, make_server_app

    settings = Settings(tuple(federation(chosen)), chosen.clients, str(folder / "sites"), str(folder / "run"))
    resources = {
        "init_args": {"num_cpus": chosen.processes, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(make_server_app(settings), make_client_app(settings), chosen.clients, backend_config=resources)


def print_table(found: dict[str, Measured], processes: int) -> None:
    """Print one line per engine; ratios are to the last one."""
    last = list(found.values())[-1]
    print(
        "| engine | s per round | ratio | peak memory, MiB | ratio | files, MiB | processes | start-up, s | whole, s |"
    )
    print("| --- " * 9 + "|")
    for engine, one in found.items():
        round_idx, peak = median(one.rounds), one.peak
        print(
            f"| {ENGINES[engine].format(processes)} | {round_idx:.1f} ({min(one.rounds):.1f} to {max(one.rounds):.1f})"
            f" | {round_idx / median(last.rounds):.2f} | {peak.own:,.0f} | {peak.own / last.peak.own:.2f}"
            f" | {peak.files:,.0f} | {peak.processes} | {one.start_up:.1f} | {one.whole:.0f} |"
        )
    print(
        "\nRatios are to the last line. Round: median (lowest to highest) over rounds in which all clients receive and"
        " send updates. Memory: of the program and its descendants, shared pages counted once, libraries (files) apart."
        " Start-up: until the first local baseline is stored."
    )


def all_the_same(folders: Sequence[Path]) -> bool:
    """Check and print whether all runs have equal metrics and an equal proxy."""
    from examples.flower_deployment.compare_runs import has_equal_metrics, has_equal_server_state

    checks = (has_equal_metrics, has_equal_server_state)
    figures, proxies = (all(is_equal(folders[0], other) for other in folders[1:]) for is_equal in checks)
    print("\nEvery figure of every round is the same." if figures else "\nThe figures differ.")
    print("The last proxy is the same, bit for bit." if proxies else "The last proxies differ.")
    return figures and proxies


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare the engines; print Markdown.

    Returns:
        Exit code: 1 if the runs differ or fail, 2 if a requirement is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m perf.clients", description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument(
        "--rounds", type=int, default=3, help="at least 2, because the first and the last are not counted (default: 3)"
    )
    parser.add_argument("--processes", type=int, default=2, help="number of actors with one core each (default: 2)")
    parser.add_argument("--options", default="", help="additional options of fit, such as '--client.local_epochs 5'")
    parser.add_argument(
        "--engines", default=",".join(ENGINES), help="engines, separated by commas; ratios are to the last one"
    )
    parser.add_argument("--simulate", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    engines = chosen.engines.split(",")
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        parser.error(f"--engines: expected some of {', '.join(ENGINES)}, got {unknown[0]!r}")
    for name, least in (("clients", 1), ("rounds", 2), ("processes", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(chosen, name)}")
    if not all(find_spec(extra) for extra in ("ray", "flwr")):
        print("error: Ray and Flower are not installed. Run: make extras", file=sys.stderr)
        return 2
    if not Path("/proc/self/smaps_rollup").exists():
        print("error: memory is read from /proc, which exists on Linux only", file=sys.stderr)
        return 2
    if chosen.simulate:
        simulate(chosen, Path(chosen.simulate))
        return 0
    print(f"# {chosen.clients} clients, {chosen.rounds} rounds\n", flush=True)
    with TemporaryDirectory(prefix="fedekd-clients-") as temporary:
        folders = {engine: Path(temporary) / engine for engine in engines}
        try:
            found = {engine: measure(engine, chosen, folder) for engine, folder in folders.items()}
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        from perf.machine import machine

        print(f"{machine()}; Ray {version('ray')}, Flower {version('flwr')}; fit {shlex.join(federation(chosen))}\n")
        print_table(found, chosen.processes)
        same = all_the_same([folder / "run" for folder in folders.values()])
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
