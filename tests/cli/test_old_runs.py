"""A run of another version of fedekd ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedekd.atomic import seal_json, unseal_json
from fedekd.cli import main


@pytest.fixture
def old_run(finished_run: Path) -> Path:
    """A finished run whose checkpoints have another format."""
    for path in (finished_run / "checkpoints").glob("manifest-*.json"):
        path.write_bytes(seal_json({**unseal_json(path.read_bytes()), "format": 2}))
    return finished_run


@pytest.mark.parametrize(
    "command",
    ["test a", "fit --resume a", "predict a --input blobs.npz --client 0", "export a --format torch --client 0"],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda run: None,
        lambda run: (run / "summary.json").unlink(),
        lambda run: (run / "metrics.csv").write_text("round\n"),
    ],
    ids=["finished", "unfinished", "damaged"],
)
def test_run_of_another_version_is_refused_in_one_line(
    command: str, change: Callable[[Path], object], old_run: Path, error_line: Callable[[], str]
) -> None:
    change(old_run)
    before = {path: path.read_bytes() for path in old_run.rglob("*.*") if path.name != ".lock"}
    assert main(command.split()) == 2
    line = error_line()
    is_unfinished = not (old_run / "summary.json").exists() and not command.startswith("fit")
    expected = "expected a finished run" if is_unfinished else "expected format 5, got 2. Another version of fedekd"
    assert expected in line
    assert {path: path.read_bytes() for path in old_run.rglob("*.*") if path.name != ".lock"} == before
