"""Texts of errors: one line, of bounded length."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from unittest.mock import MagicMock

import pytest

from fedekd.cli import _fail
from fedekd.cli.benchmark import GridDisplay
from fedekd.errors import (
    LONGEST_ERROR,
    UserError,
    describe_error,
    listed,
    nearest,
    print_warning,
    printable,
    require,
    require_choice,
    shorten,
)
from fedekd.federation import SilentObserver
from fedekd.reporting import Display


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\n lines\tand tabs", "two lines and tabs"),
        ("\x1b[31mred\x00 \udcff \u202e", r"\x1b[31mred\x00 \udcff \u202e"),
        ("x" * 10_000, None),
        ("\x1b" * LONGEST_ERROR, None),
    ],
)
def test_user_error_text_is_one_short_printable_line(text: str, expected: str | None) -> None:
    shown = str(UserError(text))
    assert expected is None or shown == expected
    assert len(shown) <= LONGEST_ERROR
    assert shown.isprintable()
    assert str(UserError(shown)) == shown


def test_shorten_keeps_both_ends() -> None:
    shown = shorten("start" + "x" * 100 + "end", 20)
    assert len(shown) == 20
    assert shown.startswith("start")
    assert shown.endswith("end")


def test_require_long_value_keeps_the_hint() -> None:
    with pytest.raises(UserError, match=r"o: expected text, got 'x+\.\.\.x+'\. Shorten it\.$"):
        require(False, "o", "text", "x" * 1000, "Shorten it.")


def test_long_list_of_choices_is_cut() -> None:
    names = [f"choice_{number:03d}" for number in range(100)]
    assert listed(names).endswith(", ... (100 in all)")
    assert len(nearest("zzz", names)) < 200
    with pytest.raises(UserError, match=r"\(100 in all\), got 'choice_0420'. Did you mean 'choice_042'\?"):
        require_choice("o", "choice_0420", names)


def test_require_choice_renamed_value_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"got 'old'. It was renamed to 'new'\."):
        require_choice("o", "old", ["new", "bold"], {"old": "new"})


HOSTILE = {
    "escape": ("a\x1b[31mred\x1b]0;title\x07", r"a\x1b[31mred\x1b]0;title\x07"),
    "lines": ("a\r\n\tb\u2028c\x0b\x85d", "a b c d"),
    "direction": ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
    "surrogate": ("a\ud800", r"a\ud800"),
    "C1": ("a\x9b2J", r"a\x9b2J"),
    "other languages": ("Zürich 日本 ß", "Zürich 日本 ß"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_printable_escapes_what_a_terminal_would_act_on(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = HOSTILE[what]
    assert printable(text) == expected
    assert str(UserError(text)) == expected
    assert str(pickle.loads(pickle.dumps(UserError(text)))) == expected
    Display(quiet=True).warn(text)
    SilentObserver().warn(text)
    _fail(text)
    assert capsys.readouterr().err.splitlines() == [f"warning: {expected}"] * 2 + [f"error: {expected}"]


WARNINGS: dict[str, Callable[[str], object]] = {
    "display": lambda text: Display(quiet=True).warn(text),
    "observer": lambda text: SilentObserver().warn(text),
    "benchmark": lambda text: GridDisplay.cell_failed(MagicMock(), MagicMock(alpha=1.0), text),
    "other commands": print_warning,
}


@pytest.mark.parametrize("text", ["x" * 10_000, "\x1b" * 1000, "[31m \ud800" + "y" * 1000])
@pytest.mark.parametrize("warn", WARNINGS)
def test_warning_is_one_short_printable_line(warn: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    WARNINGS[warn](text)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert line.isprintable()
    assert len(line) <= 400


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n lines \x1b[31m"), r"ValueError: two lines \x1b[31m"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_describe_error_is_one_printable_line(error: Exception, expected: str) -> None:
    assert describe_error(error) == expected
    assert len(describe_error(ValueError("x" * 10_000))) == 200
    assert len(describe_error(ValueError("x" * 10_000), 80)) == 80
