"""A run of another version of fedekd ends in one line.

`old_run/run` was written by commit 76b097c, before there were tables, sites and other metrics than accuracy:
`fit --data.dataset blobs.npz --data.num_clients 2 --data.alpha 1 --rounds 1 --client.local_epochs 1
--client.private_model tiny.Tiny --client.proxy_model tiny.Tiny --logger null --trainer.accelerator cpu
--trainer.threads 1 --trainer.precision 32-true --output run --baseline_dir local`. Its figures and states were removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedekd.atomic import unseal_json
from fedekd.cli import main


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(Path(__file__).with_name("old_run"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "run"


def without_checksums(run: Path) -> None:
    """Change the run to the layout before there were formats and checksums."""
    (run / "SHA256SUMS").unlink()
    for path in (run / "checkpoints").glob("manifest-*.json"):
        content = unseal_json(path.read_bytes())
        del content["format"]
        path.write_text(json.dumps(content, indent=1))


@pytest.mark.parametrize(
    "command",
    [
        "test run",
        "fit --resume run",
        "predict run --input blobs.npz --client 0",
        "export run --format torch --client 0",
    ],
)
@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda run: None, "2"),
        (without_checksums, "none"),
        (lambda run: (run / "summary.json").unlink(), "2"),
        (lambda run: (run / "metrics.csv").write_text("round\n"), "2"),
    ],
    ids=["finished", "no checksums", "unfinished", "damaged"],
)
def test_run_of_another_version_is_refused_in_one_line(
    command: str, change: Callable[[Path], object], layout: str, old_run: Path, error_line: Callable[[], str]
) -> None:
    change(old_run)
    before = {path: path.read_bytes() for path in old_run.rglob("*.*") if path.name != ".lock"}
    assert main(command.split()) == 2
    line = error_line()
    is_unfinished = not (old_run / "summary.json").exists() and not command.startswith("fit")
    expected = (
        "expected a finished run" if is_unfinished else f"expected format 5, got {layout}. Another version of fedekd"
    )
    assert expected in line
    assert {path: path.read_bytes() for path in old_run.rglob("*.*") if path.name != ".lock"} == before
