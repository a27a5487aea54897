"""The one exception that means: the user can fix this."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a configuration, a data file or a run folder.

    Its text is one line that names what was given, the value, and what is allowed. The command line prints that
    line and leaves with exit code 2; in a notebook it is an ordinary `ValueError`.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the most similar known name, or with all of them if none is similar.

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
