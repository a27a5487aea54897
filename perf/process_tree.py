"""What a process and all that it has started hold in memory, at most: read from Linux's /proc while they run."""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two looks at memory, at least; and how many times as long as a look takes, so that it costs little.
_PAUSE, _SHARE = 0.2, 20

#: Seconds between two looks at whatever else is watched.
_TICK = 0.1


@dataclass(frozen=True, order=True)
class Held:
    """What some processes hold at one moment.

    A page that several processes have mapped counts once: each has its share of it (Linux's PSS). A share is one of all
    that map the page, strangers too; of what is no file there are none. So `own` is the engine's alone, while `files`
    is less where something else on the machine runs the same libraries.

    Attributes:
        own: MiB that are in no file: what was allocated, and memory shared between the processes, such as Ray's store.
        files: MiB of mapped files: programs and libraries, which Linux reads again where memory is short.
        processes: How many there are.
    """

    own: float
    files: float
    processes: int


def watched(process: subprocess.Popen[bytes], also: Callable[[], None] = lambda: None) -> Held:
    """The largest of what a process and its descendants hold until it ends.

    Args:
        process: The process, just started.
        also: Called every tenth of a second, and at the end.
    """
    most, due = Held(0.0, 0.0, 0), 0.0
    while process.poll() is None:
        also()
        if (began := time.perf_counter()) >= due:
            most = max(most, held(process.pid))
            ended = time.perf_counter()
            due = ended + max(_PAUSE, _SHARE * (ended - began))
        time.sleep(_TICK)
    also()
    return most


def held(root: int) -> Held:
    """What a process and its descendants hold now."""
    own = files = 0
    processes = family(root)
    for pid in processes:
        with suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
            own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
            files += sizes["Pss_File"]
    return Held(own / 1024, files / 1024, len(processes))


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            after_name = stat.read_bytes().rpartition(b")")[2].split()  # a name may hold anything
            children[int(after_name[1])].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found
