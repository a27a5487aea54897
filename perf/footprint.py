"""What a process needs: its peak memory, and the time until it answers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fedekd.methods import FedeKD
from perf import bare, script
from perf.setting import CalibrationTarget
from perf.timing import NAMES


def memory(options: list[str]) -> None:
    """Peak memory of a process that runs one private phase and one proxy phase."""
    print("\n## Peak memory of both phases\n")
    for name in NAMES:
        command = [sys.executable, "-m", "benchmarks", *options, "--memory-of", name]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"- {NAMES[name]}: {told.stdout.strip()}")


def memory_of(setting: CalibrationTarget, name: str) -> None:
    """Run both phases of one contender and tell this process's peak; Linux alone can say it."""
    indices = setting.data.clients[0].train[:640]
    networks = {role: setting.spec.build_model(role, 0) for role in ("private", "proxy")}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    base = _status("VmRSS")
    if name == "fedekd":
        method = FedeKD()
        client = setting.client(method, indices)
        method.receive(client, method.prepare_update(client, 0).state, 1)
    else:
        module = bare if name == "bare" else script
        place = indices.to(setting.device) if name == "bare" else indices
        module.proxy_phase(setting, networks["private"], networks["proxy"], place)
        module.private_phase(setting, networks["private"], networks["proxy"], place)
    peak = _status("VmHWM")
    told = f"{peak:.0f} MiB, of which {peak - base:.0f} MiB for training"
    if setting.device.type == "cuda":
        told += f"; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU"
    print(told)


def _status(field: str) -> float:
    """MiB of this process: in memory now (VmRSS), at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def start_up() -> None:
    """Seconds until `--help` is there."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "orchestrator.py", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    print(f"\n## Start-up\n\n`python orchestrator.py --help`: {median(seconds):.2f} s (of five, median)")
