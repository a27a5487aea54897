"""`make gpu`: on one GPU, times of a step, a cell of the paper, tests and a grid.

Each part runs in a separate process with a time limit, writes its results to the output folder, and is skipped if they
exist. Nothing is downloaded. The table is printed last and written to gpu.md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml

# torch is not imported here: each part needs its own time limit, and a hanging driver must not stop the others.

PARTS = ("bench", "cell", "tests", "grid")

#: Maximum seconds of each part; the grid has the remaining time.
LIMITS = {"bench": 150, "cell": 70, "tests": 110}

#: Samples of an evaluation batch in the cell; the configuration's 128 launch 16 times as many kernels.
CELL_EVAL_BATCH = 2048

#: Minimum seconds to start a part, and seconds reserved for the table.
LEAST, KEPT_BACK = 15, 8

METHODS = {
    "FedeKD": {"class_path": "FedeKD"},
    "No gating": {"class_path": "FedeKD", "init_args": {"gate": "none"}},
    "Shuffled gate": {"class_path": "FedeKD", "init_args": {"gate": "shuffled"}},
    "FedAvg": {"class_path": "FedAvg"},
}


@dataclass
class Session:
    """One call of `make gpu`.

    Attributes:
        output: Folder of all results.
        root: Folder of the data files.
        scratch: Folder of runs and checkpoints; removed at the end.
        deadline: End of the session, by `time.monotonic`.
        processes: Parallel runs in the grid.
        workers: Processes of the tests.
        rehearsal: Run small workloads on the CPU.
        known: Folder of results whose cells the grid skips; None runs all cells.
    """

    output: Path
    root: Path
    scratch: Path
    deadline: float
    processes: int
    workers: int
    rehearsal: bool
    known: Path | None = None

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.deadline - time.monotonic() - KEPT_BACK

    @property
    def has_data(self) -> bool:
        """True if FashionMNIST is in the root, or in a rehearsal, which uses digits."""
        return self.rehearsal or (self.root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").is_file()

    @property
    def dataset(self) -> str:
        """Data set of cell and grid."""
        return "digits" if self.rehearsal else "fashionmnist"

    @property
    def accelerator(self) -> str:
        """Device: `cpu` or `cuda`."""
        return "cpu" if self.rehearsal else "cuda"

    def keep(self, part: str, values: dict[str, Any]) -> None:
        """Write the results of a part atomically."""
        path = self.output / f"{part}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(values, indent=1))
        draft.replace(path)

    def found(self, part: str) -> dict[str, Any]:
        """Return the results of a part so far."""
        path = self.output / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def call(self, command: Sequence[str], limit: float, stop: int = signal.SIGTERM, **environment: str) -> int:
        """Run a command with output to log.txt; return its exit code, -1 at the limit."""
        with (self.output / "log.txt").open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            variables = {**os.environ, "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline", **environment}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
            try:
                return process.wait(max(1.0, min(limit, self.left)))
            except subprocess.TimeoutExpired:
                process.send_signal(stop)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
                time.sleep(1)  # workers that watch their parent clean up and end by themselves
                return -1
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its child processes


def bench(session: Session) -> dict[str, Any]:
    """Measure the times of a step; see perf/launches.py."""
    command = [sys.executable, "-m", "perf.gpu", "--output", str(session.output), "--root", str(session.root)]
    command += ["--measure"] + (["--rehearsal"] if session.rehearsal else [])
    code = session.call(command, 900 if session.rehearsal else LIMITS["bench"])
    return session.found("bench") | {"code": code}


def measure_here(session: Session) -> None:
    """Measure in this process, and write the results after each part."""
    import torch

    from fedekd.modules import TrainerFactory
    from perf.launches import Size, measure
    from perf.setting import make_setting

    size = Size(steps=2, repetitions=1) if session.rehearsal else Size()
    setting = make_setting(TrainerFactory(session.accelerator, threads=1), str(session.root), 70_000)
    torch.set_num_threads(1)
    with setting.trainer.numerics():
        measure(setting, size, lambda found: session.keep("bench", found))


def cell(session: Session) -> dict[str, Any]:
    """Run one cell of the paper's grid with its local baseline, from a cold start."""
    run = session.scratch / "cell"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "orchestrator.py", "fit", "--config", f"{session.dataset}.yaml"]
    command += ["--data.root", str(session.root), "--data.download", "false", "--seed", "0", "--logger", "null"]
    command += ["--output", str(run), "--baseline_dir", str(session.scratch / "cell-local")]
    command += ["--trainer.accelerator", session.accelerator, "--trainer.threads", "1"]
    command += ["--rounds", "1"] if session.rehearsal else ["--data.eval_batch_size", str(CELL_EVAL_BATCH)]
    shutil.rmtree(session.scratch / "cell-local", ignore_errors=True)
    began = time.monotonic()
    code = session.call(command, 900 if session.rehearsal else LIMITS["cell"])
    seconds = time.monotonic() - began
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    kept = {
        name: summary[name]
        for name in ("dataset", "alpha", "metric", "seconds", "mean", "local_mean", "delta")
        if summary
    }
    return {"code": code, "cold_seconds": seconds, **kept}


def tests(session: Session) -> dict[str, Any]:
    """Run tests/gpu in parallel; tests that end within the limit count."""
    log = session.scratch / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += ["-n", str(session.workers), "--timeout=100", "--tb=short", "--durations=5"]
    rehearsal = "1" if session.rehearsal else "0"
    limit = 1800 if session.rehearsal else LIMITS["tests"]
    environment = {"FEDEKD_GPU_REHEARSAL": rehearsal, "FEDEKD_GPU_TEST_LOG": str(log), "OMP_NUM_THREADS": "1"}
    code = session.call(command, limit, **environment)
    outcomes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    counts = {kind: sum(each["outcome"] == kind for each in outcomes) for kind in ("passed", "failed", "skipped")}
    failures = [
        [each[name] for name in ("name", "message", "place")] for each in outcomes if each["outcome"] == "failed"
    ]
    slowest = sorted(outcomes, key=lambda each: -each["seconds"])[:5]
    return {"code": code, **counts, "failures": failures, "slowest": [[o["name"], o["seconds"]] for o in slowest]}


def grid(session: Session) -> dict[str, Any]:
    """Run the grid of four methods in the remaining time; rows go to results/."""
    block = {
        "datasets": [session.dataset],
        "alphas": [0.3, 0.5, 0.1],
        "seeds": list(range(10)),
        "methods": METHODS,
        "options": {"data.root": str(session.root), "data.download": False},
    }
    if session.rehearsal:
        block |= {"alphas": [0.5], "seeds": [0, 1], "options": {"rounds": 1, "client.local_epochs": 1}}
    request = session.scratch / "grid.yaml"
    request.write_text(yaml.safe_dump({"blocks": [block]}))
    results = session.output / "results"
    if session.known is not None and not results.exists() and (session.known / f"{session.dataset}.csv").exists():
        results.mkdir(parents=True)
        shutil.copy(session.known / f"{session.dataset}.csv", results)
    command = [sys.executable, "orchestrator.py", "benchmark", "--config", str(request)]
    command += ["--output", str(session.scratch / "grid"), "--results", str(results)]
    command += ["--processes", str(session.processes), "--threads", "1", "--accelerator", session.accelerator]
    began, before = time.monotonic(), _rows(results)
    code = session.call(command, math.inf, signal.SIGKILL, OMP_NUM_THREADS="1")
    rows = _rows(results)
    keys = {row["key"] for row in before}
    new = [row for row in rows if row["key"] not in keys]
    counts: dict[str, int] = {}
    for row in new:
        counts[f"alpha {row['alpha']}, {row['method']}"] = counts.get(f"alpha {row['alpha']}, {row['method']}", 0) + 1
    return {
        "code": code,
        "seconds": time.monotonic() - began,
        "processes": session.processes,
        "cells": len(new),
        "all_cells": len(rows),
        "cell_seconds": [float(row["seconds"]) for row in new],
        "counts": counts,
    }


def _rows(results: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for path in sorted(results.glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


RUN: dict[str, Callable[[Session], dict[str, Any]]] = {"bench": bench, "cell": cell, "tests": tests, "grid": grid}


def is_done(part: str, found: dict[str, Any]) -> bool:
    """Return True if a part is complete; tests are complete if all passed."""
    return found.get("code") == 0 and not found.get("failed") and part != "grid"


def unpack(root: Path) -> None:
    """Unpack FashionMNIST's files into the same folder, as torchvision reads them."""
    for packed in sorted((root / "FashionMNIST" / "raw").glob("*-ubyte.gz")):
        target = packed.with_suffix("")
        if not target.exists():
            draft = target.with_suffix(".tmp")
            with gzip.open(packed) as source, draft.open("wb") as file:
                shutil.copyfileobj(source, file)
            draft.replace(target)


def card() -> str:
    """Return the name of the GPU, from the driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return output.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "no GPU"


def table(session: Session) -> str:
    """Return all results as Markdown."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"torch {version('torch')}, lightning {version('lightning')}, Python {python}"
    lines = ["# make gpu", "", f"{card()}; {versions}; {os.cpu_count()} CPU cores"]
    for part, write in (("bench", _bench_lines), ("cell", _cell_lines), ("tests", _test_lines), ("grid", _grid_lines)):
        found = session.found(part)
        lines += ["", f"## {part}", ""]
        lines += write(found) if found else ["not run"]
        if found.get("code", 0):
            lines += ["", f"exit code {found['code']}" + (" (time limit)" if found["code"] == -1 else "")]
    return "\n".join(lines) + "\n"


def _bench_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found.get('precision')}, batches of {found.get('batch')}, {found.get('images')}; bf16 matmul 8192^3:"
        f" {found.get('peak_tflops', math.nan):.0f} TFLOP/s",
        "",
        "| phase | contender | ms per client step | low | high | / first | / captured | samples/s | of peak |"
        " without kernels | kernel ms | kernels per step | loss difference |",
        "| --- " * 13 + "|",
    ]
    for row in found.get("rows", ()):
        lines.append(
            f"| {row['phase']} | {row['contender']} | {row['ms']:.3f} | {row['ms_low']:.3f} | {row['ms_high']:.3f}"
            f" | {row['ratio_to_first']:.2f} | {row['ratio_to_captured']:.2f} | {row['samples_per_second']:,.0f}"
            f" | {row['share_of_peak']:.1%} | {row['launch_bound']:.0%} | {row['kernel_ms']:.3f}"
            f" | {row['kernels_a_step']:.0f} | {row.get('loss_difference', math.nan):.1e} |"
        )
    costs = [f"{phase} {ms:.0f} ms" for phase, ms in found.get("capture_ms", {}).items()]
    lines += ["", f"capturing a step in the lean loop, once per phase: {', '.join(costs) or 'not measured'}"]
    return lines + [f"- {error}" for error in found.get("errors", ())]


def _cell_lines(found: dict[str, Any]) -> list[str]:
    if "mean" not in found:
        return [f"no summary after {found['cold_seconds']:.0f} s"]
    delta = found["delta"]
    return [
        f"{found['dataset']}, alpha {found['alpha']}, FedeKD with Local, seed 0: {found['cold_seconds']:.1f} s from the"
        f" start of the program, {found['seconds']:.1f} s in the federation; {found.get('metric', 'score')}"
        f" {found['mean']:.4f}, Local {found['local_mean']:.4f}, delta avg {delta['avg']:+.4f}, worst"
        f" {delta['worst']:+.4f}"
    ]


def _test_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"]
    for name, message, place in found["failures"]:
        lines.append(f"- `{name}`: {' '.join(message.split())} ({place})")
    slowest = [f"`{name}` {seconds:.0f} s" for name, seconds in found.get("slowest", ())]
    return lines + (["", f"slowest: {', '.join(slowest)}"] if slowest else [])


def _grid_lines(found: dict[str, Any]) -> list[str]:
    seconds = sorted(found["cell_seconds"]) or [math.nan]
    lines = [
        f"{found['cells']} cells in {found['seconds']:.0f} s, {found['processes']} in parallel; {found['all_cells']}"
        f" in results/; a cell took {seconds[0]:.0f} to {seconds[-1]:.0f} s, in the median"
        f" {seconds[len(seconds) // 2]:.0f} s",
        "",
    ]
    return lines + [f"- {name}: {count} seeds" for name, count in sorted(found["counts"].items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run incomplete parts and print the table; exit code 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--output", default="runs/gpu", help="folder of the results (runs/gpu)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all parts together (9)")
    parser.add_argument("--root", default="data", help="folder of the data files; packed ones are unpacked there")
    parser.add_argument("--processes", type=int, default=8, help="parallel runs in the grid (8)")
    parser.add_argument("--workers", type=int, default=5, help="processes of the tests (5)")
    parser.add_argument("--known", default=None, help="folder of results whose cells the grid skips")
    parser.add_argument("--rehearsal", action="store_true", help="small workloads on the CPU")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: expected parts of {', '.join(PARTS)}, got {unknown[0]}")
    output = Path(options.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    root, known = Path(options.root).resolve(), None if options.known is None else Path(options.known).resolve()
    session = Session(output, root, output, deadline, options.processes, options.workers, options.rehearsal, known)
    if options.measure:
        measure_here(session)
        return 0
    # Checkpoints are synced to the disk at every round, which is free in memory.
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 16 * 2**30
    session.scratch = Path(mkdtemp(prefix="fedekd-gpu-", dir=shared if has_room else None))
    try:
        unpack(session.root)
        for part in parts:
            if is_done(part, session.found(part)):
                print(f"{part}: done before", flush=True)
            elif part in ("cell", "grid") and not session.has_data:
                print(f"{part}: skipped, no FashionMNIST in {options.root}", flush=True)
            elif session.left < LEAST:
                print(f"{part}: skipped, no time left", flush=True)
            else:
                began = time.monotonic()
                try:
                    session.keep(part, RUN[part](session))
                except Exception as error:  # one part must not stop the others
                    print(f"{part}: {type(error).__name__}: {error}", flush=True)
                print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
                (output / "gpu.md").write_text(table(session))
        text = table(session)
        (output / "gpu.md").write_text(text)
        print(text)
        return int(any(session.found(part).get("failed") or session.found(part).get("code") for part in parts))
    finally:
        shutil.rmtree(session.scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
