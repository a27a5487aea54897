"""README and docs: commands parse and run, Python blocks run, links resolve, tables equal the results."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from documents import DOCS, FENCE, ROOT, blocks, commands, documents, inline_code, load, name, prose, text

import fedekd
from experiments.result_pages.__main__ import render
from fedekd import methods
from fedekd.benchmark import cells
from fedekd.cli import COMMANDS, main
from fedekd.cli.benchmark import benchmark_parser
from fedekd.configuration.options import parse

README = ROOT / "README.md"
PAGES = documents()
#: Pages whose Python blocks need the commands before them: `test_commands_run_in_order` runs both.
STEPS = {"docs/how-to/monitor.md"}
WITH_PYTHON = [path for path in PAGES if blocks(path, "python") and name(path) not in STEPS]
COMMANDS_OF_ALL = sorted({command for path in PAGES for command in commands(path)})
FEDEKD = {"fedekd": 1, "python orchestrator.py": 2}

cli_reference = load(DOCS / "_ext" / "cli_reference.py")


# ---------------------------------------------------------------- README


def test_readme_has_at_most_200_lines() -> None:
    assert len(text(README).splitlines()) <= 200


def test_readme_lists_every_configuration_and_method() -> None:
    code = set(inline_code(README)) | set(re.findall(r"\w+", prose(README)))
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= set(inline_code(README))
    assert _method_names() <= code


def test_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert citation["version"] == fedekd.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["url"].endswith("2605.05553")


# ---------------------------------------------------------------- links


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        if linked.suffix == ".ipynb" and linked.parent.name == "tutorials":
            linked = ROOT / "notebooks" / linked.name  # copied by docs/conf.py
        assert not file.startswith("/"), target
        assert linked.exists(), target
        if anchor:
            assert anchor in {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text(linked), re.MULTILINE)}, (
                target
            )


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_python_blocks_run(path: Path, work: Path) -> None:
    if any("flwr" in block for block in blocks(path, "python")):
        pytest.importorskip("flwr")
    for number, block in enumerate(blocks(path, "python")):
        exec(compile(block, f"{name(path)}, Python block {number}", "exec"), {"__name__": "__main__"})


# ---------------------------------------------------------------- commands


def _of_fedekd(command: str) -> list[str] | None:
    """Return the arguments of a command of fedekd; None for another program."""
    words = shlex.split(command, comments=True)
    for program, length in FEDEKD.items():
        if words[:length] == program.split():
            return words[length:]
    return None


@cache
def _require_cells(config: str) -> None:
    """Build the cells of a grid, of one seed and alpha per block: configurations are parsed, which takes seconds."""
    grid = parse(benchmark_parser(), ["--config", config]).blocks
    for block in grid:
        block.seeds, block.alphas = block.seeds[:1], block.alphas and block.alphas[:1]
    assert cells(grid)


@pytest.mark.parametrize("command", COMMANDS_OF_ALL)
def test_command_parses(command: str, work: Path) -> None:
    if "timm." in command:
        pytest.importorskip("timm", reason="needs the extra fedekd[timm]")
    words = _of_fedekd(command)
    if words is None:
        _check_other(shlex.split(command, comments=True))
    elif words[0] == "fit" and not {"--resume"} & set(words) and "runs/" not in " ".join(words[:3]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        assert ended.value.code == 0
    elif words[0] == "benchmark":
        parse(benchmark_parser(), words[1:])
        _require_cells(words[words.index("--config") + 1])
    elif words[0] != "fit":
        cli_reference.parser_of(words[0]).parse_args(words[1:])


def _check_other(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", text(ROOT / "Makefile"), re.MULTILINE), f"Makefile has no target {rest[0]}"
    elif program == "pip":
        assert rest == ["install", "."]
    elif program == "python":
        assert rest[0] == "-m"
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), rest[1]
    elif program == "wandb":
        assert rest[:2] == ["artifact", "get"] or (rest[0] == "sweep" and (ROOT / rest[1]).is_file())
    elif program == "nvidia-cuda-mps-control":
        assert rest == ["-d"]  # starts the daemon
    elif program == "git":
        assert rest[0] == "apply"
        assert (ROOT / rest[1]).is_file()
    else:
        raise AssertionError(f"no check of the program {program}")


#: Appended to `fit`, so that a command takes seconds.
SMALL = ("--rounds=1", "--client.local_epochs=1", "--logger=null", "--trainer.precision=32-true")

#: Documents whose commands run one after the other in one folder, and what must have run before.
WALKED = {
    "README.md": (),
    "docs/how-to/own_data.md": (),
    "docs/how-to/early_exits.md": (),
    "docs/how-to/monitor.md": (),
    "docs/how-to/export.md": (),
    "docs/how-to/resume.md": ("fit --config digits.yaml",),
    "docs/explanation/certified_federation.md": (),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.export) if page.endswith("export.md") else page for page in WALKED]
)
def test_commands_run_in_order(page: str, work: Path) -> None:
    if page.endswith("export.md"):
        pytest.importorskip("onnxruntime", reason="needs the extra fedekd[export]")
    np.savez("images.npz", images=np.zeros((3, 8, 8), np.uint8))
    for block in blocks(ROOT / page, "python"):
        if any(written in block for written in ("mine.npz", "hospitals", '"scans"')):
            exec(compile(block, page, "exec"), {"__name__": "__main__"})
    for words in [*map(str.split, WALKED[page]), *_steps(page)]:
        if isinstance(words, str):
            exec(compile(words, page, "exec"), {"__name__": "__main__"})
            continue
        if words[0] == "benchmark":
            continue
        if words[0] == "fit" and "--resume" not in words:
            if not _is_embedded(words):
                continue
            words = [*words, *(option for option in SMALL if option.split("=")[0] not in words)]
        if words[0] == "report":
            words = [*words, "--draws=2"]
        assert main(words) in ((0, 3) if words[0] == "monitor" else (0,)), words


def _steps(page: str) -> Iterator[list[str] | str]:
    """Yield the commands of fedekd, and of `STEPS` also the Python blocks, in order."""
    for language, content in FENCE.findall(text(ROOT / page)):
        if language == "python" and page in STEPS:
            yield content
        if language == "bash":
            lines = (line.strip() for line in content.replace("\\\n", " ").splitlines() if line.strip())
            yield from filter(None, map(_of_fedekd, lines))


def _is_embedded(words: list[str]) -> bool:
    """Whether a command needs no file of a real data set."""
    is_example = any(folder in words and Path(folder).is_dir() for folder in ("hospitals", "scans"))
    return is_example or any(
        word.endswith(("digits.yaml", "heart_disease.yaml")) or word.startswith("runs/digits") for word in words
    )


# ---------------------------------------------------------------- names in the text


def _method_names() -> set[str]:
    public = [getattr(methods, public) for public in methods.__all__]
    return {
        found.__name__
        for found in public
        if isinstance(found, type) and issubclass(found, methods.Method) and not inspect.isabstract(found)
    }


def test_every_method_has_a_page() -> None:
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"} == {n.lower() for n in _method_names()}


def test_reference_covers_every_command() -> None:
    page = text(DOCS / "reference" / "cli.md")
    assert set(re.findall(r"^```\{cli\} (\w+)$", page, re.MULTILINE)) == set(COMMANDS)
    for command in COMMANDS:
        assert list(cli_reference.groups(cli_reference.parser_of(command)))


def test_layers_of_the_architecture_are_those_that_are_tested() -> None:
    layers = load(ROOT / "tests" / "test_layers.py").LAYERS
    rows = re.findall(r"^\| \d \| (.+?) \|", text(DOCS / "explanation" / "architecture.md"), re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(layers)


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            path = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
            yield path
            yield from _keys(value, path)


NESTED = ("--privacy.noise_multiplier=1", "--privacy.clipping_norm=1", "--client.lora.r=8")


def test_every_option_in_the_text_exists(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"config", "print_config", "help", "method.help", "method"}
    known |= {"method.momentum"}  # of the method that a patch adds
    known |= {"optimizer", "lr_scheduler", "trainer.strategy"}  # of LightningCLI, in lightning.md
    for command in COMMANDS:
        actions = cli_reference.parser_of(command)._actions
        known |= {option.lstrip("-") for action in actions for option in action.option_strings}
    for method in sorted(_method_names()):
        parameters = inspect.signature(getattr(methods, method)).parameters
        known |= {f"method.{parameter}" for parameter in parameters}
    for engine in ("Sequential", "MultiProcess", "Ray"):
        parameters = inspect.signature(getattr(fedekd.federation, engine)).parameters
        known |= {f"engine.{parameter}" for parameter in parameters}
    with pytest.raises(SystemExit):
        main(["fit", "--config", "digits.yaml", "--do_no_harm.margin=0.01", *NESTED, "--print_config"])
    known |= set(_keys(yaml.safe_load(capsys.readouterr().out)))
    named: dict[str, str] = {}
    for path in PAGES:
        if path.name in ("flower.md", "CHANGELOG.md", "CONTRIBUTING.md"):
            continue  # options of Flower, of former versions, of pytest
        for code in inline_code(path):
            found = re.findall(r"^((?:method|data|client|trainer)\.\w[\w.]*)$", code)
            found += re.findall(r"(?<![\w-])--(\w[\w.]*)", code)
            named |= dict.fromkeys(found, name(path))
    named = {option: page for option, page in named.items() if not option.endswith(".NAME")}
    assert len(named) > 30
    assert {option: page for option, page in named.items() if option.replace(".init_args", "") not in known} == {}


def test_defaults_of_the_open_questions_are_the_defaults() -> None:
    page = text(DOCS / "explanation" / "open_questions.md")
    rows = re.findall(r"^\| .+? \| `method\.(\w+)`.*? \| `?(\w+)`?.*\|$", page, re.MULTILINE)
    assert len(rows) > 5
    parameters = {**inspect.signature(methods.FedAvg).parameters, **inspect.signature(methods.FedeKD).parameters}
    for parameter, stated in rows:
        assert yaml.safe_load(stated) == parameters[parameter].default, parameter


# ---------------------------------------------------------------- results


def test_result_pages_are_rendered_from_the_results() -> None:
    for path, page in render().items():
        assert path.read_text(encoding="utf-8") == page, f"{path.name}: run `make tables`"


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("patch", sorted((DOCS / "how-to" / "patches").glob("*.patch")), ids=lambda path: path.stem)
def test_patch_applies_and_its_page_has_its_size(patch: Path) -> None:
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, check=True)
    output = subprocess.run(["git", "apply", "--numstat", str(patch)], cwd=ROOT, check=True, capture_output=True)
    counts = [line.split()[0] for line in output.stdout.decode().splitlines()]
    files = f"{len(counts)} file{'s' if len(counts) > 1 else ''}"
    page = " ".join(text(DOCS / "how-to" / f"add_{patch.stem}.md").split())
    assert f"{sum(map(int, counts))} lines added in {files}" in page
