"""Exception for invalid user input."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches

#: Characters of an error or a warning; the command line adds `error: ` and stays below 400.
LONGEST_ERROR = 390

_LONGEST_VALUE = 60
_LONGEST_LIST = 160
_LONGEST_PATH = 120

#: Error numbers of a full disk, after which the same command can go on.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Invalid option, configuration, data file or run folder.

    The text is one line: `<option>: expected <allowed>, got <value>. <what to do>.` The command line prints it and
    exits with code 2; in a notebook it is an ordinary `ValueError`. It may quote what a site sent: see `printable`.

    Args:
        arguments: The message; the middle of a text of more than `LONGEST_ERROR` characters is cut.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shorten(item, LONGEST_ERROR) if isinstance(item, str) else item for item in arguments))


def printable(text: str) -> str:
    r"""Return a text as one line without control characters, for a terminal.

    White space becomes one space each; terminal escapes, other control characters, marks that change the direction of
    writing, and lone surrogates are written as escapes.

    Example:
        >>> printable("red \x1b[31m\n  Zürich \u202e")
        'red \\x1b[31m Zürich \\u202e'
    """
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shorten(text: str, length: int = _LONGEST_VALUE) -> str:
    """Return a text as `printable` does, without its middle if it is too long.

    Args:
        text: Any text.
        length: Largest number of characters of the result, at least 10.

    Example:
        >>> shorten("0123456789" * 10, 15)
        '01234567...6789'
    """
    line = printable(text)
    end = (length - 3) * 2 // 5
    return line if len(line) <= length else f"{line[: length - 3 - end]}...{line[-end:]}"


def shorten_path(path: object) -> str:
    """Return a path as `shorten` does, with room for one that can be copied."""
    return shorten(str(path), _LONGEST_PATH)


def describe_error(error: BaseException, length: int = 200) -> str:
    r"""Return the class and the text of an exception as `shorten` does.

    Example:
        >>> describe_error(ValueError("two\nlines")), describe_error(EOFError())
        ('ValueError: two lines', 'EOFError')
    """
    text, name = str(error), type(error).__name__
    return shorten(f"{name}: {text}" if text else name, length)


def print_warning(text: str) -> None:
    """Print a warning on standard error, as one line of bounded length."""
    with suppress(BrokenPipeError):  # standard error is closed
        print(f"warning: {shorten(text, LONGEST_ERROR)}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar known name, or with all of them.

    Args:
        name: The unknown name.
        known: The known names; compared without case.

    Returns:
        A sentence; a long list of names is cut.

    Example:
        >>> nearest("fedkd", ["FedeKD", "Local"])
        "Did you mean 'FedeKD'?"
        >>> nearest("xyz", ["FedeKD", "Local"])
        'Choose from: FedeKD, Local.'
    """
    names = sorted(set(known))
    similar = _similar(name, names)
    return f"Choose from: {listed(names)}." if similar is None else f"Did you mean '{similar}'?"


def listed(names: Iterable[str]) -> str:
    """Return names in one line; of a long list, the first ones and the number of all.

    Example:
        >>> listed(["FedeKD", "Local"])
        'FedeKD, Local'
    """
    names = list(names)
    text = ", ".join(names)
    if len(text) <= _LONGEST_LIST:
        return text
    start = text[:_LONGEST_LIST].rpartition(", ")[0] or shorten(names[0])
    return f"{start}, ... ({len(names)} in all)"


def _similar(name: str, names: Iterable[str]) -> str | None:
    lowered = {candidate.lower(): candidate for candidate in names}
    # The time of a comparison grows with the product of the lengths.
    matches = get_close_matches(name[:_LONGEST_LIST].lower(), lowered, n=1)
    return lowered[matches[0]] if matches else None


def require(condition: bool, option: str, expected: str, value: object, hint: str = "") -> None:
    """Check a user's value.

    Args:
        condition: True if the value is allowed.
        option: Name of the option, such as `method.beta`.
        expected: The allowed values.
        value: The value given; the middle of a long one is left out.
        hint: What to do, a sentence.

    Raises:
        UserError: If `condition` is false, as `<option>: expected <expected>, got <value>. <hint>`.

    Example:
        >>> require(False, "client.local_epochs", "at least 1", 0)
        Traceback (most recent call last):
        fedekd.errors.UserError: client.local_epochs: expected at least 1, got 0
    """
    if not condition:
        raise UserError(f"{option}: expected {expected}, got {shorten(repr(value))}" + (f". {hint}" if hint else ""))


def require_choice(
    option: str, value: object, choices: Iterable[str], renamed: Mapping[str, str] | None = None
) -> None:
    """Check that a user's value is one of the choices.

    Args:
        option: Name of the option, such as `method.gate`.
        value: The value given.
        choices: The allowed values.
        renamed: Former names of choices, with their names now.

    Raises:
        UserError: If it is not; the message has the nearest choice.

    Example:
        >>> require_choice("gate", "enrgy", ["energy", "none"])
        Traceback (most recent call last):
        fedekd.errors.UserError: gate: expected one of energy, none, got 'enrgy'. Did you mean 'energy'?
    """
    names = list(choices)
    if value not in names:
        similar = _similar(str(value), names)
        hint = f"Did you mean '{similar}'?" if similar else ""
        if new := (renamed or {}).get(str(value)):
            hint = f"It was renamed to '{new}'."
        require(False, option, f"one of {listed(names)}", value, hint)
