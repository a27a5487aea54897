"""Several runs in threads of one process: equal numbers, and no changed state of the process."""

from __future__ import annotations

import logging
import math
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions, SilentObserver
from fedekd.federation.source_code import SourceUnavailableError
from fedekd.global_state import exclusive, isolated_rng
from fedekd.methods import Client, ClientOptions, FedAvg, FedeKD, Local, Method, SafeKD
from fedekd.modules import TrainerFactory

from .runs import weights

METHODS = (FedeKD, FedAvg, Local, SafeKD)


class DropoutNet(nn.Module):
    """Small network whose dropout draws from the global generator, in evaluation mode, too."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.body(x), 0.1))  # type: ignore[no-any-return]


@pytest.fixture
def dropout_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The class path of `DropoutNet`."""
    module = ModuleType("dropout_models")
    module.DropoutNet = DropoutNet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dropout_models", module)
    return {"class_path": "dropout_models.DropoutNet"}


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Let threads take turns every 10 microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def digits_run(method: Method, model: dict[str, Any], threads: int = 1, **parts: Any) -> Orchestrator:
    """A run of one round on three clients with the handwritten digits."""
    return Orchestrator(
        method,
        FederatedDataModule("digits", num_clients=3, alpha=1.0, batch_size=64),
        ClientOptions(local_epochs=1, private_model=model, proxy_model={"class_path": "fedekd.models.ProxyCNN"}),
        TrainerFactory(accelerator="cpu", precision="32-true", threads=threads),
        RoundOptions(rounds=1),
        **parts,
    )


def process_state() -> dict[str, Any]:
    """Return what a run must leave as it was; the threads also of a thread that starts later."""
    with ThreadPoolExecutor(1) as pool:
        threads = torch.get_num_threads(), pool.submit(torch.get_num_threads).result()
    return {
        "stdout": id(sys.stdout),
        "stderr": id(sys.stderr),
        "socket": socket.getdefaulttimeout(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "threads": threads,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "levels": {name: logging.getLogger(name).level for name in ("", "lightning.pytorch", "lightning.fabric")},
        "filters": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all jobs at once, each in a thread, and return their results or errors."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return job()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def outcome(run: Orchestrator) -> tuple[Any, dict[str, Tensor]]:
    """Run, and return the metrics rows as text, in which NaN equals NaN, and the clients' weights."""
    run.run()
    return repr(run.progress.history), weights(run)


def test_run_four_in_threads_equals_each_by_itself_bit_for_bit(
    dropout_model: dict[str, Any], frequent_switches: None
) -> None:
    exits = {"class_path": "fedekd.models.PrivateCNN"}

    def job(method: type[Method]) -> Callable[[], Any]:
        model = exits if method is SafeKD else dropout_model
        threads = 2 if method is FedAvg else 1
        return lambda: outcome(digits_run(method(), model, threads))

    jobs = [job(method) for method in METHODS]
    by_itself = [run() for run in jobs]
    before = process_state()
    together = in_threads(jobs)
    assert process_state() == before
    for method, (rows, tensors), (rows_together, tensors_together) in zip(METHODS, by_itself, together, strict=True):
        assert rows_together == rows, method
        assert tensors.keys() == tensors_together.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, tensors_together[name]), (method, name)


def test_run_draws_nothing_from_the_global_generators(dropout_model: dict[str, Any]) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = process_state()
        results.append(outcome(digits_run(FedeKD(), dropout_model)))
        assert process_state() == before
    assert results[0][0] == results[1][0]


@pytest.mark.slow
def test_run_multiprocess_in_two_threads_equals_sequential() -> None:
    model = {"class_path": "fedekd.models.PrivateCNN"}

    def rows(method: Method, **parts: Any) -> Any:
        run = digits_run(method, model, **parts)
        run.run()
        return repr(run.progress.history)

    jobs = [lambda: rows(FedeKD(), engine=MultiProcess(1)), lambda: rows(FedAvg(), engine=MultiProcess(1))]
    assert in_threads(jobs) == [rows(FedeKD()), rows(FedAvg())]


def test_run_one_folder_in_two_threads_is_refused(tmp_path: Path, undrawn: None) -> None:
    model = {"class_path": "fedekd.models.ProxyCNN"}
    runs = [digits_run(Local(), model, output=tmp_path) for _ in range(2)]
    results = in_threads([run.run for run in runs])
    [error] = [result for result in results if isinstance(result, UserError)]
    assert str(error) == f"{tmp_path}: run folder is locked by another process"


def test_run_shared_baselines_in_two_threads_are_written_whole(tmp_path: Path, frequent_switches: None) -> None:
    model = {"class_path": "fedekd.models.ProxyCNN"}
    by_itself, *together = in_threads([lambda: outcome(digits_run(FedAvg(), model))]) + in_threads(
        [lambda: outcome(digits_run(FedAvg(), model, baseline_dir=tmp_path)) for _ in range(2)]
    )
    assert [rows for rows, _ in together] == [by_itself[0]] * 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}


def test_isolated_rng_seeds_and_restores_the_generator() -> None:
    before = torch.get_rng_state()
    with isolated_rng(3):
        drawn = torch.rand(2)
        with isolated_rng(4):
            torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_numerics_in_a_thread_restores_the_threads_of_the_process() -> None:
    """A thread whose first operation falls into another run's `numerics` starts with the threads of that run."""
    inside, seen, left = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        torch.get_num_threads()
        seen.set()
        left.wait()
        with TrainerFactory(accelerator="cpu", threads=2).numerics():
            pass

    before = process_state()["threads"]
    thread = threading.Thread(target=other)
    thread.start()
    with TrainerFactory(accelerator="cpu", threads=3).numerics():
        inside.set()
        seen.wait()
    left.set()
    thread.join()
    assert process_state()["threads"] == before


def test_exclusive_is_held_by_one_thread_and_reentrant() -> None:
    entered = threading.Event()

    def enter() -> None:
        with exclusive():
            entered.set()

    with exclusive(), exclusive():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()


def test_observer_is_called_outside_of_the_lock(
    dropout_model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer that waits for another thread, which starts a phase of its own, ends."""
    free: dict[str, bool] = {}  # by event: true if the lock was free each time

    def try_lock(lock: Any, name: str) -> None:
        acquired = lock.acquire(timeout=0.2)
        free[name] = free.get(name, True) and acquired
        if acquired:
            lock.release()

    class Waiting(SilentObserver):
        def _wait(self, name: str) -> None:
            thread = threading.Thread(target=try_lock, args=(exclusive(), name))
            thread.start()
            thread.join()

        def phase_started(self, client: int, phase: str) -> None:
            self._wait(f"started {phase}")

        def phase_finished(self, client: int, phase: str, steps: int) -> None:
            self._wait(f"finished {phase}")

        def warn(self, text: str) -> None:
            self._wait("warn")

    evaluate = Client.evaluate

    def not_finite(client: Client) -> tuple[list[float], dict[str, float]]:
        return [math.nan], dict.fromkeys(evaluate(client)[1], math.nan)

    monkeypatch.setattr(Client, "evaluate", not_finite)

    def no_key(client: Any) -> str:
        raise SourceUnavailableError("a notebook cell")

    monkeypatch.setattr("fedekd.federation.local_baseline.baseline_key", no_key)
    digits_run(FedeKD(), dropout_model, observer=Waiting(), baseline_dir=tmp_path).run()
    assert free == dict.fromkeys(
        [
            *(f"{event} {phase}" for phase in ("local", "receive", "update") for event in ("started", "finished")),
            "warn",
        ],
        True,
    )
