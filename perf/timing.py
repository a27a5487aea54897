"""Alternating time measurements, their ratios, and peak rates."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from perf.setting import Workload

NAMES = {"bare": "(a) bare loop", "fedekd": "(b) fedekd", "script": "(c) script"}
Contenders = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class Timing:
    """Seconds per contender and repetition, measured alternately."""

    seconds: Mapping[str, list[float]]

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Return median, lowest and highest ratio within a repetition."""
        ratios = [s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        return median(ratios), min(ratios), max(ratios)


def timed(setting: Workload, contenders: Contenders, repetitions: int) -> Timing:
    """Run the contenders alternately, after one warm-up each.

    The order is reversed in every second repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(-1, repetitions):
        names = list(contenders)
        for name in names if repetition % 2 else reversed(names):
            gc.collect()
            setting.synchronize()
            start = time.perf_counter()
            contenders[name]()
            setting.synchronize()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return Timing(seconds)


def matmul_peak(setting: Workload) -> float:
    """Return the FLOP/s of a large matrix product in the training precision."""
    size = 8192 if setting.device.type == "cuda" else 1024
    with setting.autocast():
        a, b = (torch.randn(size, size, device=setting.device) for _ in range(2))
        kind = torch.mm(a, b).dtype
    a, b = a.to(kind), b.to(kind)
    best = 0.0
    for _ in range(10):
        setting.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        setting.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def step_flops(setting: Workload, role: str) -> int:
    """Return the FLOPs of a training step: forward and backward of a batch."""
    network = setting.spec.build_model(role, 0)
    x = torch.zeros(setting.batch_size, 1, 28, 28, device=setting.device)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return int(counter.get_total_flops())


def print_ratios(ratios: list[tuple[str, tuple[float, float, float], str, str]]) -> None:
    """Print a Markdown table of (part, ratio, slow, fast)."""
    print("\n| of | ratio | median | lowest | highest |")
    print("| --- | --- | --- | --- | --- |")
    for what, (middle, low, high), slow, fast in ratios:
        print(f"| {what} | {NAMES.get(slow, slow)} / {NAMES.get(fast, fast)} | {middle:.2f} | {low:.2f} | {high:.2f} |")
