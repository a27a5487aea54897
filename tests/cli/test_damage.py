"""Damaged files of a run: no command reads them unnoticed, and `fit --resume` repairs the run."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import RunFolder
from fedekd.federation.checkpoint import CheckpointStore

RUN = Path("a")


def repeatable(run: Path) -> dict[str, Any]:
    """Everything of a finished run that another run must repeat."""
    summary = json.loads((run / "summary.json").read_text())
    files: dict[str, Any] = {name: (run / name).read_bytes() for name in ("metrics.csv", "config.yaml")}
    files["states"] = CheckpointStore(run / "checkpoints").digests()
    return files | {"summary": {key: value for key, value in summary.items() if key not in ("seconds", "versions")}}


def newest_manifest() -> Path:
    return max((RUN / "checkpoints").glob("manifest-*.json"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def change_digit(path: Path) -> None:
    """Change the last digit of a file that is not part of a word."""
    text = path.read_text()
    place = [match.start() for match in re.finditer(r"(?<=[.,\s]\d)\d(?=[\d,\s])", text)][-1]
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")


DAMAGE: dict[str, tuple[str, Callable[[], object]]] = {
    "manifest deleted": ("checkpoint of the last round", lambda: newest_manifest().unlink()),
    "manifest changed": ("checkpoint of round 3", lambda: replace(newest_manifest(), '"score": 0.', '"score": 1.')),
    "metrics emptied": ("a/metrics.csv", lambda: (RUN / "metrics.csv").write_bytes(b"")),
    "metrics deleted": ("a/metrics.csv", lambda: (RUN / "metrics.csv").unlink()),
    "metrics changed": ("a/metrics.csv", lambda: change_digit(RUN / "metrics.csv")),
    "summary changed": ("a/summary.json", lambda: replace(RUN / "summary.json", '"delta": 0.', '"delta": 0.1')),
    "summary cut": ("a/summary.json", lambda: (RUN / "summary.json").write_text("{")),
    "option changed": ("rounds", lambda: replace(RUN / "config.yaml", "rounds: 2", "rounds: 3")),
    "config cut": ("a/config.yaml", lambda: (RUN / "config.yaml").write_text("data: [")),
    "config deleted": ("a/config.yaml", lambda: (RUN / "config.yaml").unlink()),
    "sums deleted": ("a/SHA256SUMS", lambda: (RUN / "SHA256SUMS").unlink()),
    "sums changed": ("SHA256SUMS", lambda: (RUN / "SHA256SUMS").write_text("5  metrics.csv\n")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_damaged_finished_run_is_repaired_and_says_so(
    damage: str, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = repeatable(RUN)
    name, apply = DAMAGE[damage]
    apply()
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "nothing to do" not in printed.out
    assert re.search(rf"warning: .*{name}.*; repairing the run", printed.err), printed.err
    assert repeatable(RUN) == expected
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=RUN, check=True)
    assert main(["fit", "--resume", "a"]) == 0
    assert "nothing to do" in capsys.readouterr().out


COMMANDS = {
    "test": ["test", "a"],
    "predict": ["predict", "a", "--input=images.npz"],
    "calibrate": ["calibrate", "a"],
    "report": ["report", "a", "--output=page"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_reads_no_damaged_file(command: str, finished_run: Path, error_line: Callable[[], str]) -> None:
    np.savez("images.npz", images=np.zeros((1, 8, 8), np.uint8))
    damages = ["option changed", "config cut", "summary changed", "metrics changed", "metrics deleted"]
    count = {"test": 2, "report": 5}.get(command, 3)  # `test` compares the others itself
    shutil.copytree(RUN, "whole")
    for damage in damages[:count]:
        shutil.rmtree(RUN)
        shutil.copytree("whole", RUN)
        name, apply = DAMAGE[damage]
        apply()
        assert main(COMMANDS[command]) == 2, damage
        text = error_line()
        assert name in text
        assert "fit --resume a" in text
    assert not Path("page").exists()


@pytest.mark.parametrize("damage", ["metrics emptied", "metrics deleted", "metrics changed"])
def test_test_notices_metrics_csv(damage: str, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[damage][1]()
    assert main(["test", "a"]) == 1
    assert "metrics.csv differs from the checkpoint in line" in capsys.readouterr().out


def test_runtime_option_in_config_may_be_edited(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    config["data"]["root"] = "elsewhere"
    config["baseline_dir"] = "mine"
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "a"]) == 0
    assert main(["fit", "--resume", "a"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_run_without_its_checksums_is_read_and_sealed(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = repeatable(RUN)
    (RUN / "SHA256SUMS").unlink()
    assert main(["test", "a"]) == 0
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    assert "SHA256SUMS is missing; repairing" in capsys.readouterr().err
    assert repeatable(RUN) == expected
    assert (RUN / "SHA256SUMS").exists()


def test_unfinished_run_with_changed_config_is_refused_and_restored(
    finished_run: Path, error_line: Callable[[], str]
) -> None:
    expected = repeatable(RUN)
    (RUN / "summary.json").unlink()
    (RUN / "SHA256SUMS").write_text((RUN / "SHA256SUMS").read_text().splitlines()[0] + "\n")
    replace(RUN / "config.yaml", "seed: 0\ntask", "seed: 1\ntask")
    assert main(["fit", "--resume", "a"]) == 2
    text = error_line()
    assert "a/config.yaml: seed: expected the saved value 0, got 1" in text
    assert "or remove config.yaml and run: fit --resume a" in text
    (RUN / "config.yaml").unlink()
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    assert repeatable(RUN) == expected


def test_changed_config_before_the_first_checkpoint_is_refused(
    finished_run: Path, error_line: Callable[[], str]
) -> None:
    (RUN / "summary.json").unlink()
    shutil.rmtree(RUN / "checkpoints")
    replace(RUN / "config.yaml", "seed: 0\ntask", "seed: 1\ntask")
    assert main(["fit", "--resume", "a"]) == 2
    assert "a/config.yaml does not match SHA256SUMS. Undo the change, or start a new run" in error_line()


def test_config_of_a_finished_run_without_checkpoints_is_refused(
    finished_run: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(RUN / "checkpoints")  # as `benchmark` does
    assert main(["fit", "--resume", "a"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    replace(RUN / "config.yaml", "seed: 0\ntask", "seed: 1\ntask")
    assert main(["fit", "--resume", "a"]) == 2
    assert "a/config.yaml does not match SHA256SUMS. Undo the change" in error_line()
    assert (RUN / "summary.json").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "summary.json", "figures/delta.png"])
def test_damaged_file_without_checkpoints_is_refused_and_the_summary_kept(
    name: str, finished_run: Path, error_line: Callable[[], str]
) -> None:
    shutil.rmtree(RUN / "checkpoints")
    if name.startswith("figures"):
        (RUN / "SHA256SUMS").write_text((RUN / "SHA256SUMS").read_text() + f"{'0' * 64}  {name}\n")
    else:
        (RUN / name).write_bytes((RUN / name).read_bytes() + b"\n")
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert main(["fit", "--resume", "a"]) == 2
    line = error_line()
    assert f"a/{name} " in line
    assert "has no checkpoints" in line
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml"])
@pytest.mark.parametrize("option", ["--data.dataset=elsewhere.npz", "--seed=5", ""])
def test_repair_that_is_not_taken_up_keeps_the_summary(
    option: str, name: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not option:  # the data set is on another machine
        monkeypatch.setattr("fedekd.data.FederatedDataModule.setup", lambda *_: (_ for _ in ()).throw(UserError("no")))
    before = (RUN / "summary.json").read_bytes()
    (RUN / name).unlink()
    assert main(["fit", "--resume", "a", *option.split()]) == 2
    assert (RUN / "summary.json").read_bytes() == before
    if name == "config.yaml":  # restored from the checkpoint
        RunFolder(RUN, {}).require_intact("config.yaml", "metrics.csv", "summary.json")


PLACES = ["summary.json", "metrics.csv", "config.yaml", "SHA256SUMS", ".lock", "checkpoints/manifest-0003.json"]


@pytest.mark.parametrize("place", PLACES)
def test_directory_in_place_of_a_file_is_named(
    place: str, finished_run: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = repeatable(RUN)
    (RUN / "summary.json").unlink()
    (RUN / place).unlink(missing_ok=True)
    (RUN / place).mkdir()
    assert main(["fit", "--resume", "a", "--quiet"]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: (.*/)?a/{place}: expected a file, got a directory. Move it away and .*", text), text
    (RUN / place).rmdir()
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    assert repeatable(RUN) == expected


def test_directory_in_place_of_a_baseline_is_named(
    npz: Path,
    workdir: Path,
    fit: Callable[..., int],
    error_line: Callable[[], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit(npz, "--quiet", "--output=first") == 0
    capsys.readouterr()  # warnings on the scores
    [baseline, *_] = sorted(Path("runs/local").iterdir())
    baseline.unlink()
    baseline.mkdir()
    assert fit(npz, "--quiet", "--output=second") == 2
    assert f"{baseline}: expected a file, got a directory" in error_line()
    baseline.rmdir()
    assert fit(npz, "--quiet", "--output=second") == 0
    assert (Path("first/metrics.csv")).read_bytes() == Path("second/metrics.csv").read_bytes()


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "name"), [(100, "config.yaml"), (20_000, r"runs/local/\w+\.pt"), (50_000, r"states-0001\.bin")]
)
def test_file_size_limit_names_the_file_and_loses_nothing(
    size: int,
    name: str,
    npz: Path,
    workdir: Path,
    fit: Callable[..., int],
    error_line: Callable[[], str],
    file_size_limit: Callable[[int], None],
    trained_run: Path,
) -> None:
    if "states" in name:
        shutil.copytree(trained_run.parent / "local", "runs/local")
    file_size_limit(size)
    assert fit(npz, "--quiet", "--output=a", "--data.download=false", rounds=2) == 2
    file_size_limit(resource.RLIM_INFINITY)
    text = error_line()
    assert re.search(rf"file size limit reached while writing \S*{name}; finished work is kept: raise", text), text
    assert not list(workdir.rglob("*.tmp"))
    resume = ["fit", "--resume", "a", "--quiet"]
    assert (main(resume) if (RUN / "config.yaml").exists() else fit(npz, "--quiet", "--output=a", rounds=2)) == 0
    assert (RUN / "metrics.csv").read_bytes() == (trained_run / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_file_size_limit_in_worker_processes_names_the_file(
    npz: Path,
    workdir: Path,
    fit: Callable[..., int],
    error_line: Callable[[], str],
    file_size_limit: Callable[[int], None],
) -> None:
    engine = ("--quiet", "--engine=MultiProcess", "--engine.processes=1")
    for size, name in ((4_000, r"fedekd-\w+/inputs"), (20_000, r"\.pt")):
        file_size_limit(size)
        assert fit(npz, *engine, "--output=a") == 2
        file_size_limit(resource.RLIM_INFINITY)
        text = error_line()
        assert re.search(rf"file size limit reached while writing \S*{name}; finished work is kept", text), text
        shutil.rmtree(RUN)


def test_drafts_of_killed_processes_are_removed(finished_run: Path) -> None:
    (RUN / "summary.json").unlink()
    drafts = [RUN / ".metrics.csv.1-2.tmp", RUN / "figures/.partition.png.1-2.tmp", RUN / "checkpoints/.x.pt.1-2.tmp"]
    (RUN / "figures").mkdir(exist_ok=True)
    for draft in drafts:
        draft.write_bytes(b"half")
    (RUN / "checkpoints/manifest-0003.json").unlink()
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    assert not list(RUN.rglob("*.tmp"))


def test_draft_in_a_new_folder_does_not_block_the_command(npz: Path, workdir: Path, fit: Callable[..., int]) -> None:
    RUN.mkdir()
    (RUN / ".config.yaml.0123abcd.tmp").write_bytes(b"seed")  # killed before the first rename
    assert fit(npz, "--quiet", "--output=a") == 0
    assert not list(RUN.rglob("*.tmp"))


def test_report_with_a_damaged_list_of_files_is_written(finished_run: Path) -> None:
    assert main(["report", "a", "--output=page"]) == 0
    Path("page/tables/mine").mkdir()
    Path("page/files.txt").write_bytes(b"tables/mine\ntables/a\0.csv\n\xff\ntables/../../b.csv\n")
    Path("b.csv").touch()
    assert main(["report", "a", "--output=page"]) == 0
    assert Path("b.csv").exists()


def test_sums_list_the_figures(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(folder: RunFolder, *arguments: Any) -> None:
        (folder.folder / "figures").mkdir(exist_ok=True)
        (folder.folder / "figures/delta.png").write_bytes(b"png")

    monkeypatch.setattr(RunFolder, "write_figures", draw)
    (RUN / "summary.json").unlink()
    assert main(["fit", "--resume", "a", "--quiet"]) == 0
    names = [line.split("  ")[1] for line in (RUN / "SHA256SUMS").read_text().splitlines()]
    assert names == ["config.yaml", "metrics.csv", "figures/delta.png", "summary.json"]
