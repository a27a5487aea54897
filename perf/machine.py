"""What a benchmark ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fedekd.modules.trainer_factory import usable_cores


def machine() -> str:
    """The processor, how many cores may be used, and versions; not the machine's name."""
    told = Path("/proc/cpuinfo")  # Linux alone has it
    lines = told.read_text().splitlines() if told.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    return f"{cpu}, {usable_cores()} cores; torch {torch.__version__}, Python {platform.python_version()}"
