"""Exception for invalid user input."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Invalid option, configuration, data file or run folder.

    The text is one line: `<option>: expected <allowed>, got <value>. <what to do>.` The command line prints it and
    exits with code 2; in a notebook it is an ordinary `ValueError`.
    """


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
