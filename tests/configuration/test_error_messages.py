"""Each case fails where another version of jsonargparse words its errors differently."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from fedekd.configuration.error_messages import RENAMED
from fedekd.configuration.options import federation_parser, parse
from fedekd.errors import UserError


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return federation_parser()


def message(parser: ArgumentParser, *options: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(parser, ["--data.dataset=digits", *options])
    text = str(raised.value)
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--clent.local_epochs=2"], "--clent.local_epochs: unknown option; did you mean --client.local_epochs?"),
        (["--resum=nowhere"], "--resum: unknown option; did you mean --resume?"),
        (["--nothing_similar=1"], "--nothing_similar: unknown option; --help lists the options"),
        (["rounds", "3"], "'rounds': unexpected argument; options begin with --"),
        (["--rounds"], "argument --rounds: expected one argument"),
        (["--rounds=five"], "--rounds: expected a whole number, got 'five'"),
        (["--quiet=maybe"], "--quiet: expected true or false, got 'maybe'"),
        (["--data.alpha=one"], "--data.alpha: expected a number, got 'one'"),
        (["--data.fractions=1"], "--data.fractions: expected a list, as in [0.6,0.2,0.2], got '1'"),
        (["--data.fractions=[1,2]"], "--data.fractions: expected a list of 3 values, got '[1, 2]'"),
        (["--trainer.threads=many"], "--trainer.threads: expected a whole number or 'auto', got 'many'"),
        (["--client.depths=three"], "--client.depths: expected a whole number or a list or null, got 'three'"),
        (["--client=nope.yaml"], "--client: file 'nope.yaml' not found; give keys one by one, as in --client.KEY"),
        (["--method=FedeD"], "--method: unknown class FedeD; did you mean 'FedeKD'?"),
        (["--method=torch.nn.Linear"], "--method: expected a subclass of Method, got torch.nn.Linear"),
        (["--method.betta=2"], "--method.betta: unknown argument of fedekd.methods.FedeKD; did you mean 'beta'?"),
        (["--method.gate=open"], "--method.gate: expected one of 'energy', 'shuffled', 'none', got 'open'"),
        (["--method.beta=nan"], "--method.beta: expected a finite number, got 'nan'"),
        (["--method.lambda_kd=.inf"], "--method.lambda_kd: expected a finite number, got inf"),
        (["--method.energy={class_path: nope.E}"], "--method.energy nope.E: No module named 'nope'"),
        (
            ["--client.private_model=PrivatCNN"],
            "--client.private_model: unknown class PrivatCNN; did you mean 'PrivateCNN'?",
        ),
        (
            ["--client.private_model.in_channels=3"],
            "--client.private_model.in_channels: cannot be set, its value follows from the data",
        ),
        (["--client.optimizer=Adm"], "--client.optimizer: unknown class Adm; did you mean 'Adam'?"),
        (["--client.optimizer.lr=nan"], "--client.optimizer.lr: expected a finite number, got 'nan'"),
        (
            ["--client.optimizer.params=3"],
            "--client.optimizer.params: cannot be set, its value follows from the model",
        ),
        (
            ["--engine.processes=4"],
            "--engine.processes: unknown argument of fedekd.federation.Sequential; it takes no arguments",
        ),
        (["--engine=SideByside"], "--engine: unknown class SideByside; choose from: MultiProcess, Ray, Sequential"),
        (
            ["--method.aggregator=foo"],
            "--method.aggregator: unknown class foo; choose from: CoordinateMedian, Mean, TrimmedMean",
        ),
        (
            ["--method.aggregator.trim=0.9"],
            "--method.aggregator: the class is abstract; choose from: CoordinateMedian, Mean, TrimmedMean",
        ),
        (
            ["--do_no_harm=maybe"],
            "--do_no_harm: expected true, false or arguments such as --do_no_harm.confidence 0.9, got 'maybe'",
        ),
    ],
)
def test_explain_invalid_option_is_one_line(options: list[str], expected: str, parser: ArgumentParser) -> None:
    assert message(parser, *options) == expected


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--method=ProxyMethod", "the class is abstract; choose from: CAFEDistill, "),
        ("--trainer.precision=bf15", "expected one of 'auto', '32-true'"),
        ("--logger=WandbRunLoger", "unknown class WandbRunLoger; did you mean 'Wandb"),
    ],
)
def test_explain_choices_or_similar_names_are_listed(option: str, words: str, parser: ArgumentParser) -> None:
    assert words in message(parser, option)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clent:\n  local_epochs: 2\n", "--clent.local_epochs: unknown option; did you mean --client.local_epochs?"),
        ("data:\n  alhpa: 2\n", "--data.alhpa: unknown option; did you mean --data.alpha?"),
        ("method: {class_path: FedeKD, init_args: {betta: 2}}\n", "did you mean 'beta'"),
        ("rounds: five\n", "--rounds: expected a whole number, got 'five'"),
        ("rounds: [\n", "--config mine.yaml: invalid YAML"),
        ("- rounds\n", "--config mine.yaml: expected keys and values"),
        ("config: broken.yaml\n", "--config: invalid YAML"),
        ("config: list.yaml\n", "--config: expected keys and values, got - rounds"),
        ("config: nowhere.yaml\n", "not found"),
        ("participation: null\n", "--participation: expected a value, got null"),
        ("logger: 5\n", "--logger: expected a class path, or class_path and init_args, got 5"),
        ("method: null\n", "--method: expected a value, got null"),
        ("method: {class_path: FedeKD, init_args: {beta: null}}\n", "--method.beta: expected a value, got null"),
        ("client: null\n", "client: expected keys and values, got null"),
        ("client: {optimizer: null}\n", "--client.optimizer: expected a value, got null"),
        ("client: {optimizer: 5}\n", "--client.optimizer: expected a class path"),
        ("trainer: 5\n", "trainer: expected keys and values, got 5"),
        ("data: {fractions: null}\n", "--data.fractions: expected a value, got null"),
        ("task: 5\n", "--task: expected text or null, got '5'"),
        ("config: 5\n", "config: expected the name of a file, got 5"),
        ("", "--config mine.yaml: the file is empty"),
        ("\udcff", "--config mine.yaml: expected text in UTF-8"),
    ],
)
def test_explain_invalid_file_names_key_or_file(
    text: str, expected: str, parser: ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("rounds: [\n")
    Path("list.yaml").write_text("- rounds\n")
    Path("mine.yaml").write_text(text, errors="surrogateescape")
    assert expected in message(parser, "--config=mine.yaml")


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--reference_dir=x", "reference_dir: x\n", "--reference_dir: renamed to --baseline_dir"),
        ("--dropout=0.1", "dropout: 0.1\n", "--dropout: renamed to --update_loss_rate"),
        (
            "--do_no_harm.delta=0.1",
            "do_no_harm: {delta: 0.1}\n",
            "--do_no_harm.delta: renamed to --do_no_harm.confidence (1 - delta)",
        ),
        ("--do_no_harm.keep=better", "do_no_harm: {keep: better}\n", "--do_no_harm.keep: renamed to --do_no_harm.rule"),
        ("--engine=SideBySide", "engine: SideBySide\n", "--engine SideBySide: renamed to MultiProcess"),
        (
            "--engine=fedekd.federation.InProcess",
            "engine: {class_path: fedekd.federation.InProcess}\n",
            "--engine fedekd.federation.InProcess: renamed to Sequential",
        ),
    ],
)
def test_explain_renamed_option_names_the_new_one(
    option: str, text: str, expected: str, parser: ArgumentParser, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message(parser, option) == expected
    assert message(parser, f"--config={path}") == expected


def test_renamed_option_of_calibrate_names_the_new_one() -> None:
    parser = ArgumentParser(exit_on_error=False)
    for name in ("target_risk", "confidence", "familywise"):
        parser.add_argument(f"--{name}")
    for old in ("alpha", "delta", "simultaneous"):
        with pytest.raises(UserError, match=f"--{old}: renamed to --{RENAMED[old]}"):
            parse(parser, [f"--{old}", "0.1"])
