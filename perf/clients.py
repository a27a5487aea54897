"""Many clients on few cores: what fedekd's engines and Flower's simulation need for the same federation.

`python -m perf.clients`, after `make extras`. FedeKD on the digits, dealt evenly, is run in one process, in
actors of Ray, and by Flower's simulation, which has actors of Ray too: one after the other, each as a program of its
own. A client has a few images, so that what is measured is what an engine itself takes to have many of them. All three
must come to the same figures and the same proxy, to the last bit. 200 clients fill some 8 GB of the temporary folder.
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

from perf.process_tree import Held, watched

# Nothing of torch is imported before all is measured: this process would share the pages of its libraries.

#: The federation, as options of `fit`.
OPTIONS = (
    *("--config", "digits.yaml", "--data.partition", "iid", "--data.min_samples", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.threads", "1", "--logger", "null", "--quiet", "true"),
)

#: Where clients run, and what is said of it.
ENGINES = {
    "Sequential": "fedekd, in one process",
    "Ray": "fedekd, {} actors of Ray",
    "Flower": "Flower's simulation, {} actors of Ray",
}

#: Neither Flower nor Ray tells anybody that it runs; an actor without a GPU is not made blind to those that are there;
#: and actors do not stand back (nice 15) behind whatever else runs on the machine, Flower's own server among it.
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Measured:
    """What an engine needed.

    Attributes:
        start_up: Seconds from the start of the program until the first client is trained: Local's reference of it is
            on the disk. Under Flower all sites have introduced themselves by then.
        rounds: Seconds of each whole round, from checkpoint to checkpoint: every client absorbs, is scored and uploads,
            the server aggregates, and all is on the disk. The first round, in which nobody absorbs, and the last, in
            which nobody uploads, are none.
        whole: Seconds from the start of the program to its end, with Local's references and all rounds.
        peak: What the program and all that it started held at most.
    """

    start_up: float
    rounds: list[float]
    whole: float
    peak: Held


class Clock:
    """When a run has done what, by the files that it writes anyway.

    Args:
        folder: Of all that the run writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.time()
        self.checkpoints: dict[int, float] = {}  # by the round that comes next
        self.first_trained = 0.0

    def look(self) -> None:
        """Note what is new; old manifests are removed, so this must be often."""
        for manifest in self.folder.glob("run/checkpoints/manifest-*.json"):
            with suppress(FileNotFoundError):
                self.checkpoints[int(manifest.stem.removeprefix("manifest-"))] = manifest.stat().st_mtime
        if not self.first_trained:
            trained = [path.stat().st_mtime for path in self._references()]
            self.first_trained = min(trained, default=0.0)

    def _references(self) -> Iterator[Path]:
        for place in ("local", "sites/*/local"):
            yield from self.folder.glob(f"{place}/*.pt")

    def rounds(self, rounds: int) -> list[float]:
        """Seconds of each round from 1 to the last but one, of those whose manifests were seen."""
        seen = self.checkpoints
        return [
            seen[round_idx + 1] - seen[round_idx]
            for round_idx in range(1, rounds)
            if {round_idx, round_idx + 1} <= seen.keys()
        ]


def measure(engine: str, chosen: argparse.Namespace, folder: Path) -> Measured:
    """Run the federation by an engine, in a program of its own.

    Raises:
        RuntimeError: If it fails, with the last that it said, or its rounds go by unseen.
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
            peak = watched(process, clock.look)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{engine} has failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    whole, rounds = time.time() - clock.began, clock.rounds(chosen.rounds)
    if not rounds:
        raise RuntimeError(f"{engine} was too fast for its rounds to be seen; give it more --clients")
    return Measured(clock.first_trained - clock.began, rounds, whole, peak)


def federation(chosen: argparse.Namespace) -> list[str]:
    """The federation as options of `fit`."""
    return [*OPTIONS, f"--data.num_clients={chosen.clients}", f"--rounds={chosen.rounds}", *shlex.split(chosen.options)]


def simulate(chosen: argparse.Namespace, folder: Path) -> None:
    """Run the federation by Flower's simulation, in this process and those that it starts."""
    from flwr.simulation import run_simulation

    from fedekd.flower.apps import Settings, make_client_app, make_server_app

    settings = Settings(tuple(federation(chosen)), chosen.clients, str(folder / "sites"), str(folder / "run"))
    resources = {
        "init_args": {"num_cpus": chosen.processes, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(make_server_app(settings), make_client_app(settings), chosen.clients, backend_config=resources)


def print_table(found: dict[str, Measured], processes: int) -> None:
    """One line an engine; the ratios are to the last of them."""
    last = list(found.values())[-1]
    print("| engine | s a round | ratio | peak memory, MiB | ratio | files, MiB | processes | start-up, s | whole, s |")
    print("| --- " * 9 + "|")
    for engine, one in found.items():
        round_idx, peak = median(one.rounds), one.peak
        print(
            f"| {ENGINES[engine].format(processes)} | {round_idx:.1f} ({min(one.rounds):.1f} to {max(one.rounds):.1f})"
            f" | {round_idx / median(last.rounds):.2f} | {peak.own:,.0f} | {peak.own / last.peak.own:.2f}"
            f" | {peak.files:,.0f} | {peak.processes} | {one.start_up:.1f} | {one.whole:.0f} |"
        )
    print(
        "\nRatios are to the last line. A round is the median of those in which every client absorbs and uploads, with"
        " the lowest and the highest; memory is that of a program and all that it starts, what they share counted"
        " once, libraries apart (files); start-up is until the first client is trained."
    )


def all_the_same(folders: Sequence[Path]) -> bool:
    """Whether all runs have the same figures and the same proxy as the first; it is told."""
    from examples.flower_deployment.compare_runs import has_equal_metrics, has_equal_server_state

    checks = (has_equal_metrics, has_equal_server_state)
    figures, proxies = (all(is_equal(folders[0], other) for other in folders[1:]) for is_equal in checks)
    print("\nEvery figure of every round is the same." if figures else "\nThe figures differ.")
    print("The last proxy is the same, bit for bit." if proxies else "The last proxies differ.")
    return figures and proxies


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, and print it as Markdown; the exit code is 1 if anything differs, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m perf.clients", description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="at least 2: the first and the last are not whole (3)")
    parser.add_argument("--processes", type=int, default=2, help="actors, of one core each (2)")
    parser.add_argument("--options", default="", help="further options of fit, such as '--client.local_epochs 5'")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, with commas; ratios are to the last")
    parser.add_argument("--simulate", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    engines = chosen.engines.split(",")
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        parser.error(f"--engines has {unknown[0]!r}; there are {', '.join(ENGINES)}")
    for name, least in (("clients", 1), ("rounds", 2), ("processes", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} is {getattr(chosen, name)}, and must be at least {least}")
    if not all(find_spec(extra) for extra in ("ray", "flwr")):
        print("error: Ray and Flower are not both installed: make extras", file=sys.stderr)
        return 2
    if not Path("/proc/self/smaps_rollup").exists():
        print("error: memory is read from /proc, which Linux alone has", file=sys.stderr)
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
