"""A `--help` that can be read: what an option is for and its default, not every class that could be given."""

from __future__ import annotations

from argparse import Action, _HelpAction
from collections.abc import Mapping
from typing import Any

from jsonargparse import DefaultHelpFormatter


class BriefHelp(DefaultHelpFormatter):
    """Each option in a line or two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 34, **kwargs})  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if isinstance(action, _HelpAction):
            return "Show this help."
        default = action.default
        if isinstance(default, Mapping) and "class_path" in default:
            default = str(default["class_path"]).rpartition(".")[2]
        plain = isinstance(default, str | int | float) and default not in ("", "==SUPPRESS==")
        return f"{text} [{str(default).lower() if isinstance(default, bool) else default}]" if plain else text

    def _format_action(self, action: Action) -> str:
        # One line of the epilog tells of them all.
        if any(option.endswith(".help") for option in action.option_strings):
            return ""
        return super()._format_action(action)
