"""Runs stopped by SIGKILL, SIGINT or SIGTERM resume with the results of an undisturbed run.

`FEDEKD_KILLS=60 pytest -s tests/cli/test_kill.py -k random` kills that many runs, and prints the counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from fedekd.cli import main
from fedekd.federation.checkpoint import CheckpointStore

KILLS = int(os.environ.get("FEDEKD_KILLS", "6"))

#: Code of a process that runs a command and kills itself with SIGKILL at the n-th event of a kind, or after a time.
VICTIM = """
import os, pathlib, signal, threading
from fedekd.cli import main
from fedekd.data import batches

kind, count = moment.split(":")
left = float(count)
if kind == "seconds":
    threading.Timer(left, os.kill, (os.getpid(), signal.SIGKILL)).start()

def count_down(event):
    global left
    if event == kind:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

real_fsync, real_replace, real_scale = os.fsync, pathlib.Path.replace, batches.scale

def fsync(descriptor):  # written, not yet on the disk
    count_down("fsync")
    real_fsync(descriptor)

def replace(path, target):  # on the disk, not yet renamed
    count_down("replace")
    result = real_replace(path, target)
    count_down("replaced")
    return result

def scale(images):  # a training batch
    count_down("batch")
    return real_scale(images)

os.fsync, pathlib.Path.replace, batches.scale = fsync, replace, scale
main(arguments)
"""


def kill(moment: str, arguments: list[str]) -> bool:
    """Run a command until it kills itself, forked from a server with all imports; return whether it did."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedekd.cli.fit", "fedekd.reporting.wandb_logger"])
    victim = context.Process(target=exec, args=(VICTIM, {"moment": moment, "arguments": arguments}))
    victim.start()
    victim.join(300)
    return victim.exitcode == -signal.SIGKILL


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
            "--checkpoint_every=0",
        ),
        *more,
    ]


def contents(run: Path) -> dict[str, str]:
    """metrics.csv and the final states."""
    digests = CheckpointStore(run / "checkpoints").digests()
    assert len(digests) == 4  # the server and three clients
    return digests | {"rows": (run / "metrics.csv").read_text()}


def repeatable(run: Path) -> dict[str, Any]:
    """The summary without what depends on the machine."""
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


@pytest.fixture(scope="module")
def undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path]
) -> tuple[Path, dict[str, str]]:
    """A data set and the files of an undisturbed run on it."""
    folder = tmp_path_factory.mktemp("quiet")
    npz = write_blobs(folder / "blobs.npz")
    assert main(options(npz, f"--output={folder}/run", f"--baseline_dir={folder}/local", "--logger=null")) == 0
    return npz, contents(folder / "run")


# Batches: 18 each of local baselines, proxies and private models. Files: config.yaml, SHA256SUMS; 3 local baselines;
# 4 checkpoints, of states and a manifest; metrics.csv after each but the first.
MOMENTS = [
    "batch:5",
    "batch:20",
    "batch:33",
    "batch:46",
    "batch:53",
    "fsync:4",
    "fsync:6",
    "replace:7",
    "replaced:8",
    "fsync:12",
    "replaced:14",
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_after_sigkill_gives_same_files(
    moment: str, undisturbed_run: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    npz, expected = undisturbed_run
    arguments = options(npz, f"--output={tmp_path}/run", f"--baseline_dir={tmp_path}/local", "--logger=null")
    assert kill(moment, arguments)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(["fit", "--resume", f"{tmp_path}/run"]) == 0
    assert contents(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob("*.tmp"))


#: Training options, and the moments of a kill: in a local baseline, in a proxy, in a private model.
TRAINING = {
    "schedule of steps, callbacks, clipping and accumulation": [
        *("--client.scheduler=OneCycleLR", "--client.scheduler.max_lr=1e-3", "--client.scheduler.total_steps=40"),
        *("--client.scheduler_interval=step", "--client.lr_decay=0.9"),
        "--trainer.callbacks=[{class_path: EMAWeightAveraging, init_args: {decay: 0.5}}]",
        *("--trainer.gradient_clip_val=0.1", "--trainer.accumulate_grad_batches=2"),
    ],
    "weights and frozen parts": ["--client.private_weights=WEIGHTS", "--client.freeze=[convolutions.*]"],
    "adapters": ["--client.private_weights=WEIGHTS", "--client.lora.r=2", "--client.lora.lora_dropout=0.2"],
    "schedule of epochs, best round, clipped values": [
        *("--client.scheduler=StepLR", "--client.scheduler.step_size=1", "--client.scheduler.gamma=30"),
        *("--select_round=best", "--trainer.gradient_clip_val=0.01", "--trainer.gradient_clip_algorithm=value"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.lora) if name == "adapters" else name for name in TRAINING]
)
def test_resume_after_sigkill_with_training_options_gives_same_files(
    name: str, undisturbed_run: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    if name == "adapters":
        pytest.importorskip("peft")
    npz, plain = undisturbed_run
    trained, _ = CheckpointStore(npz.parent / "run" / "checkpoints").load()
    assert trained is not None
    torch.save(trained.clients[0]["networks"]["private"], tmp_path / "weights.pt")
    training = [option.replace("WEIGHTS", str(tmp_path / "weights.pt")) for option in TRAINING[name]]
    whole = options(npz, f"--output={tmp_path}/whole", f"--baseline_dir={tmp_path}/whole-local", "--logger=null")
    assert main([*whole, *training]) == 0
    expected = contents(tmp_path / "whole")
    assert all(expected[file] != plain[file] for file in expected if file.startswith("client"))
    summary = repeatable(tmp_path / "whole")
    if "--select_round=best" in TRAINING[name]:
        assert min(client["selected_round"] for client in summary["clients"]) < 3
    for moment in ("batch:5", "batch:33", "batch:46"):
        run = tmp_path / moment.replace(":", "-")
        arguments = options(npz, f"--output={run}", f"--baseline_dir={run}-local", "--logger=null", *training)
        assert kill(moment, arguments)
        assert main(["fit", "--resume", str(run)]) == 0
        assert contents(run) == expected
        assert repeatable(run) == summary


#: Kinds of events, and how many a run has, from its first file to `summary.json`.
EVENTS = {"batch": 54, "fsync": 23, "replace": 23, "replaced": 23}


def random_moment(rng: Random) -> str:
    kind = rng.choice([*EVENTS, "seconds"])
    return f"seconds:{rng.uniform(0, 3):.3f}" if kind == "seconds" else f"{kind}:{rng.randint(1, EVENTS[kind])}"


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_random_kills_change_no_number(
    undisturbed_run: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npz, expected = undisturbed_run
    summary = repeatable(npz.parent / "run")
    rng, counts, different = Random(0), Counter[str](), list[str]()
    while counts["kills"] < KILLS:
        run, moments = tmp_path / f"run-{counts['runs']}", list[str]()
        arguments = options(npz, f"--output={run}", f"--baseline_dir={run}-local", "--logger=null")
        if counts["runs"] % 2:  # rounds that are not saved, and states in a file
            arguments += ["--checkpoint_every=0.2", "--engine.cache=0"]
        for _ in range(rng.randint(1, 3)):  # the resumed run is killed, too
            has_run = (run / "config.yaml").exists()
            moments.append(random_moment(rng))
            counts["kills"] += kill(moments[-1], ["fit", "--resume", str(run)] if has_run else arguments)
        counts["runs"] += 1
        code = main(["fit", "--resume", str(run)] if (run / "config.yaml").exists() else arguments)
        if code or contents(run) != expected or repeatable(run) != summary or list(run.rglob("*.tmp")):
            different.append(f"{moments}: exit code {code}")
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run, check=True)
    with capsys.disabled():
        print(f"\n{counts['kills']} kills of {counts['runs']} runs, with changed numbers: {different}")
    assert not different


MULTIPROCESS = ("--engine=MultiProcess", "--engine.processes=2")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a command in a new process group and wait for its first checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def run(arguments: list[str]) -> subprocess.Popen[str]:
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

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_ended(group: int) -> None:
    """Assert that all processes of a group end within a minute."""
    deadline = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "engine"),
    [(signal.SIGTERM, ()), (signal.SIGINT, MULTIPROCESS)],
)
def test_signal_prints_resume_command_and_ends_all_processes(
    number: signal.Signals,
    engine: tuple[str, ...],
    undisturbed_run: tuple[Path, dict[str, str]],
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    npz, expected = undisturbed_run
    run = tmp_path / "run"
    arguments = options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local", "--logger=null", *engine)
    process = start(arguments)
    os.killpg(process.pid, number)  # as a terminal and a batch system do: all processes get the signal
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert f"fit --resume {run}" in stderr
    assert "Traceback" not in stderr, stderr
    assert_ended(process.pid)
    assert not list((tmp_path / "tmp").glob("fedekd-*"))
    assert main(["fit", "--resume", str(run), "--engine=Sequential"]) == 0
    assert contents(run) == expected
    assert main(["test", str(run)]) == 0  # with the engine of its configuration


@pytest.mark.slow
def test_worker_processes_end_with_killed_parent(
    undisturbed_run: tuple[Path, dict[str, str]], tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    npz, expected = undisturbed_run
    run = tmp_path / "run"
    process = start(options(npz, f"--output={run}", f"--baseline_dir={tmp_path}/local", "--logger=null", *MULTIPROCESS))
    process.kill()
    process.communicate(timeout=60)
    assert_ended(process.pid)
    assert not list((tmp_path / "tmp").glob("fedekd-*"))
    assert main(["fit", "--resume", str(run), "--engine=Sequential"]) == 0
    assert contents(run) == expected
