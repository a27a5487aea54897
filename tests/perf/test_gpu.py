"""`make gpu`: its contenders train the same weights, its table shows what there is, and finished parts are skipped."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fedekd.modules import TrainerFactory
from perf import gpu
from perf.captured import PHASES, Captured, Phase, Stacked, Steps, Streams
from perf.setting import Workload, make_setting


@pytest.fixture
def setting() -> Workload:
    trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1)
    return make_setting(trainer, root="nowhere", samples=600)


def steps(setting: Workload, phase: Phase, number: int) -> Steps:
    networks: dict[str, nn.Module] = {role: setting.spec.build_model(role, number) for role in ("private", "proxy")}
    return Steps(setting, phase, networks, torch.arange(8) + 8 * number)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_contenders_have_the_same_losses(setting: Workload, phase: Phase) -> None:
    order = torch.tensor([[0, 3, 2, 1], [7, 4, 5, 6], [1, 2, 4, 7]])

    def clients() -> list[Steps]:
        return [steps(setting, phase, number) for number in range(2)]

    losses = []
    for contender in (Streams(clients()), Captured(Streams(clients()), order), Stacked(clients())):
        contender.begin()
        losses.append(contender.epoch(order))
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=1e-6)
    assert losses[0][0] != losses[0][2]


def make_session(output: Path, seconds: float = 600) -> gpu.Session:
    return gpu.Session(output, output, output, time.monotonic() + seconds, 2, 2, rehearsal=True)


def test_table_without_results_names_every_part(tmp_path: Path) -> None:
    text = gpu.table(make_session(tmp_path))
    assert text.count("not run") == len(gpu.PARTS)
    assert "torch" in text


def test_table_shows_failing_tests(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    failures = [["test_x", "assert 1 == 2\nwhere", "tests/gpu/test_x.py:3: AssertionError"]]
    session.keep("tests", {"code": 1, "passed": 3, "failed": 1, "skipped": 0, "failures": failures})
    text = gpu.table(session)
    assert "3 passed, 1 failed, 0 skipped" in text
    assert "- `test_x`: assert 1 == 2 where (tests/gpu/test_x.py:3: AssertionError)" in text
    assert not gpu.is_done("tests", session.found("tests"))


def test_finished_part_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"code": 0, "passed": 3, "failed": 0, "skipped": 0, "failures": []}
    (tmp_path / "tests.json").write_text(json.dumps(found))
    assert gpu.main(["--output", str(tmp_path), "--only", "tests", "--rehearsal"]) == 0
    assert "tests: done before" in capsys.readouterr().out
    assert "3 passed" in (tmp_path / "gpu.md").read_text()


def test_part_is_left_out_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--output", str(tmp_path), "--minutes", "0.1", "--rehearsal"])
    assert capsys.readouterr().out.count("no time left") == len(gpu.PARTS)


def test_command_over_its_limit_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    assert make_session(tmp_path).call(["sleep", "60"], limit=1) == -1
    assert time.monotonic() - began < 10
    assert "$ sleep 60" in (tmp_path / "log.txt").read_text()


def test_packed_files_are_unpacked_once(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    with gzip.open(raw / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"labels")
    gpu.unpack(tmp_path)
    assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == b"labels"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"kept")
    gpu.unpack(tmp_path)
    assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == b"kept"
