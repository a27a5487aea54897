"""Memory and CPU time of a process and its descendants, from /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Shortest interval of memory readings in seconds, and as a multiple of the time of a reading, to keep the cost low.
_PAUSE, _SHARE = 0.2, 20

#: Interval of calls of the other function in seconds.
_TICK = 0.1


@dataclass(frozen=True, order=True)
class Memory:
    """Memory of a set of processes at one moment.

    A page that several processes map counts once: each process has a share (PSS, proportional set size). File pages are
    also shared with other programs, so `files` is smaller if another program uses the same libraries.

    Attributes:
        own: MiB without a file: allocations, and memory shared between the processes, such as Ray's object store.
        files: MiB of mapped files: programs and libraries.
        processes: Number of processes.
    """

    own: float
    files: float
    processes: int


def peak_memory(process: subprocess.Popen[bytes], also: Callable[[], None] = lambda: None) -> Memory:
    """Wait for a process and return the peak memory of it and its descendants.

    Args:
        process: A process that was just started.
        also: Function to call ten times per second, and at the end.
    """
    peak, due = Memory(0.0, 0.0, 0), 0.0
    while process.poll() is None:
        also()
        if (began := time.perf_counter()) >= due:
            peak = max(peak, memory_of(process.pid))
            ended = time.perf_counter()
            due = ended + max(_PAUSE, _SHARE * (ended - began))
        time.sleep(_TICK)
    also()
    return peak


def memory_of(root: int) -> Memory:
    """Return the current memory of a process and its descendants."""
    own = files = 0
    processes = descendants(root)
    for pid in processes:
        with suppress(OSError):  # the process ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
            own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
            files += sizes["Pss_File"]
    return Memory(own / 1024, files / 1024, len(processes))


def cpu_seconds(root: int) -> float:
    """Return the CPU time so far of a process and its living descendants."""
    ticks = 0
    for pid in descendants(root):
        with suppress(OSError):
            user, system = _stat(Path(f"/proc/{pid}/stat"))[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(_stat(stat)[1])].append(int(stat.parent.name))
    pids = [root]
    for pid in pids:
        pids += children[pid]
    return pids


def _stat(path: Path) -> list[bytes]:
    """Return the fields of a stat file from the state of the process on."""
    return path.read_bytes().rpartition(b")")[2].split()  # the name may contain spaces and parentheses
