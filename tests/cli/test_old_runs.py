"""Runs of an earlier version are tested, resumed and used for predictions.

`old_run/run` was written by commit 76b097c, before there were tables, sites and other metrics than accuracy:
`fit --data.dataset blobs.npz --data.num_clients 2 --data.alpha 1 --rounds 1 --client.local_epochs 1
--client.private_model tiny.Tiny --client.proxy_model tiny.Tiny --logger null --trainer.accelerator cpu
--trainer.threads 1 --trainer.precision 32-true --output run --baseline_dir local`. Its figures were removed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedekd.cli import main
from fedekd.configuration.load_run import parse_run
from fedekd.configuration.options import as_values, do_no_harm_rule, federation_parser
from fedekd.federation import RunFolder
from fedekd.federation.run_folder import drop_unknown_keys

#: Values of a summary that may differ between machines.
_UNREPEATABLE = {"seconds", "versions"}


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(Path(__file__).with_name("old_run"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "run"


def test_test_old_run_reproduces_its_summary(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "run"]) == 0, capsys.readouterr()
    assert "the same as summary.json, to the last digit" in capsys.readouterr().out


def test_resume_old_run_repeats_its_last_round(old_run: Path, undrawn: None) -> None:
    before = json.loads((old_run / "summary.json").read_text())
    for name in ("summary.json", "checkpoints/manifest-0002.json"):
        (old_run / name).unlink()
    assert main(["fit", "--resume", "run"]) == 0
    after = json.loads((old_run / "summary.json").read_text())
    assert {name: after[name] for name in before.keys() - _UNREPEATABLE - {"clients"}} == {
        name: value for name, value in before.items() if name not in _UNREPEATABLE | {"clients"}
    }
    for client, expected in zip(after["clients"], before["clients"], strict=True):
        assert {name: client[name] for name in expected} == expected


def test_predict_old_run_gives_a_class_per_image(old_run: Path) -> None:
    with np.load("blobs.npz") as file:
        np.savez("images.npz", images=file["train_images"][:5])
    assert main(["predict", "run", "--input=images.npz", "--client=0", "--output=classes.csv"]) == 0
    assert len(Path("classes.csv").read_text().splitlines()) == 6


def test_identity_of_an_old_run_is_unchanged(old_run: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    identities = []
    monkeypatch.setattr(RunFolder, "restore", lambda self, identity: identities.append(identity) or (None, []))
    shutil.rmtree(old_run / "checkpoints")
    config = old_run.rename("old") / "config.yaml"
    assert main(["fit", f"--config={config}", "--output=new", "--quiet"]) == 0
    expected = json.loads((Path(__file__).parent / "old_run/run/checkpoints/manifest-0001.json").read_text())
    # Options that were added since are not compared on resume.
    assert drop_unknown_keys(expected["notes"]["identity"], identities[0]) == expected["notes"]["identity"]


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (True, ("sign", "holdout", 0.9)),
        ({"confidence": 0.8, "margin": 0.0}, ("sign", "holdout", 0.8)),
        ({"confidence": 0.8, "test": "unconditional", "splits": "held_out"}, ("unconditional", "held_out", 0.8)),
    ],
)
def test_parse_run_keeps_the_test_of_do_no_harm(saved: Any, expected: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"do_no_harm": saved, "data": {"dataset": "digits"}}))
    rule = do_no_harm_rule(as_values(federation_parser(), parse_run(federation_parser(), tmp_path))["do_no_harm"])
    assert rule is not None
    assert (rule.test, rule.splits, rule.confidence) == expected


def test_parse_run_without_do_no_harm_adds_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"do_no_harm": None, "data": {"dataset": "digits"}}))
    assert parse_run(federation_parser(), tmp_path).do_no_harm is None


@pytest.mark.parametrize(("saved", "variant"), [({}, "paper"), ({"variant": "corrected"}, "corrected")])
def test_parse_run_of_cafedistill_keeps_its_variant(saved: dict[str, str], variant: str, tmp_path: Path) -> None:
    """Runs of before have no `variant`, whose default is not what they ran."""
    method = {"class_path": "fedekd.methods.CAFEDistill", "init_args": {"schedule": "progressive", **saved}}
    (tmp_path / "config.yaml").write_text(json.dumps({"method": method, "data": {"dataset": "digits"}}))
    config = parse_run(federation_parser(), tmp_path, ["--rounds=3"])
    assert (config.method.init_args.variant, config.rounds) == (variant, 3)
