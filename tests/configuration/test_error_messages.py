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
        (["--clent.local_epochs=2"], "--clent.local_epochs: unknown option. Did you mean --client.local_epochs?"),
        (["--resum=nowhere"], "--resum: unknown option. Did you mean --resume?"),
        (["--nothing_similar=1"], "--nothing_similar: unknown option. --help lists the options."),
        (["rounds", "3"], "'rounds': unexpected argument; options begin with --"),
        (["--rounds"], "argument --rounds: expected one argument"),
        (["--rounds=five"], "--rounds: expected a whole number, got 'five'"),
        (["--rounds=1:30"], "--rounds: expected a whole number, got '1:30'"),
        (["--rounds=99999999999999999999"], "--rounds: expected a number of 64 bits, got 99999999999999999999"),
        (
            [f"--rounds={'9' * 5001}"],
            f"--rounds: expected a whole number, got '{'9' * 34}...{'9' * 21}'",
        ),
        (["--data.fractions=[.inf,1,1]"], "--data.fractions: expected a finite number, got inf"),
        (["--quiet=maybe"], "--quiet: expected true or false, got 'maybe'"),
        (["--data.alpha=one"], "--data.alpha: expected a number, got 'one'"),
        (["--data.fractions=1"], "--data.fractions: expected a list, as in [0.6,0.2,0.2], got '1'"),
        (["--data.fractions=[1,2]"], "--data.fractions: expected a list of 3 values, got '[1, 2]'"),
        (["--trainer.threads=many"], "--trainer.threads: expected a whole number or 'auto', got 'many'"),
        (["--client.depths=three"], "--client.depths: expected a whole number or a list or null, got 'three'"),
        (["--client=nope.yaml"], "--client: file 'nope.yaml' not found; give keys one by one, as in --client.KEY"),
        (["--method=FedeD"], "--method: expected the name of a class, got 'FedeD'. Did you mean 'FedeKD'?"),
        (["--engine="], "--engine: expected the name of a class, got ''. Choose from: MultiProcess, Ray, Sequential."),
        (["--method.init_args=3"], "--method.init_args: expected keys and values, got one value of type str"),
        (["--method=torch.nn.Linear"], "--method: expected a subclass of Method, got torch.nn.Linear"),
        (
            ["--client.private_model=torchvision.models.vit_b_16", "--client.private_model.layers=2"],
            "--client.private_model.layers: unknown argument of torchvision.models.vit_b_16."
            " An argument that its signature does not name belongs in dict_kwargs.",
        ),
        (["--method.betta=2"], "--method.betta: unknown argument of fedekd.methods.FedeKD. Did you mean 'beta'?"),
        (
            ["--method.gate=open"],
            "--method.gate: expected one of 'energy', 'shuffled', 'none', 'reversed', 'reversed_shuffled',"
            " 'correctness', 'correctness_shuffled', got 'open'",
        ),
        (["--method.beta=nan"], "--method.beta: expected a finite number, got 'nan'"),
        (["--method.lambda_kd=.inf"], "--method.lambda_kd: expected a finite number, got inf"),
        (["--method.energy={class_path: nope.E}"], "--method.energy nope.E: No module named 'nope'"),
        (
            ["--client.private_model=PrivatCNN"],
            "--client.private_model: expected the name of a class, got 'PrivatCNN'. Did you mean 'PrivateCNN'?",
        ),
        (
            ["--client.private_model.in_channels=3"],
            "--client.private_model.in_channels: cannot be set, its value follows from the data",
        ),
        (
            ["--client.optimizer=Adm"],
            "--client.optimizer: expected the name of a class, got 'Adm'. Did you mean 'Adam'?",
        ),
        (["--client.optimizer.lr=nan"], "--client.optimizer.lr: expected a finite number, got 'nan'"),
        (
            ["--client.optimizer.params=3"],
            "--client.optimizer.params: cannot be set, its value follows from the model",
        ),
        (
            ["--engine.processes=4"],
            "--engine.processes: unknown argument of fedekd.federation.Sequential. Choose from: cache.",
        ),
        (
            ["--method=Local", "--method.beta=4"],
            "--method.beta: unknown argument of fedekd.methods.Local. It takes no arguments.",
        ),
        (
            ["--engine=SideByside"],
            "--engine: expected the name of a class, got 'SideByside'. Choose from: MultiProcess, Ray, Sequential.",
        ),
        (
            ["--method.aggregator=foo"],
            "--method.aggregator: expected the name of a class, got 'foo'."
            " Choose from: CoordinateMedian, Mean, TrimmedMean.",
        ),
        (
            ["--method.aggregator.trim=0.9"],
            "--method.aggregator: expected a class with an implementation, got an abstract one."
            " Choose from: CoordinateMedian, Mean, TrimmedMean.",
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
        ("--method=ProxyMethod", "got an abstract one. Choose from: "),
        ("--method=fedekd.methods.submodel_fedavg.SubmodelFedAvg", "got an abstract one. Choose from: "),
        ("--trainer.precision=bf15", "expected one of 'auto', '32-true'"),
        ("--logger=WandbRunLoger", "expected the name of a class, got 'WandbRunLoger'. Did you mean 'Wandb"),
    ],
)
def test_explain_choices_or_similar_names_are_listed(option: str, words: str, parser: ArgumentParser) -> None:
    assert words in message(parser, option)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clent:\n  local_epochs: 2\n", "--clent.local_epochs: unknown option. Did you mean --client.local_epochs?"),
        ("data:\n  alhpa: 2\n", "--data.alhpa: unknown option. Did you mean --data.alpha?"),
        ("method: {class_path: FedeKD, init_args: {betta: 2}}\n", "Did you mean 'beta'"),
        ("rounds: five\n", "--rounds: expected a whole number, got 'five'"),
        ("rounds: [\n", "--config mine.yaml, line 2: invalid YAML"),
        (
            "rounds: 1\nrounds: 2\n",
            "--config mine.yaml, line 2: invalid YAML: 'rounds' is given twice, first in line 1",
        ),
        (
            "client:\n  lr_decay: 1\n  lr_decay: 1\n",
            "--config mine.yaml, line 3: invalid YAML: 'lr_decay' is given twice",
        ),
        ("rounds: 1:30\n", "--rounds: expected a whole number, got '1:30'"),
        (f"rounds: {'9' * 5001}\n", "--rounds: expected a whole number, got '999"),
        (f"rounds: {'[' * 500}{']' * 500}\n", "line 1: invalid YAML: more than 50 levels of nesting"),
        ("method: {class_path: FedeKD, init_args: 3}\n", "--method.init_args: expected keys and values"),
        ("rounds: !!python/object:os.system x\n", "line 1: invalid YAML: tag tag:yaml.org"),
        ("3: 1\n", "--config mine.yaml, line 1: invalid YAML: the key 3 is not text"),
        ("- rounds\n", "--config mine.yaml: expected keys and values"),
        ("config: broken.yaml\n", "--config: invalid YAML"),
        ("config: list.yaml\n", "--config: expected keys and values, got - rounds"),
        ("config: nowhere.yaml\n", "not found"),
        ("participation: null\n", "--participation: expected a value, got null"),
        ("logger: 5\n", "--logger: expected a class path, or keys and values, got 5"),
        ("method: null\n", "--method: expected a value, got null"),
        ("method: {class_path: FedeKD, init_args: {beta: null}}\n", "--method.beta: expected a value, got null"),
        ("client: null\n", "client: expected keys and values, got null"),
        ("client: {optimizer: null}\n", "--client.optimizer: expected a value, got null"),
        ("client: {optimizer: 5}\n", "--client.optimizer: expected a class path"),
        ("trainer: 5\n", "trainer: expected keys and values, got 5"),
        ("data: {fractions: null}\n", "--data.fractions: expected a value, got null"),
        ("task: 5\n", "--task: expected text or null, got '5'"),
        ("config: 5\n", "config: expected the name of a file, got 5"),
        ("", "--config mine.yaml: expected keys and values, got an empty file"),
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


@pytest.mark.parametrize("size", [500, 10_000])
def test_explain_long_option_is_cut(size: int, parser: ArgumentParser) -> None:
    long = "x" * size
    for option in (
        f"--{long}=1",
        f"--rounds={long}",
        f"--method={long}",
        f"--method.{long}=1",
        f"--data.fractions={long}",
    ):
        assert "..." in message(parser, option)
    assert "--config xxx" in message(parser, f"--config={long}")


def test_renamed_option_of_calibrate_names_the_new_one() -> None:
    parser = ArgumentParser(exit_on_error=False)
    for name in ("target_risk", "confidence", "familywise"):
        parser.add_argument(f"--{name}")
    for old in ("alpha", "delta", "simultaneous"):
        with pytest.raises(UserError, match=f"--{old}: renamed to --{RENAMED[old]}"):
            parse(parser, [f"--{old}", "0.1"])
