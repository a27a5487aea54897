"""State that libraries keep once per process, changed by one thread at a time.

Several runs may share a process, one per thread. Layers draw from PyTorch's global generators, and thread counts, flags
and warning filters belong to the process: everything that changes them holds one lock, and restores them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_lock = threading.RLock()


def exclusive() -> AbstractContextManager[bool]:
    """Context manager: change the state of the process in one thread at a time.

    The thread that is inside may enter again.
    """
    return _lock


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed PyTorch's global generators of the CPU and of one CUDA device.

    `torch.manual_seed` would seed all devices, also those that `isolated_rng` does not restore.

    Args:
        seed: Seed, a 63-bit integer.
        device: Device in use; None or a CPU seeds the generator of the CPU only.
    """
    import torch  # here: reporting uses the lock without PyTorch

    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def isolated_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context manager: seed PyTorch's global generators, and restore them on exit.

    For layers, which draw initial weights and dropout from no other generator. Other threads are excluded.

    Args:
        seed: Seed, a 63-bit integer.
        device: Device in use; None or a CPU isolates the generator of the CPU only.
    """
    import torch

    devices = [device] if device is not None and device.type == "cuda" else []
    with _lock, torch.random.fork_rng(devices=devices):
        seed_generators(seed, device)
        yield


@contextmanager
def intraop_threads(threads: int) -> Iterator[None]:
    """Context manager: use a number of CPU threads per operation.

    Other Python threads are excluded. Each has a setting of its own, which starts as that of the process; PyTorch sets
    both.

    Args:
        threads: Number of threads, at least 1.
    """
    import torch

    with _lock:
        own = torch.get_num_threads()
        if own == threads:
            yield
            return
        shared = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(own)
            if shared != own:
                _in_new_thread(torch.set_num_threads, shared)


def _in_new_thread(function: Callable[..., int | None], *arguments: int) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
