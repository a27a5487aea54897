"""Peak memory of a federation whose images are read when needed.

    python -m perf.stored_sites --images 20000

Four sites of images of 224x224x3, which a Dataset draws from their numbers, so that no file is needed; one round of
FedAvg with its local baseline. The memory is that of the process and its workers together, Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset

from perf.machine import machine
from perf.process_tree import descendants, memory_of

SITES = ("north", "east", "south", "west")
CLASSES = 10

#: Seconds between two readings of the memory.
_PAUSE = 0.5


class DrawnImages(Dataset[Any]):
    """Images of noise over a level of grey that depends on class and site.

    Args:
        images: Number of images.
        site: Number of the site.
        size: Height and width.
    """

    def __init__(self, images: int, site: int, size: int = 224) -> None:
        self.images, self.site, self.size = images, site, size
        self.targets = [self.label(index) for index in range(images)]

    def __len__(self) -> int:
        return self.images

    def label(self, index: int) -> int:
        """Return the class of an image."""
        return (7 * index + self.site) % CLASSES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.site, index))
        noise = np.frombuffer(rng.bytes(3 * self.size**2), np.uint8) >> 1
        pixels = noise + np.uint8(12 * self.label(index))
        return torch.from_numpy(pixels.reshape(3, self.size, self.size)), self.label(index)


class SmallNet(nn.Sequential):
    """A network that takes less time than reading the images."""

    def __init__(self, in_channels: int = 3, num_classes: int = CLASSES) -> None:
        super().__init__(
            *(nn.AvgPool2d(8), nn.Conv2d(in_channels, 16, 3, stride=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(32, num_classes),
        )


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `fit`."""
    sites = {
        name: {
            "class_path": "perf.stored_sites.DrawnImages",
            "init_args": {"images": options.images, "site": number},
        }
        for number, name in enumerate(SITES)
    }
    return {
        "data": {"sites": sites, "num_workers": options.workers, "batch_size": 32, "eval_batch_size": 64},
        "method": "FedAvg",
        "rounds": 1,
        "client": {
            "private_model": {"class_path": options.model},
            "local_epochs": 1,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        },
        "trainer": {"accelerator": "cpu", "precision": "32-true", "threads": options.threads},
    }


def rss_of(root: int) -> tuple[float, int]:
    """Return the summed RSS of a process tree in MiB, and its processes."""
    total, count = 0, 0
    for pid in descendants(root):
        with suppress(OSError, StopIteration):  # the process ended
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
            count += 1
    return total / 1024, count


def measure(command: list[str]) -> dict[str, float]:
    """Run a command, and return its seconds and the peaks of its memory."""
    began, peak = time.perf_counter(), {"rss": 0.0, "pss": 0.0, "processes": 0.0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        rss, count = rss_of(process.pid)
        memory = memory_of(process.pid)
        for name, value in (("rss", rss), ("pss", memory.own + memory.files), ("processes", float(count))):
            peak[name] = max(peak[name], value)
        time.sleep(_PAUSE)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak | {"seconds": time.perf_counter() - began}


def main() -> None:
    """Train, and print time and memory."""
    parser = argparse.ArgumentParser(prog="python -m perf.stored_sites", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="images per site (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the training (default: %(default)s)")
    parser.add_argument("--model", default="perf.stored_sites.SmallNet", help="private model (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sites.yaml")
        path.write_text(yaml.safe_dump(configuration(options)))
        command = [sys.executable, "orchestrator.py", "fit", f"--config={path}", f"--output={folder}/run"]
        peak = measure([*command, f"--baseline_dir={folder}/local", "--quiet"])
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    images = len(SITES) * options.images
    print(f"{machine()}; {options.model}, {options.workers} workers, {options.threads} thread(s)")
    print(f"{images} images of 224x224x3: {images * 3 * 224**2 / 2**30:.1f} GiB as uint8; {peak['seconds']:.0f} s")
    print(f"peak of process and workers together ({peak['processes']:.0f} processes): RSS {peak['rss']:.0f} MiB (sum),")
    print(f"PSS {peak['pss']:.0f} MiB (shared pages once)")
    print(json.dumps({name: value for name, value in summary.items() if "accuracy" in name or "delta" in name}))


if __name__ == "__main__":
    main()
