"""What the documents say must be so: their code runs, their commands are accepted, their links lead somewhere."""

from __future__ import annotations

import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedekd import methods
from fedekd.cli import main
from fedekd.cli.benchmark import benchmark_parser
from fedekd.cli.calibrate import calibrate_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/certified_federation.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, text: str = README) -> list[str]:
    return [content for name, content in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands() -> Iterator[str]:
    for document in DOCUMENTS:
        for block in blocks("bash", (ROOT / document).read_text(encoding="utf-8")):
            yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on a machine of one core: with more, a busy machine would keep these tests waiting."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    return tmp_path / "work"


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_block_runs(number: int, here: Path) -> None:
    exec(compile(blocks("python")[number], f"README.md, Python block {number}", "exec"), {"__name__": "__main__"})


def _finished_run(npz: Path, folder: str, *more: str) -> None:
    small = [f"--data.dataset={npz}", "--data.num_clients=2", "--data.alpha=1", "--rounds=1", "--logger=null"]
    assert main(["fit", *small, "--client.local_epochs=1", f"--output={folder}", *more]) == 0


def _check_fedekd(words: list[str], npz: Path) -> None:
    if words[0] == "benchmark":
        assert main([*words, "--run", "false"]) == 0
    elif words[0] == "fit" and "--resume" not in words:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        assert ended.value.code == 0
    elif any(word.startswith("runs/exits-") for word in words):
        _finished_run(npz, words[1], "--data.num_clients=1", "--client.exits=2")
        np.savez("images.npz", images=np.zeros((3, 8, 8), np.uint8))
        assert main([*words, *(["--draws=2"] if words[0] == "report" else [])]) == 0
    else:
        _finished_run(npz, words[1] if words[0] == "report" else words[-1])
        assert main(words) == 0


def _check_python(words: list[str], npz: Path) -> None:
    assert words[0] == "orchestrator.py"
    _check_fedekd(words[1:], npz)


def _check_make(words: list[str], npz: Path) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[0]}"


def _check_pip(words: list[str], npz: Path) -> None:
    assert words == ["install", "."]


def _check_wandb(words: list[str], npz: Path) -> None:
    assert words[0] == "sweep"
    assert (ROOT / words[1]).is_file()


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "fedekd": _check_fedekd,
    "python": _check_python,
    "make": _check_make,
    "pip": _check_pip,
    "wandb": _check_wandb,
}


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_accepted(command: str, npz: Path, here: Path) -> None:
    program, *words = shlex.split(command, comments=True)
    CHECKS[program](words, npz)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    text = prose((ROOT / document).read_text(encoding="utf-8"))
    anchors = {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert not target.startswith("/"), target
            assert ((ROOT / document).parent / target.partition("#")[0]).exists(), target


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for name, value in values.items():
            # Nobody writes init_args on the command line.
            key = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
            yield key
            yield from _keys(value, key)


def test_every_option_that_is_named_exists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"config", "print_config", "method.help"}
    parsers = (benchmark_parser(), calibrate_parser())
    known |= {
        option.lstrip("-") for parser in parsers for action in parser._actions for option in action.option_strings
    }
    for method in ("FedeKD", "FedAvg", "FedProx"):
        options = ("--method", method, "--do_no_harm.confidence=0.9", "--print_config")
        with pytest.raises(SystemExit):
            main(["fit", "--config", "digits.yaml", *options])
        known |= set(_keys(yaml.safe_load(capsys.readouterr().out)))
    named = set()
    for code in inline_code(README):
        named |= set(re.findall(r"^((?:method|data|client|trainer)\.\w[\w.]*)$", code))
        named |= set(re.findall(r"--(\w[\w.]*)", code))
    assert len(named) > 20
    assert named - known == set()


def test_every_default_in_the_table_is_the_default() -> None:
    rows = re.findall(r"^\| .+? \| `method\.(\w+)`.*? \| `?(\w+)`?.*\|$", README, re.MULTILINE)
    assert len(rows) > 5
    parameters = {**inspect.signature(methods.FedAvg).parameters, **inspect.signature(methods.FedeKD).parameters}
    for name, stated in rows:
        default = parameters[name].default
        assert yaml.safe_load(stated) == default, name


def test_every_configuration_and_method_is_listed() -> None:
    named = {code for code in inline_code(README) if re.fullmatch(r"\w+\.yaml", code)} - {"config.yaml"}
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    public = [getattr(methods, name) for name in methods.__all__]
    concrete = {
        found.__name__
        for found in public
        if isinstance(found, type) and issubclass(found, methods.Method) and found is not methods.Method
    }
    assert concrete <= set(inline_code(README))
