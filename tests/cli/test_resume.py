"""`fit --resume` and `test`: on finished, interrupted and damaged runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedekd.atomic import seal_json, unseal_json
from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import RunFolder


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def truncate_last_checkpoint(run: Path) -> None:
    path = max((run / "checkpoints").glob("states-*.bin"))
    path.write_bytes(path.read_bytes()[:1000])


def test_test_reproduces_summary_or_names_difference(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "a"]) == 0
    assert "the same as summary.json, to the last digit" in capsys.readouterr().out
    summary = json.loads(Path("a/summary.json").read_text())
    summary["mean"] += 1e-3
    Path("a/summary.json").write_text(json.dumps(summary))
    assert main(["test", "a"]) == 1
    assert "differs from summary.json: mean was" in capsys.readouterr().out


def test_resume_finished_run_changes_no_file(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert main(["fit", "--resume", "a"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    Path("resume.yaml").write_text("resume: a\n")
    assert main(["fit", "--config=resume.yaml"]) == 0
    assert "a is finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_resume_without_checkpoint_trains_from_the_start(finished_run: Path) -> None:
    expected = Path("a/metrics.csv").read_bytes()
    remove(*Path("a/checkpoints").iterdir(), Path("a/summary.json"), Path("a/metrics.csv"))
    assert main(["fit", "--resume", "a"]) == 0
    assert Path("a/metrics.csv").read_bytes() == expected


def test_resume_finished_run_with_damaged_checkpoint_trains_last_round_again(
    finished_run: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    expected = Path("a/metrics.csv").read_bytes()
    truncate_last_checkpoint(finished_run)
    np.savez("images.npz", images=np.zeros((1, 8, 8), np.uint8))
    for command in (["test", "a"], ["predict", "a", "--input=images.npz", "--client=0"]):
        assert main(command) == 2
        text = error_line()
        assert "is corrupt" in text
        assert "fit --resume a" in text
    assert main(["fit", "--resume", "a"]) == 0
    warning = capsys.readouterr().err
    assert "the checkpoint of round 3 is corrupt" in warning
    assert "round 2" in warning
    assert Path("a/metrics.csv").read_bytes() == expected
    assert main(["test", "a"]) == 0
    remove(*Path("a/checkpoints").iterdir())
    capsys.readouterr()
    assert main(["test", "a"]) == 2
    assert "no checkpoint of the last round" in error_line()


def test_resume_unfinished_run_with_truncated_checkpoint_gives_same_result(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Path("a/metrics.csv").read_bytes()
    remove(Path("a/summary.json"))
    truncate_last_checkpoint(finished_run)
    assert main(["fit", "--resume", "a"]) == 0
    warning = capsys.readouterr().err
    assert "corrupt" in warning
    assert "round 2" in warning
    assert Path("a/metrics.csv").read_bytes() == expected


def test_locked_run_folder_is_refused_and_unchanged(
    npz: Path, finished_run: Path, fit: Callable[..., int], error_line: Callable[[], str]
) -> None:
    remove(Path("a/summary.json"))
    Path("b").mkdir()
    before = sorted(finished_run.rglob("*"))
    with RunFolder(Path("a"), {}).lock(), RunFolder(Path("b"), {}).lock():
        assert main(["fit", "--resume", "a", "--quiet"]) == 2
        assert "locked by another process" in error_line()
        assert fit(npz, "--output=b", "--quiet") == 2
        assert "locked by another process" in error_line()
        assert not list(Path("b").glob("[!.]*"))  # kept: the folder belongs to the other process
    assert [path for path in before if not path.exists()] == []
    assert main(["fit", "--resume", "a", "--quiet"]) == 0


def test_run_folder_of_another_process_is_not_removed(npz: Path, workdir: Path, fit: Callable[..., int]) -> None:
    def fail() -> None:
        with RunFolder(Path("a/b"), {"seed": 0}).lock():
            if not Path("a/b/thesis.txt").exists():
                assert fit(npz, "--output=a/b", "--quiet") == 2
                assert Path("a/b/config.yaml").exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(Path("a/b").iterdir()) == []
    Path("a/b/thesis.txt").write_text("years of work")
    with pytest.raises(KeyError):
        fail()
    assert {path.name for path in Path("a/b").iterdir()} == {".lock", "thesis.txt"}


def test_run_that_failed_removes_only_its_files_and_can_be_repeated(
    npz: Path, workdir: Path, fit: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        Path("a/local").mkdir(parents=True, exist_ok=True)
        Path("a/local/baseline.pt").write_bytes(b"hours")
        Path("a/logger.csv").write_text("rows")
        raise UserError("no")

    with monkeypatch.context() as patched:
        patched.setattr("fedekd.federation.Orchestrator._train_baselines", fail)
        for _ in range(2):
            assert fit(npz, "--output=a", "--baseline_dir=a/local", "--quiet") == 2
            files = {str(path) for path in Path("a").rglob("*") if path.is_file()}
            assert files == {"a/.lock", "a/local/baseline.pt", "a/logger.csv"}
    assert fit(npz, "--output=a", "--baseline_dir=a/local", "--quiet") == 0
    assert Path("a/local/baseline.pt").read_bytes() == b"hours"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"mean": ' + "9" * 5001 + "}"], ids=["levels", "digits"])
@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "manifest"])
def test_resume_file_of_extreme_json_is_damaged(
    name: str, content: str, finished_run: Path, error_line: Callable[[], str]
) -> None:
    path = max(Path("a/checkpoints").glob("manifest-*.json")) if name == "manifest" else Path("a") / name
    path.write_text(content)
    assert main(["test", "a"]) == 2
    assert len(error_line()) <= 400
    if name == "summary.json":
        with pytest.raises(UserError, match=r"summary\.json is corrupt"):
            _ = RunFolder(Path("a"), {}).summary


def test_resume_changed_option_is_named(finished_run: Path, error_line: Callable[[], str]) -> None:
    remove(Path("a/summary.json"))
    assert main(["fit", "--resume", "a", "--method.beta=3"]) == 2
    assert "method.init_args.beta: expected the saved value 1.0, got 3.0" in error_line()
    config = Path("a/config.yaml").read_text()
    Path("a/config.yaml").write_text(config.replace("rounds: 2", "rounds: 4"))
    assert main(["fit", "--resume", "a"]) == 2
    assert "rounds: expected the saved value 2, got 4" in error_line()


def test_resume_runtime_options_may_change(finished_run: Path) -> None:
    remove(Path("a/summary.json"), *Path("a").glob("figures/*"))
    options = ["--data.root=x", "--data.download=true", "--baseline_dir=y", "--trainer.device=1"]
    assert main(["fit", "--resume", "a", *options, "--logger=CSVLogger", "--logger.save_dir=logs"]) == 0
    assert list(Path("logs").rglob("metrics.csv"))
    remove(Path("a/summary.json"), *Path("a/checkpoints").iterdir())
    assert main(["fit", "--resume", "a", *options]) == 0
    assert list(Path("y").rglob("*"))


def test_resume_with_output_is_refused(finished_run: Path, error_line: Callable[[], str]) -> None:
    assert main(["fit", "--resume", "a", "--output", "b"]) == 2
    assert "--output: expected none with --resume a, got 'b'" in error_line()


def test_damaged_summary_is_named_and_written_again(finished_run: Path, error_line: Callable[[], str]) -> None:
    finished_run.rename("a b")
    for junk in ("{", "5", "\udcff"):
        Path("a b/summary.json").write_text(junk, errors="surrogateescape")
        assert main(["test", "a b"]) == 2
        text = error_line()
        assert "summary.json is corrupt" in text
        assert "fit --resume 'a b'" in text
    assert main(["fit", "--resume", "a b", "--quiet"]) == 0
    assert main(["test", "a b"]) == 0


def test_checkpoint_without_a_newer_option_is_accepted(finished_run: Path) -> None:
    manifest = max(Path("a/checkpoints").glob("manifest-*.json"))
    content = unseal_json(manifest.read_bytes())
    for part in (content["notes"]["config"]["client"], content["notes"]["identity"]["spec"]["client"]):
        del part["lr_decay"]
    manifest.write_bytes(seal_json(content))
    assert main(["test", "a"]) == 0
    content["notes"]["config"]["client"]["local_epochs"] = 7  # known options are still compared
    manifest.write_bytes(seal_json(content))
    assert main(["test", "a"]) == 2
