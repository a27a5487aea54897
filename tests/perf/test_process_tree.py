"""Memory of a tree of processes: what is shared counts once, and what has ended is forgotten."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.process_tree import family, held, watched

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone tells it")

#: 64 MiB of one's own, then as many that a parent shares with its child; each line is said when that is so.
PROGRAM = """
import mmap, os, sys, time
def say(what):
    print(what, flush=True)
    sys.stdin.readline()
say("begun")
own = bytearray(b"1") * 2**26
say("own")
shared = mmap.mmap(-1, 2**26)
shared.write(b"1" * 2**26)
told, here = os.pipe(), os.pipe()
if os.fork() == 0:
    shared.seek(0)
    shared.read()
    os.write(told[1], b"1")
    os.read(here[0], 1)
    os._exit(0)
os.read(told[0], 1)
say("shared")
os.write(here[1], b"1")
os.wait()
say("ended")
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        yield program
        program.kill()


def after(process: subprocess.Popen[bytes], word: str, go_on: bool = True) -> None:
    """Wait until the program is as far as this, which it was told to go to."""
    assert process.stdin is not None
    assert process.stdout is not None
    if go_on:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.stdout.readline().strip() == word.encode()


def test_what_is_shared_counts_once(process: subprocess.Popen[bytes]) -> None:
    after(process, "begun", go_on=False)
    begun = held(process.pid)
    assert begun.processes == 1
    assert begun.files > 0
    after(process, "own")
    assert held(process.pid).own - begun.own == pytest.approx(64, abs=2)
    after(process, "shared")
    together = held(process.pid)
    assert together.processes == len(family(process.pid)) == 2
    assert together.own - begun.own == pytest.approx(128, abs=3)
    after(process, "ended")
    assert held(process.pid).processes == 1


def test_the_peak_is_kept_when_it_is_past() -> None:
    program = "import time; held = bytearray(b'1') * 2**26; time.sleep(1); del held; time.sleep(0.5)"
    looks: list[int] = []
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        peak = watched(process, lambda: looks.append(1))
    assert 64 < peak.own < 96
    assert len(looks) >= 2


def test_what_is_gone_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert held(process.pid).own == 0
