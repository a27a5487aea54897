"""Option `--do_no_harm` on the command line, in files, on resume and in later commands."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedekd.cli import main
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.do_no_harm import DoNoHarm
from fedekd.early_exit import ExitPolicy, network_fingerprint
from fedekd.early_exit.scoring import network_input

SAFE = ("--method=SafeKD", "--client.exits=2", "--client.optimizer.lr=0.002")
NEVER = "--do_no_harm.confidence=0.999999999"


def fit(npz: Path, *options: str, rounds: int = 1) -> int:
    data = [f"--data.dataset={npz}", "--data.num_clients=3", "--data.alpha=5", "--data.batch_size=16"]
    fast = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null"]
    return main(["fit", *fast, *data, f"--rounds={rounds}", *options])


def parsed_rule(*options: str) -> Any:
    parser = federation_parser()
    return build_parts(parser, parse(parser, ["--data.dataset=digits", *options]))["do_no_harm"]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], None),
        (["--do_no_harm.confidence", "0.9", "--do_no_harm.margin", "0.02"], DoNoHarm(0.9, 0.02)),
        (["--do_no_harm.confidence=0.8"], DoNoHarm(0.8)),
        (["--do_no_harm.rule=better"], DoNoHarm(rule="better")),
        (["--do_no_harm.looks=2", "--do_no_harm.clip=4"], DoNoHarm(looks=2, clip=4.0)),
        (["--do_no_harm", "{confidence: 0.8, rule: better}"], DoNoHarm(0.8, rule="better")),
        (["--do_no_harm.test=sign", "--do_no_harm.splits=holdout"], DoNoHarm(test="sign", splits="holdout")),
        (["--do_no_harm={}"], DoNoHarm()),
        (["--do_no_harm=null"], None),
        (["--do_no_harm", "true"], DoNoHarm()),  # as in the help text
        (["--do_no_harm=true", "--do_no_harm.confidence=0.8"], DoNoHarm(0.8)),
        (["--do_no_harm=false"], None),
    ],
)
def test_option_forms_are_parsed(options: list[str], rule: DoNoHarm | None, workdir: Path) -> None:
    assert parsed_rule(*options) == rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("null", None),
        ("{}", DoNoHarm()),
        ("{confidence: 0.8, margin: 0.01}", DoNoHarm(0.8, 0.01)),
        ("{rule: better}", DoNoHarm(rule="better")),
        ("true", DoNoHarm()),
        ("false", None),
    ],
)
def test_configuration_file_forms_are_parsed(text: str, rule: DoNoHarm | None, workdir: Path) -> None:
    Path("own.yaml").write_text(f"do_no_harm: {text}\n")
    assert parsed_rule("--config=own.yaml") == rule
    if rule is not None:
        assert parsed_rule("--config=own.yaml", "--do_no_harm.confidence=0.7").confidence == 0.7
        assert parsed_rule("--config=own.yaml", "--do_no_harm=null") is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--do_no_harm.confidence=2", "do_no_harm.confidence: expected a number in [1e-9, 1 - 1e-9], got 2.0"),
        ("--do_no_harm.confidence=abc", "--do_no_harm.confidence: expected a number, got 'abc'"),
        ("--do_no_harm.confidence=nan", "--do_no_harm.confidence: expected a finite number, got 'nan'"),
        ("--do_no_harm.confidence=null", "--do_no_harm.confidence: expected a value, got null"),
        ("--do_no_harm.margin=-0.1", "do_no_harm.margin: expected at least 0, got -0.1"),
        ("--do_no_harm.rule=beter", "--do_no_harm.rule: expected one of 'certified', 'better', got 'beter'"),
        ("--do_no_harm.looks=0", "do_no_harm.looks: expected at least 1, got 0"),
        ("--do_no_harm.looks=1.5", "--do_no_harm.looks: expected a whole number, got '1.5'"),
        ("--do_no_harm.looks=2", "do_no_harm.looks: expected at most 1 (rounds), got 2"),
        ("--do_no_harm.clip=0", "do_no_harm.clip: expected a finite number above 0, got 0.0"),
        ("--do_no_harm.confidnece=0.9", "Did you mean 'confidence'"),
        ("--do_no_harm={confidnece: 0.9}", "Did you mean 'confidence'"),
        ("--do-no-harm=true", "--do-no-harm: unknown option. Did you mean --do_no_harm?"),
        ("--do_no_harm=maybe", "--do_no_harm: expected true, false or arguments"),
        ("--do_no_harm=0.1", "--do_no_harm: expected"),
    ],
)
def test_fit_invalid_option_prints_one_line_error(
    option: str, words: str, npz: Path, workdir: Path, error_line: Callable[[], str]
) -> None:
    assert fit(npz, option, "--output=a") == 2
    assert words in error_line()
    assert not Path("a").exists()


@pytest.mark.parametrize("method", ["Local", "FedType"])
def test_fit_unsupported_method_raises(method: str, npz: Path, workdir: Path, error_line: Callable[[], str]) -> None:
    assert fit(npz, f"--method={method}", "--do_no_harm.confidence=0.9", "--output=a") == 2
    assert f"{method}" in error_line()


def test_fit_stores_repeats_and_resumes_the_rule(
    npz: Path, workdir: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    options = ("--do_no_harm.confidence=0.9", "--do_no_harm.margin=0.02")
    assert fit(npz, *options, "--output=a", rounds=2) == 0
    printed = capsys.readouterr().out
    assert "do no harm: confidence 0.9, margin 0.02" in printed
    assert "deployed" in printed
    rule = {"confidence": 0.9, "margin": 0.02, "rule": "certified", "looks": 1, "clip": 1.0}
    rule |= {"test": "unconditional", "splits": "held_out", "candidates": [], "metric": "accuracy", "unit": "group"}
    assert yaml.safe_load(Path("a/config.yaml").read_text())["do_no_harm"] == rule
    summary = json.loads(Path("a/summary.json").read_text())
    assert summary["deployed"]["rule"] == rule
    assert {"deployed", "samples", "worse", "better", "p_value", "level"} <= set(summary["clients"][0])
    assert main(["fit", "--config=a/config.yaml", "--output=b"]) == 0
    for name in ("metrics.csv", "config.yaml"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    Path("b/summary.json").unlink()
    capsys.readouterr()
    assert main(["fit", "--resume=b", "--do_no_harm.margin=0.03"]) == 2
    assert "do_no_harm.margin: expected the saved value 0.02, got 0.03" in error_line()
    assert main(["fit", "--resume=b", "--do_no_harm=null"]) == 2
    assert "do_no_harm" in error_line()
    assert main(["fit", "--resume=b"]) == 0
    assert json.loads(Path("b/summary.json").read_text())["deployed"] == summary["deployed"]


def test_resume_without_rule_rejects_rule(
    npz: Path, workdir: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    assert fit(npz, "--output=a") == 0
    assert "deployed" not in json.loads(Path("a/summary.json").read_text())
    assert not any("deployed" in column for column in Path("a/metrics.csv").read_text().splitlines()[0].split(","))
    assert "do no harm" not in capsys.readouterr().out
    Path("a/summary.json").unlink()
    assert main(["fit", "--resume=a", "--do_no_harm.confidence=0.9"]) == 2
    assert "do_no_harm" in error_line()


def test_test_reproduces_the_decisions(npz: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(npz, NEVER, "--output=a") == 0
    assert main(["test", "a"]) == 0
    printed = capsys.readouterr().out
    assert "the same as summary.json, to the last digit" in printed
    assert printed.count("do no harm: confidence 0.999999999, margin 0") == 2
    summary = json.loads(Path("a/summary.json").read_text())
    summary["clients"][1]["deployed"] = "federated"
    Path("a/summary.json").write_text(json.dumps(summary))
    assert main(["test", "a"]) == 1
    assert "differs from summary.json" in capsys.readouterr().out


def test_predict_and_calibrate_use_the_deployed_model(
    workdir: Path, write_blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    npz = write_blobs(workdir / "more.npz", num_samples=300)
    assert fit(npz, *SAFE, NEVER, "--output=a", rounds=2) == 0
    client = open_finished("test", Path("a"), in_process=True)[0].load_clients()[1]
    images = np.random.default_rng(5).integers(0, 256, (150, 8, 8), dtype=np.uint8)
    np.savez("images.npz", images=images)

    def labels(role: str) -> list[int]:
        network = client.networks[role].eval()
        with torch.no_grad():
            return network(network_input(network, torch.from_numpy(images)[:, None]))[-1].argmax(dim=1).tolist()

    assert main(["predict", "a", "--client=1", "--input=images.npz"]) == 0
    with Path("predictions.csv").open() as file:
        predicted = [int(row["label"]) for row in csv.DictReader(file)]
    assert predicted == labels("local") != labels("private")
    assert main(["calibrate", "a", "--client=1", "--target_risk=0.3", "--confidence=0.7"]) == 0
    policy = ExitPolicy.load(Path("a/exits/client-001.json"))
    assert policy.network == network_fingerprint(client.networks["local"])
    assert main(["predict", "a", "--client=1", "--input=images.npz"]) == 0  # a policy of another network would raise
