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


def stacked_clients(setting: Workload, repetitions: int, counts: tuple[int, ...] = (8, 32)) -> None:
    """Print the CPU time of a training step per client and phase."""
    setting = replace(setting, spec=replace(setting.spec, batch_size=IMAGES))
    print(f"\n## Stacked clients\n\nCPU ms of a training step of {IMAGES} images per client\n")
    print("| phase | clients | one after another | stacked | ratio |\n| --- | --- | --- | --- | --- |")
    for phase in PHASES:
        for count in counts:
            clients = [_steps(setting, phase, number) for number in range(count)]
            stacked = Stacked([_steps(setting, phase, number) for number in range(count)])
            for contender in (*clients, stacked):
                contender.begin()
            apart, joined = _milliseconds(clients, repetitions), _milliseconds([stacked], repetitions)
            print(f"| {phase.name} | {count} | {apart / count:.2f} | {joined / count:.2f} | {apart / joined:.2f} |")


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
