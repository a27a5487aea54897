"""Plain technical English: words that stay out of docstrings, comments, messages, help texts and docs.

See CONTRIBUTING for the style.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: All parts of the repository with prose of their own, except the tests.
PARTS = (
    *("fedekd", "configs", "orchestrator.py", "perf", "experiments", "examples", "notebooks"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"),
)

SUFFIXES = {".py", ".md", ".yaml", ".html", ".ipynb"}

#: Words and what to write instead.
WORDS = {
    r"promis(e|es|ed|ing)": "guarantee",
    r"told": "reported, printed",
    r"anew": "again",
    r"who(so)?ever": "any client (sample, user) that",
    r"thrice": "three times",
    r"(no|any|some|every)body('s)?": "no client, any process, each user",
    r"deal|deals|dealt|dealing": "partition, assign",
    r"alike": "equal, similar",
    r"beside": "next to, in addition to",
    r"alone": "only, by itself",
    r"h[eo]ld against": "compared with",
    r"of its own accord": "by itself",
    r"goes by": "uses, is called",
    r"as they are": "unchanged",
    r"laws?": "distribution",
    r"sure": "confident",
    r"leavers?": "samples that exit",
    r"lets? (\w+ ){1,3}leave": "exit",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(WORDS)), re.IGNORECASE)


def files(parts: tuple[str, ...]) -> list[Path]:
    found: set[Path] = set()
    for part in parts:
        path = ROOT / part
        found |= {path} if path.is_file() else {path for path in path.rglob("*") if path.suffix in SUFFIXES}
    return sorted(path for path in found if "__pycache__" not in path.parts and "_build" not in path.parts)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each comment and string of a module, or of each line of another file."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        return
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
                yield token.start[0], token.string


def findings(path: Path) -> Iterator[str]:
    for line, text in prose(path):
        for match in PATTERN.finditer(text):
            instead = list(WORDS.values())[int(str(match.lastgroup)[1:])]
            number = line + text[: match.start()].count("\n")
            yield f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead!r}"


def long_summaries(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            if len(summary) > 79:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {len(summary)} characters: {summary}"


@pytest.mark.parametrize("part", PARTS)
def test_listed_words_do_not_occur(part: str) -> None:
    assert [line for path in files((part,)) for line in findings(path)] == []


@pytest.mark.parametrize("part", [part for part in PARTS if not part.endswith(".md")])
def test_docstring_summaries_have_at_most_79_characters(part: str) -> None:
    assert [line for path in files((part,)) if path.suffix == ".py" for line in long_summaries(path)] == []


def test_findings_names_line_and_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.relative_to", lambda path, root: path.name)
    path = tmp_path / "x.py"
    path.write_text('told = 1  # nobody\n"""One.\n\nLets an image leave, and make no\n  promise."""\n')
    assert [line.partition(": write")[0] for line in findings(path)] == [
        "x.py:1: 'nobody'",
        "x.py:4: 'Lets an image leave'",
        "x.py:5: 'promise'",
    ]
