"""Description of the machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fedekd.modules.trainer_factory import usable_cores


def machine() -> str:
    """Return processor, usable cores and versions, without the host name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    return f"{cpu}, {usable_cores()} cores; torch {torch.__version__}, Python {platform.python_version()}"
