"""Profile of a private phase, by part and by operation."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterable

from torch.profiler import ProfilerActivity, profile

from fedekd.methods import FedeKD
from perf.setting import Workload

#: Parts of a phase by the function that runs them; the time includes all calls.
_PARTS = {
    "building the Trainer": ("trainer_factory.py", "build"),
    "teacher's outputs": ("client.py", "predict"),
    "batches": ("batches.py", "__iter__"),
    "forward, losses, gate": ("objective_module.py", "training_step"),
    "backward": ("autograd/__init__.py", "backward"),
    "the whole phase": ("fedekd.py", "receive"),
}


def where_time_goes(setting: Workload, steps: int) -> None:
    """Profile a private phase by Python function and by operation, and print it."""
    method = FedeKD()
    indices = setting.data.clients[0].train[: steps * setting.batch_size]
    client = setting.client(method, indices)
    received = method.prepare_update(client, 0).state
    method.receive(client, received, 1)  # warm-up
    print(f"\n## Where the time of a private phase goes: {len(indices)} samples, {setting.epochs} epochs\n")
    python = cProfile.Profile()
    python.runcall(method.receive, client, received, 2)
    _print_parts(pstats.Stats(python).stats)  # type: ignore[attr-defined]
    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as operations:
        method.receive(client, received, 3)
    _print_operations(operations.key_averages(), on_gpu=setting.device.type == "cuda")


def _print_parts(stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]]) -> None:
    seconds = {
        part: sum(entry[3] for (path, _, name), entry in stats.items() if path.endswith(file) and name == function)
        for part, (file, function) in _PARTS.items()
    }
    whole = seconds.pop("the whole phase")
    step = sum(entry[3] for (path, _, name), entry in stats.items() if path.endswith("adam.py") and name == "adam")
    seconds["optimizer"] = step
    seconds["other: training loop, Python"] = whole - sum(seconds.values())
    print("| part | share |")
    print("| --- | --- |")
    for part, value in sorted(seconds.items(), key=lambda entry: -entry[1]):
        print(f"| {part} | {value / whole:.1%} |")


def _print_operations(averages: Iterable[object], on_gpu: bool) -> None:
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    entries = sorted(averages, key=lambda entry: -float(getattr(entry, attribute)))
    whole = sum(float(getattr(entry, attribute)) for entry in entries)
    print("\n| operation | share (self) | calls |")
    print("| --- | --- | --- |")
    for entry in entries[:10]:
        print(f"| `{entry.key}` | {float(getattr(entry, attribute)) / whole:.1%} | {entry.count} |")  # type: ignore[attr-defined]
