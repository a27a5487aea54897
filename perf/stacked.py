"""Clients of few images: one after another, and stacked into one network by vmap."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from perf.captured import PHASES, Phase, Stacked, Steps
from perf.setting import Workload

#: Training images of a client, all in one batch.
IMAGES = 9

#: Height and width of the images: those of scikit-learn's digits, and of FashionMNIST.
SIZES = (8, 28)


def stacked_clients(setting: Workload, repetitions: int, count: int = 32) -> None:
    """Print the CPU time of a training step per client, by image size and phase.

    The last row of a size is a step of each of FedeKD's two phases, gated and distillation.
    """
    print(f"\n## Stacked clients\n\nCPU ms of a training step of {IMAGES} images per client, {count} clients\n")
    print("| images | phase | one after another | stacked | ratio |\n| --- | --- | --- | --- | --- |")
    for size in SIZES:
        cropped = _cropped(setting, size)
        times = {phase.name: _compare(cropped, phase, repetitions, count) for phase in PHASES}
        times["FedeKD"] = times["gated"][0] + times["distillation"][0], times["gated"][1] + times["distillation"][1]
        for name, (apart, joined) in times.items():
            print(f"| {size}x{size} | {name} | {apart:.2f} | {joined:.2f} | {apart / joined:.2f} |")


def _cropped(setting: Workload, size: int) -> Workload:
    """Return the workload on the middle of its images, in batches of `IMAGES`."""
    start = (setting.images.shape[-1] - size) // 2
    images = setting.images[:, :, start : start + size, start : start + size].contiguous()
    spec = replace(setting.spec, batch_size=IMAGES, input_shape=(1, size, size))
    return replace(setting, images=images, spec=spec)


def _compare(setting: Workload, phase: Phase, repetitions: int, count: int) -> tuple[float, float]:
    """Return the CPU ms per client of a step: one after another, and stacked."""
    clients = [_steps(setting, phase, number) for number in range(count)]
    stacked = Stacked([_steps(setting, phase, number) for number in range(count)])
    for contender in (*clients, stacked):
        contender.begin()
    return _milliseconds(clients, repetitions) / count, _milliseconds([stacked], repetitions) / count


def _steps(setting: Workload, phase: Phase, number: int) -> Steps:
    networks: dict[str, nn.Module] = {role: setting.spec.build_model(role, number) for role in ("private", "proxy")}
    indices = torch.arange(IMAGES, device=setting.device) + IMAGES * number
    return Steps(setting, phase, networks, indices)


def _milliseconds(contenders: list[Steps] | list[Stacked], repetitions: int) -> float:
    """Return the median CPU time of a step of all contenders, after a warm-up."""
    order, seconds = torch.arange(IMAGES, device=contenders[0].setting.device), []
    for _ in range(repetitions + 1):
        began = time.process_time()
        for contender in contenders:
            contender.step(order)
        seconds.append(time.process_time() - began)
    return 1e3 * median(seconds[1:])
