"""Peak memory of a process, and its start-up time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fedekd.methods import FedeKD
from perf import bare, script
from perf.setting import Workload
from perf.timing import NAMES


def memory(options: list[str]) -> None:
    """Print the peak memory of a private and a proxy phase by contender."""
    print("\n## Peak memory of both phases\n")
    for name in NAMES:
        command = [sys.executable, "-m", "perf", *options, "--memory-of", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"- {NAMES[name]}: {output.strip()}")


def memory_of(setting: Workload, name: str) -> None:
    """Run both phases of a contender and print the peak memory; Linux only."""
    indices = setting.data.clients[0].train[:640]
    networks = {role: setting.spec.build_model(role, 0) for role in ("private", "proxy")}
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which includes loading
    base = _status("VmRSS")
    if name == "fedekd":
        method = FedeKD()
        client = setting.client(method, indices)
        method.receive(client, method.prepare_update(client, 0).state, 1)
    else:
        module = bare if name == "bare" else script
        if name == "bare":
            indices = indices.to(setting.device)
        module.proxy_phase(setting, networks["private"], networks["proxy"], indices)
        module.private_phase(setting, networks["private"], networks["proxy"], indices)
    peak = _status("VmHWM")
    text = f"{peak:.0f} MiB, of which {peak - base:.0f} MiB for training"
    if setting.device.type == "cuda":
        text += f"; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU"
    print(text)


def _status(field: str) -> float:
    """Return the memory of this process in MiB: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def start_up() -> None:
    """Print the seconds until `--help` is printed."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "orchestrator.py", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    print(f"\n## Start-up\n\n`python orchestrator.py --help`: {median(seconds):.2f} s (median of five)")
