"""Memory of a process tree: shared pages count once, ended processes do not count."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.process_tree import descendants, memory_of, peak_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")

#: Allocates 64 MiB, then shares as many between parent and child; prints a line after each step.
PROGRAM = """
import mmap, os, sys, time
def step(name):
    print(name, flush=True)
    sys.stdin.readline()
step("begun")
own = bytearray(b"1") * 2**26
step("own")
shared = mmap.mmap(-1, 2**26)
shared.write(b"1" * 2**26)
ready, done = os.pipe(), os.pipe()
if os.fork() == 0:
    shared.seek(0)
    shared.read()
    os.write(ready[1], b"1")
    os.read(done[0], 1)
    os._exit(0)
os.read(ready[0], 1)
step("shared")
os.write(done[1], b"1")
os.wait()
step("ended")
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        yield program
        program.kill()


def after(process: subprocess.Popen[bytes], word: str, go_on: bool = True) -> None:
    """Let the program continue, and wait for its next line."""
    assert process.stdin is not None
    assert process.stdout is not None
    if go_on:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.stdout.readline().strip() == word.encode()


def test_memory_of_shared_pages_count_once(process: subprocess.Popen[bytes]) -> None:
    after(process, "begun", go_on=False)
    begun = memory_of(process.pid)
    assert begun.processes == 1
    assert begun.files > 0
    after(process, "own")
    assert memory_of(process.pid).own - begun.own == pytest.approx(64, abs=2)
    after(process, "shared")
    together = memory_of(process.pid)
    assert together.processes == len(descendants(process.pid)) == 2
    assert together.own - begun.own == pytest.approx(128, abs=3)
    after(process, "ended")
    assert memory_of(process.pid).processes == 1


def test_peak_memory_is_kept_after_it_is_freed() -> None:
    program = "import time; held = bytearray(b'1') * 2**26; time.sleep(1); del held; time.sleep(0.5)"
    looks: list[int] = []
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        peak = peak_memory(process, lambda: looks.append(1))
    assert 64 < peak.own < 96
    assert len(looks) >= 2


def test_memory_of_ended_process_is_zero() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert memory_of(process.pid).own == 0
