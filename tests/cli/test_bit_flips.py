"""One flipped bit in any file that is read back: detected, repaired or harmless, and never a traceback.

`FEDEKD_FLIPS=3000 pytest -s tests/cli/test_bit_flips.py` tries 3,000 bits, of which every tenth goes through whole
commands, and prints the counts; `FEDEKD_FLIPS_SEED` draws others.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml

from fedekd.cli import main
from fedekd.early_exit.policy_files import load_policy
from fedekd.errors import UserError
from fedekd.federation import RunFolder
from fedekd.federation.checkpoint import CheckpointStore, pack
from fedekd.federation.engines.worker import DamagedStateError, StateStore
from fedekd.federation.local_baseline import _read
from fedekd.federation.run_folder import RUNTIME_OPTIONS, first_difference
from fedekd.reporting import read_metrics_csv

FLIPS = int(os.environ.get("FEDEKD_FLIPS", "120"))
SEED = int(os.environ.get("FEDEKD_FLIPS_SEED", "0"))
#: Every flip is read by the functions that the commands call; one of so many by the commands themselves.
COMMAND_EVERY = 10 if FLIPS > 120 else 12

DETECTED, REPAIRED, HARMLESS = "detected", "repaired", "harmless"
CLIENTS, LAST = 2, 3


def command(*arguments: str) -> tuple[int, str]:
    """Run a command; return its exit code and its errors, which must be one line if it fails."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = main([*arguments])
    lines = errors.getvalue().splitlines()
    assert "Traceback" not in errors.getvalue()
    assert code != 2 or (lines[-1].startswith("error: ") and len(lines[-1]) < 500), lines
    return code, errors.getvalue()


def results(run: Path) -> dict[str, Any]:
    """Metrics, summary and final states of a finished run."""
    summary = json.loads((run / "summary.json").read_text())
    files: dict[str, Any] = {"states": CheckpointStore(run / "checkpoints").digests()}
    files["metrics.csv"] = (run / "metrics.csv").read_bytes()
    return files | {"summary": {key: value for key, value in summary.items() if key not in ("seconds", "versions")}}


class World:
    """A finished and an unfinished run, local baselines, and states of clients."""

    def __init__(self, root: Path, npz: Path) -> None:
        self.root, self.npz = root, npz
        self.finished, self.unfinished = root / "finished", root / "unfinished"
        self.local, self.states, self.other = root / "local", root / "states", root / "other"
        self.table, self.predictions = self.finished / "exits/clients.csv", root / "predictions.csv"
        assert self.fit(self.finished)[0] == 0
        shutil.copytree(self.finished, self.unfinished)
        for path in (self.unfinished / "checkpoints").glob(f"*-{LAST:04d}.*"):
            path.unlink()
        (self.unfinished / "summary.json").unlink()
        sums = self.unfinished / "SHA256SUMS"  # as before the end of a run: of config.yaml only
        sums.write_text(sums.read_text().splitlines()[0] + "\n")
        assert command("calibrate", str(self.finished), "--target_risk=0.3", "--confidence=0.6")[0] == 0
        (self.finished / "figures").mkdir()
        (self.finished / "figures/delta.png").write_bytes(b"png" * 100)
        self.states.mkdir()
        checkpoint, _ = CheckpointStore(self.finished / "checkpoints").load()
        assert checkpoint is not None
        for number, state in checkpoint.clients.items():
            StateStore(self.states).write(number, 1, state)
        np.savez(root / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
        assert self.predict() == 0
        self.expected, self.values = results(self.finished), self.read(self.finished)
        self.predicted, self.rows = self.predictions.read_bytes(), self.table.read_bytes()
        self.baselines = {path: pack(vars(_read(path)[0])) for path in self.local.iterdir()}
        self.content = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.files = [
            path
            for path in sorted(self.content)
            if self.content[path] and path not in (npz, root / "images.npz", self.predictions)
        ]

    def fit(self, output: Path) -> tuple[int, str]:
        options = ["--method=SafeKD", "--client.exits=2", "--client.local_epochs=1", "--client.optimizer.lr=0.002"]
        options += ["--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet", "--rounds=2"]
        options += [f"--data.num_clients={CLIENTS}", "--data.alpha=50", "--data.batch_size=64"]
        return command(
            "fit", f"--data.dataset={self.npz}", f"--output={output}", f"--baseline_dir={self.local}", *options
        )

    def predict(self) -> int:
        options = [f"--input={self.root}/images.npz", f"--output={self.predictions}", "--client=0"]
        return command("predict", str(self.finished), *options)[0]

    def read(self, run: Path) -> dict[str, Any]:
        """Everything that commands read from a finished run and do not compute again."""
        checkpoint, _ = CheckpointStore(run / "checkpoints").load()
        assert checkpoint is not None
        return {
            "config": yaml.safe_load((run / "config.yaml").read_bytes()),
            "summary": json.loads((run / "summary.json").read_bytes()),
            "metrics": read_metrics_csv(run / "metrics.csv"),
            "policies": [load_policy(run, number) for number in range(CLIENTS)],
            "states": pack([checkpoint.server, *checkpoint.clients.values()]),
            "notes": checkpoint.notes,
        }

    def restore(self) -> None:
        """Undo what a flip and the commands after it changed."""
        shutil.rmtree(self.other, ignore_errors=True)
        for path in self.root.rglob("*"):
            if path.is_file() and path not in self.content:
                path.unlink()
        for path, content in self.content.items():
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def check_read(self, path: Path) -> str:
        """Read a changed file as the commands do."""
        if path.is_relative_to(self.states):
            number, version = (int(part) for part in path.stem.split("-")[1:])
            with pytest.raises(DamagedStateError, match=path.name):
                StateStore(self.states).read(number, version)
            return DETECTED
        if path.is_relative_to(self.local):
            baseline, state = _read(path)
            assert (baseline.scores, state) == ([], None)  # trained again
            return DETECTED
        run = self.finished if path.is_relative_to(self.finished) else self.unfinished
        folder, warnings = RunFolder(run, {}), list[str]()
        try:
            folder.require_intact("config.yaml")
            is_complete = folder.is_complete(warnings.append)
            if run == self.unfinished:
                checkpoint, warnings = folder.checkpoints.load()
                assert checkpoint is not None or warnings
            elif is_complete:
                values = self.read(run)
                assert first_difference(self.values.pop("config"), values.pop("config"), RUNTIME_OPTIONS) is None
                assert values == self.values
        except UserError:
            return DETECTED
        return DETECTED if warnings else HARMLESS

    def check_commands(self, path: Path) -> str:
        """Run the commands that read a changed file."""
        if path.is_relative_to(self.local):
            code, _ = self.fit(self.other)
            assert (code, results(self.other)) == (0, self.expected)
            return REPAIRED
        if path.is_relative_to(self.unfinished):
            code, errors = command("fit", "--resume", str(self.unfinished), "--quiet")
            if code == 2:
                return DETECTED
            assert results(self.unfinished) == self.expected
            return REPAIRED if errors else HARMLESS
        self.predictions.unlink()
        if (code := self.predict()) == 0:
            assert self.predictions.read_bytes() == self.predicted
        if path.parent == self.table.parent:
            if path == self.table:
                assert (
                    command("calibrate", str(self.finished), "--target_risk=0.3", "--confidence=0.6", "--client=0")[0]
                    == 0
                )
                assert self.table.read_bytes() == self.rows
            return DETECTED if code else HARMLESS
        tested, _ = command("test", str(self.finished))
        code, errors = command("fit", "--resume", str(self.finished), "--quiet")
        if code == 2:  # a runtime option, which may be edited, has no valid value
            assert "config.yaml" in errors
            assert path.name == "config.yaml"
            return DETECTED
        assert results(self.finished) == self.expected
        if tested == 0:
            assert not errors.strip() or "figures/" in errors or "SHA256SUMS" in errors
        return REPAIRED if errors else HARMLESS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_blobs: Callable[..., Path]) -> World:
    folder = tmp_path_factory.mktemp("flips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_figures", lambda *arguments: None)
        return World(folder, write_blobs(folder / "blobs.npz", num_samples=400))


@pytest.mark.timeout(36_000)
def test_flipped_bit_changes_no_number_unseen(world: World, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    rng, counts, failures = Random(SEED), Counter[str](), list[str]()
    values = dict(world.values)
    for index in range(FLIPS):
        path = world.files[index % len(world.files)]
        content = bytearray(world.content[path])
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        world.values = dict(values)
        has_command = not path.is_relative_to(world.states) and index // len(world.files) % COMMAND_EVERY == 0
        has_command = has_command and (FLIPS > 120 or index % COMMAND_EVERY == 0)
        name = f"{path.relative_to(world.root)}, bit {bit}"
        try:
            outcome = world.check_commands(path) if has_command else world.check_read(path)
            counts[f"{'commands' if has_command else 'read'}, {outcome}"] += 1
        except AssertionError as error:
            failures.append(f"changed unseen: {name}: {str(error)[:300]}")
        except BaseException as error:
            failures.append(f"traceback: {name}: {type(error).__name__} {str(error)[:300]}")
        finally:
            with suppress(OSError):
                world.restore()
    with capsys.disabled():
        if FLIPS > 120:
            print(f"\n{FLIPS} flips of seed {SEED} in {len(world.files)} files: {dict(counts)}, failures: {failures}")
    assert not failures
    assert sum(counts.values()) == FLIPS
