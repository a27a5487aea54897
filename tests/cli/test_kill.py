"""kill -9 at any moment, Ctrl-C at any moment: nothing is lost, and the numbers are those of the quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from fedekd.cli import main

#: Runs the command in a process of its own, which kills itself with SIGKILL at the n-th event of a kind.
VICTIM = """
import os, pathlib, signal
from fedekd.cli import main
from fedekd.data import batches

kind, count = moment.split(":")
left = int(count)

def die_at_last(here):
    global left
    if here == kind:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

real_fsync, real_replace, real_scale = os.fsync, pathlib.Path.replace, batches.scale

def fsync(descriptor):  # written, but not yet safe
    die_at_last("fsync")
    real_fsync(descriptor)

def replace(path, target):  # safe, but not yet in its place
    die_at_last("replace")
    done = real_replace(path, target)
    die_at_last("replaced")
    return done

def scale(images):  # a training batch
    die_at_last("batch")
    return real_scale(images)

os.fsync, pathlib.Path.replace, batches.scale = fsync, replace, scale
main(arguments)
"""


def kill(moment: str, arguments: list[str]) -> None:
    """Run a command until it kills itself; forked from a server that has imported everything already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedekd.cli.fit", "fedekd.reporting.wandb_logger"])
    victim = context.Process(target=exec, args=(VICTIM, {"moment": moment, "arguments": arguments}))
    victim.start()
    victim.join(300)
    assert victim.exitcode == -signal.SIGKILL


def options(npz: Path, *more: str) -> list[str]:
    return [
        "fit",
        *("--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1"),
        *(
            f"--data.dataset={npz}",
            "--data.num_clients=3",
            "--data.alpha=1.0",
            "--data.batch_size=16",
            "--rounds=3",
        ),
        *more,
    ]


def contents(run: Path) -> dict[str, bytes]:
    """metrics.csv and the final weights."""
    last = sorted((run / "checkpoints").glob("*-0004.pt"))
    assert len(last) == 4  # the server and three clients
    return {path.name: path.read_bytes() for path in [run / "metrics.csv", *last]}


@pytest.fixture(scope="module")
def quiet_run(
    tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path]
) -> tuple[Path, dict[str, bytes]]:
    """A data set, and what an undisturbed run on it writes."""
    folder = tmp_path_factory.mktemp("quiet")
    npz = write_blobs(folder / "blobs.npz")
    assert main(options(npz, f"--output={folder}/run", f"--baseline_dir={folder}/local", "--logger=null")) == 0
    return npz, contents(folder / "run")


# Batches: 18 each of Local, of proxies and of private models. Files: config.yaml; 9 of Local (3 clients x 3 rounds);
# 4 checkpoints of 5 files each; metrics.csv after all but the first.
MOMENTS = [
    "batch:5",
    "batch:20",
    "batch:33",
    "batch:46",
    "batch:53",
    "fsync:3",
    "fsync:12",
    "replace:15",
    "replaced:16",
    "fsync:21",
    "replaced:27",
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_resume(moment: str, quiet_run: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    npz, expected = quiet_run
    arguments = options(npz, f"--output={tmp_path}/run", f"--baseline_dir={tmp_path}/local", "--logger=null")
    kill(moment, arguments)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(["fit", "--resume", f"{tmp_path}/run"]) == 0
    assert contents(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_wandb_holds_every_round_once_after_a_kill(
    quiet_run: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    read_history: Callable[[Path], list[dict[str, Any]]],
) -> None:
    npz, _ = quiet_run
    logger = "--logger=fedekd.reporting.wandb_logger.WandbRunLogger"
    arguments = options(npz, f"--output={tmp_path}/run", f"--baseline_dir={tmp_path}/local", logger)
    kill("fsync:26", arguments)
    assert main(["fit", "--resume", f"{tmp_path}/run"]) == 0
    runs = [path for path in (tmp_path / "run" / "wandb").glob("offline-run-*") if path.is_dir()]
    rounds = [row["round"] for run in runs for row in read_history(run) if "round" in row]
    assert rounds == [1, 2, 3]


BESIDE = ("--engine=MultiProcess", "--engine.processes=2")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a command in a process group of its own, and waits until its first round is kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def begin(arguments: list[str]) -> subprocess.Popen[str]:
        code = "import sys; from fedekd.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        deadline = time.monotonic() + 200
        while not (tmp_path / "run/checkpoints/manifest-0001.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_ended(group: int) -> None:
    """All processes of a group are gone, or will be in a moment."""
    deadline = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "engine"), [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGINT, BESIDE), (signal.SIGTERM, BESIDE)]
)
def test_interrupt_says_how_to_go_on(
    number: signal.Signals,
    engine: tuple[str, ...],
    quiet_run: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    npz, expected = quiet_run
    run = tmp_path / "run"
    arguments = options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local", "--logger=null", *engine)
    process = start(arguments)
    os.killpg(process.pid, number)  # as a terminal does, and a batch system: all processes are told
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert f"fit --resume {run}" in told
    assert "Traceback" not in told, told
    assert_ended(process.pid)
    assert not list((tmp_path / "tmp").glob("fedekd-*"))
    assert main(["fit", "--resume", str(run), "--engine=Sequential"]) == 0
    assert contents(run) == expected


@pytest.mark.slow
def test_processes_end_with_a_killed_parent(
    quiet_run: tuple[Path, dict[str, bytes]], tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    npz, expected = quiet_run
    run = tmp_path / "run"
    process = start(options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local", "--logger=null", *BESIDE))
    process.kill()
    process.communicate(timeout=60)
    assert_ended(process.pid)
    assert not list((tmp_path / "tmp").glob("fedekd-*"))
    assert main(["fit", "--resume", str(run), "--engine=Sequential"]) == 0
    assert contents(run) == expected
