"""Measure training steps of FedeKD's phases and their kernels on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fedekd.methods import FedeKD, Local
from fedekd.modules import lean_loop
from perf.captured import PHASES, Captured, Phase, Stacked, Steps, Streams
from perf.setting import Workload
from perf.timing import matmul_peak, step_flops, timed

#: Entries of the profiler that are not kernels.
_NO_KERNELS = ("Activity Buffer Request", "Lazy Function Loading", "Command Buffer Full", "Instrumentation")

#: Clients of the stacked contenders.
CLIENTS = 6

CAPTURED = "(a') captured"

Contender = Steps | Stacked | Streams | Captured


@dataclass(frozen=True)
class Size:
    """Extent of a measurement.

    Args:
        steps: Batches of an epoch.
        repetitions: Timed runs of each contender.
    """

    steps: int = 100
    repetitions: int = 3


def measure(setting: Workload, size: Size, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure all phases: times of one client, kernels, several clients at once.

    Args:
        setting: Data, precision and device.
        size: Extent of the measurement.
        keep: Called with all results so far, after each part.
    """
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": setting.trainer.precision,
        "batch": setting.batch_size,
        "images": setting.source,
        "peak_tflops": matmul_peak(setting) / 1e12 if setting.device.type == "cuda" else math.nan,
        "rows": [],
        "capture_ms": {},
        "errors": [],
    }
    keep(found)
    for part in (_one_client, _add_kernels, _several_clients):
        for phase in PHASES:
            try:
                part(setting, phase, size, found)
            except Exception as error:  # a contender that fails must not stop the others
                found["errors"].append(f"{phase.name}, {part.__name__}: {type(error).__name__}: {error}"[:500])
            keep(found)


def _indices(setting: Workload, size: Size, client: int = 0) -> Tensor:
    count = size.steps * setting.batch_size
    whole = torch.arange(len(setting.images), device=setting.device)
    return whole.roll(-client * count)[:count] if len(whole) >= count else whole.repeat(count // len(whole) + 1)[:count]


def _order(setting: Workload, size: Size) -> Tensor:
    order = torch.randperm(size.steps * setting.batch_size)
    return order.view(size.steps, setting.batch_size).to(setting.device)


def _steps(setting: Workload, phase: Phase, size: Size, client: int = 0, capturable: bool = False) -> Steps:
    networks: dict[str, nn.Module] = {role: setting.spec.build_model(role, client) for role in ("private", "proxy")}
    return Steps(setting, phase, networks, _indices(setting, size, client), capturable)


def _train(setting: Workload, contender: Contender, size: Size) -> None:
    contender.begin()
    for _ in range(setting.epochs):
        contender.epoch(_order(setting, size))


def _contenders(setting: Workload, phase: Phase, size: Size) -> dict[str, Callable[[], None]]:
    """Return (a) the bare loop, eager and captured, and (b) fedekd with each loop."""
    bare = _steps(setting, phase, size)
    captured = Captured(_steps(setting, phase, size, capturable=True), _order(setting, size))
    return {
        "(a) bare": lambda: _train(setting, bare, size),
        CAPTURED: lambda: _train(setting, captured, size),
        "(b) fedekd, lightning": _fedekd(setting, phase, size, loop="lightning"),
        "(b) fedekd, lean": _fedekd(setting, phase, size, loop="lean", capture=False),
        "(b) fedekd, captured": _fedekd(setting, phase, size, loop="lean"),
    }


def _one_client(setting: Workload, phase: Phase, size: Size, found: dict[str, Any]) -> None:
    """Measure the times of the contenders, and of the captures of fedekd."""
    contenders = _contenders(setting, phase, size)
    with _capture_times() as seconds:
        rows = _rows(setting, phase, size, contenders, clients=1, peak=found["peak_tflops"] * 1e12)
    if seconds:
        found["capture_ms"][phase.name] = median(seconds) * 1e3
    order = _order(setting, size)
    captured = Captured(_steps(setting, phase, size, capturable=True), order)
    rows[1]["loss_difference"] = _difference(_steps(setting, phase, size), captured, order)
    found["rows"] += rows


def _add_kernels(setting: Workload, phase: Phase, size: Size, found: dict[str, Any]) -> None:
    """Count the kernels of each contender.

    Of few steps only: the profiler is slow with a hundred thousand kernels.
    """
    few = replace(size, steps=max(1, size.steps // 10))
    contenders = _contenders(setting, phase, few)
    for row in found["rows"]:
        if row["phase"] == phase.name and row["contender"] in contenders:
            _note_kernels(setting, row, contenders[row["contender"]], few.steps * setting.epochs)


def _several_clients(setting: Workload, phase: Phase, size: Size, found: dict[str, Any]) -> None:
    """Measure six clients, stacked or on one stream each, and any cuDNN algorithm."""
    size = replace(size, steps=max(1, size.steps // 4))
    order = _order(setting, size)

    def clients(capturable: bool) -> list[Steps]:
        return [_steps(setting, phase, size, number, capturable) for number in range(CLIENTS)]

    def any_algorithm() -> Captured:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
            return Captured(_steps(setting, phase, size, capturable=True), order)

    for name, count, make in (
        ("captured, any cuDNN algorithm", 1, any_algorithm),
        ("a stream each, captured", CLIENTS, lambda: Captured(Streams(clients(True)), order)),
        ("stacked, captured", CLIENTS, lambda: Captured(Stacked(clients(True)), order)),
    ):
        contender = make()
        eager = _steps(setting, phase, size) if count == 1 else Streams(clients(False))
        difference = _difference(eager, contender, order)
        by_name = {name: lambda contender=contender: _train(setting, contender, size)}  # type: ignore[misc]
        rows = _rows(setting, phase, size, by_name, clients=count, peak=found["peak_tflops"] * 1e12)
        found["rows"] += [{**row, "loss_difference": difference} for row in rows]


def _difference(reference: Contender, contender: Contender, order: Tensor) -> float:
    """Return the largest relative difference of the losses of a first epoch."""
    losses = []
    for each in (reference, contender):
        each.begin()
        losses.append(each.epoch(order).double().cpu())
    return float(((losses[1] - losses[0]).abs() / losses[0].abs().clamp_min(1e-3)).max())


def _fedekd(setting: Workload, phase: Phase, size: Size, **options: Any) -> Callable[[], None]:
    """Return one phase of fedekd; `options` replace fields of the TrainerFactory."""
    indices = _indices(setting, size).cpu()
    method = Local() if phase.name == "supervised" else FedeKD()
    client = setting.client(method, indices)
    client.spec = replace(client.spec, trainer=replace(client.spec.trainer, **options))
    if phase.name == "supervised":
        return lambda: _ignore(method.receive(client, {}, 1))
    received = method.prepare_update(client, 0).state
    if phase.name == "gated":
        return lambda: _ignore(method.receive(client, received, 1))
    return lambda: _ignore(method.prepare_update(client, 1))


@contextmanager
def _capture_times() -> Iterator[list[float]]:
    """Context manager: collect the seconds of each capture by the lean loop."""
    capture, seconds = lean_loop.capture, []

    def timed_capture(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return capture(*arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    lean_loop.capture = timed_capture
    try:
        yield seconds
    finally:
        lean_loop.capture = capture


def _ignore(result: object) -> None:
    """Drop a result: a contender returns nothing."""


def _rows(
    setting: Workload,
    phase: Phase,
    size: Size,
    by_name: dict[str, Callable[[], None]],
    clients: int,
    peak: float,
) -> list[dict[str, Any]]:
    timing = timed(setting, by_name, size.repetitions)
    total = size.steps * setting.epochs * clients
    flops, first = step_flops(setting, phase.role), next(iter(by_name))
    rows = []
    for name in by_name:
        seconds = median(timing.seconds[name]) / total
        row = {
            "phase": phase.name,
            "contender": name,
            "clients": clients,
            "ms": seconds * 1e3,
            "ms_low": min(timing.seconds[name]) / total * 1e3,
            "ms_high": max(timing.seconds[name]) / total * 1e3,
            "ratio_to_first": timing.ratio(name, first)[0] if len(by_name) > 1 else math.nan,
            "ratio_to_captured": timing.ratio(name, CAPTURED)[0] if CAPTURED in by_name else math.nan,
            "samples_per_second": setting.batch_size / seconds,
            "share_of_peak": flops / seconds / peak,
            "kernel_ms": math.nan,
            "launch_bound": math.nan,
            "kernels_a_step": math.nan,
        }
        rows.append(row)
    return rows


def _note_kernels(setting: Workload, row: dict[str, Any], run: Callable[[], None], steps: int) -> None:
    """Add the kernels of a run of `steps` steps to a row."""
    kernels, launches = _kernels(setting, run)
    row["kernel_ms"], row["kernels_a_step"] = kernels / steps * 1e3, launches / steps
    row["launch_bound"] = 1.0 - row["kernel_ms"] / row["ms"]


def _kernels(setting: Workload, run: Callable[[], None]) -> tuple[float, float]:
    """Return seconds and number of all GPU kernels of a run; NaN without a GPU."""
    if setting.device.type != "cuda":
        return math.nan, math.nan
    with suppress(RuntimeError):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            setting.synchronize()
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        events = [event for event in events if not getattr(event, "is_user_annotation", False)]
        events = [event for event in events if event.key not in _NO_KERNELS]
        if events:
            return sum(event.self_device_time_total for event in events) / 1e6, sum(event.count for event in events)
    return math.nan, math.nan
