"""Measure the training steps of FedeKD's phases on a GPU, and how much of the time its kernels run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fedekd.methods import FedeKD, Local
from perf.captured import PHASES, Captured, Phase, Stacked, Steps, Streams
from perf.setting import CalibrationTarget
from perf.timing import matmul_peak, step_flops, timed

#: Entries of the profiler that are no kernels.
_NO_KERNELS = ("Activity Buffer Request", "Lazy Function Loading", "Command Buffer Full", "Instrumentation")

#: Clients of the stacked contenders.
CLIENTS = 6

Contender = Steps | Stacked | Streams | Captured


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        steps: Batches of an epoch.
        repetitions: Timed runs of each contender.
    """

    steps: int = 100
    repetitions: int = 5


def measure(setting: CalibrationTarget, size: Size, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure all phases.

    Args:
        setting: Data, precision and device.
        size: How much.
        keep: Takes all that is known so far, after each part.
    """
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": setting.trainer.precision,
        "batch": setting.batch_size,
        "images": setting.source,
        "peak_tflops": matmul_peak(setting) / 1e12 if setting.device.type == "cuda" else math.nan,
        "rows": [],
        "errors": [],
    }
    for part in (_one_client, _several_clients):
        for phase in PHASES:
            try:
                found["rows"] += part(setting, phase, size, found["peak_tflops"] * 1e12)
            except Exception as error:  # one contender that cannot run must not cost the others
                found["errors"].append(f"{phase.name}, {part.__name__}: {type(error).__name__}: {error}"[:500])
            keep(found)


def _indices(setting: CalibrationTarget, size: Size, client: int = 0) -> Tensor:
    count = size.steps * setting.batch_size
    whole = torch.arange(len(setting.images), device=setting.device)
    return whole.roll(-client * count)[:count] if len(whole) >= count else whole.repeat(count // len(whole) + 1)[:count]


def _order(setting: CalibrationTarget, size: Size) -> Tensor:
    order = torch.randperm(size.steps * setting.batch_size)
    return order.view(size.steps, setting.batch_size).to(setting.device)


def _steps(setting: CalibrationTarget, phase: Phase, size: Size, client: int = 0, capturable: bool = False) -> Steps:
    networks: dict[str, nn.Module] = {role: setting.spec.build_model(role, client) for role in ("private", "proxy")}
    return Steps(setting, phase, networks, _indices(setting, size, client), capturable)


def _train(setting: CalibrationTarget, contender: Contender, size: Size) -> None:
    contender.begin()
    for _ in range(setting.epochs):
        contender.epoch(_order(setting, size))


def _one_client(setting: CalibrationTarget, phase: Phase, size: Size, peak: float) -> list[dict[str, Any]]:
    """(a) bare, (a') captured, and (b) fedekd's modules by Lightning."""
    order = _order(setting, size)
    bare, captured = _steps(setting, phase, size), Captured(_steps(setting, phase, size, capturable=True), order)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        fastest = Captured(_steps(setting, phase, size, capturable=True), order)
    differences = [_difference(_steps(setting, phase, size), contender, order) for contender in (captured, fastest)]
    by_name: dict[str, Callable[[], None]] = {
        "(a) bare": lambda: _train(setting, bare, size),
        "(a') captured": lambda: _train(setting, captured, size),
        "captured, any cuDNN algorithm": lambda: _train(setting, fastest, size),
        "(b) fedekd": _fedekd(setting, phase, size),
    }
    rows = _rows(setting, phase, size, by_name, clients=1, peak=peak)
    for row, difference in zip(rows[1:], differences, strict=False):
        row["loss_difference"] = difference
    return rows


def _several_clients(setting: CalibrationTarget, phase: Phase, size: Size, peak: float) -> list[dict[str, Any]]:
    """Six clients: stacked weights, eager and captured, and captured on a stream each."""
    size = replace(size, steps=max(1, size.steps // 4))  # the profiler takes long over a hundred thousand kernels
    order = _order(setting, size)

    def clients(capturable: bool) -> list[Steps]:
        return [_steps(setting, phase, size, number, capturable) for number in range(CLIENTS)]

    by_name: dict[str, Callable[[], None]] = {}
    differences = {}
    for name, make in (
        ("stacked", lambda: Stacked(clients(False))),
        ("stacked, captured", lambda: Captured(Stacked(clients(True)), order)),
        ("a stream each, captured", lambda: Captured(Streams(clients(True)), order)),
    ):
        contender = make()
        differences[name] = _difference(Streams(clients(False)), contender, order)
        by_name[name] = lambda contender=contender: _train(setting, contender, size)  # type: ignore[misc]
    rows = _rows(setting, phase, size, by_name, clients=CLIENTS, peak=peak)
    for row in rows:
        row["loss_difference"] = differences[row["contender"]]
    return rows


def _difference(reference: Contender, contender: Contender, order: Tensor) -> float:
    """Largest relative difference of the losses of a first epoch, batch by batch."""
    losses = []
    for each in (reference, contender):
        each.begin()
        losses.append(each.epoch(order).double().cpu())
    return float(((losses[1] - losses[0]).abs() / losses[0].abs().clamp_min(1e-3)).max())


def _fedekd(setting: CalibrationTarget, phase: Phase, size: Size) -> Callable[[], None]:
    indices = _indices(setting, size).cpu()
    method = Local() if phase.name == "supervised" else FedeKD()
    client = setting.client(method, indices)
    if phase.name == "supervised":
        return lambda: _ignore(method.receive(client, {}, 1))
    received = method.prepare_update(client, 0).state
    if phase.name == "gated":
        return lambda: _ignore(method.receive(client, received, 1))
    return lambda: _ignore(method.prepare_update(client, 1))


def _ignore(result: object) -> None:
    """Drop a result: a contender returns nothing."""


def _rows(
    setting: CalibrationTarget,
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
    for name, run in by_name.items():
        seconds = median(timing.seconds[name]) / total
        kernels, launches = _kernels(setting, run)
        rows.append(
            {
                "phase": phase.name,
                "contender": name,
                "clients": clients,
                "ms": seconds * 1e3,
                "ms_low": min(timing.seconds[name]) / total * 1e3,
                "ms_high": max(timing.seconds[name]) / total * 1e3,
                "ratio_to_first": timing.ratio(name, first)[0],
                "ratio_to_captured": timing.ratio(name, "(a') captured")[0] if clients == 1 else math.nan,
                "samples_per_second": setting.batch_size / seconds,
                "share_of_peak": flops / seconds / peak,
                "kernel_ms": kernels / total * 1e3,
                "launch_bound": 1.0 - kernels / total / seconds,
                "kernels_a_step": launches / total,
            }
        )
    return rows


def _kernels(setting: CalibrationTarget, run: Callable[[], None]) -> tuple[float, float]:
    """Seconds of all GPU kernels of a run, by the profiler, and their number; NaN where it cannot see them."""
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
