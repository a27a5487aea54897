"""Exception for invalid user input."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Invalid option, configuration, data file or run folder.

    The text is one line: `<option>: expected <allowed>, got <value>. <what to do>.` The command line prints it and
    exits with code 2; in a notebook it is an ordinary `ValueError`. It may quote what a site sent: see `printable`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(item) if isinstance(item, str) else item for item in arguments))


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar known name, or with all of them.

    Args:
        name: The unknown name.
        known: The known names; compared without case.

    Example:
        >>> nearest("fedkd", ["FedeKD", "Local"])
        "did you mean 'FedeKD'?"
        >>> nearest("xyz", ["FedeKD", "Local"])
        'choose from: FedeKD, Local'
    """
    names = sorted(set(known))
    lowered = {candidate.lower(): candidate for candidate in names}
    matches = get_close_matches(name.lower(), lowered, n=1)
    if matches:
        return f"did you mean '{lowered[matches[0]]}'?"
    return f"choose from: {', '.join(names)}"


def require(condition: bool, option: str, expected: str, value: object, hint: str = "") -> None:
    """Check a user's value.

    Args:
        condition: True if the value is allowed.
        option: Name of the option, such as `method.beta`.
        expected: The allowed values.
        value: The value given.
        hint: What to do, a sentence.

    Raises:
        UserError: If `condition` is false, as `<option>: expected <expected>, got <value>. <hint>`.

    Example:
        >>> require(False, "client.local_epochs", "at least 1", 0)
        Traceback (most recent call last):
        fedekd.errors.UserError: client.local_epochs: expected at least 1, got 0
    """
    if not condition:
        raise UserError(f"{option}: expected {expected}, got {value!r}" + (f". {hint}" if hint else ""))


def require_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Check that a user's value is one of the choices.

    Raises:
        UserError: If it is not; the message has the nearest choice.

    Example:
        >>> require_choice("gate", "enrgy", ["energy", "none"])
        Traceback (most recent call last):
        fedekd.errors.UserError: gate: expected one of energy, none, got 'enrgy'. Did you mean 'energy'?
    """
    names = list(choices)
    if value not in names:
        match = get_close_matches(str(value).lower(), [name.lower() for name in names], n=1)
        similar = next((name for name in names if match and name.lower() == match[0]), None)
        require(False, option, f"one of {', '.join(names)}", value, f"Did you mean {similar!r}?" if similar else "")
