"""Formatter of `--help`."""

from __future__ import annotations

from argparse import Action, _HelpAction
from collections.abc import Mapping
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace


class BriefHelp(DefaultHelpFormatter):
    """Formatter that prints defaults in brackets, no types, no `--OPTION.help`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 34, **kwargs})  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if isinstance(action, _HelpAction):
            return "Print this help."
        if "--print_config" in action.option_strings:
            return "Print the resulting configuration as YAML and exit."
        default = action.default
        if isinstance(default, Mapping | Namespace) and "class_path" in default:
            default = str(default["class_path"]).rpartition(".")[2]
        is_plain = isinstance(default, str | int | float | tuple) and default not in ("", "==SUPPRESS==")
        return f"{text} [{str(default).lower() if isinstance(default, bool) else default}]" if is_plain else text

    def _format_action_invocation(self, action: Action) -> str:
        """Return the names of an option, without the form that appends to a list."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return ", ".join(option for option in action.option_strings if not option.endswith("+"))

    def _format_action(self, action: Action) -> str:
        if any(option.endswith(".help") for option in action.option_strings):
            return ""  # the epilog names them in one line
        return super()._format_action(action)
