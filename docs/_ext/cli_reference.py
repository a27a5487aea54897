"""The directive `{cli} COMMAND`: usage and options, read from the parser."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any
from unittest import mock

from docutils import nodes
from jsonargparse import ArgumentParser, Namespace
from sphinx.util.docutils import SphinxDirective


class _Captured(BaseException):
    """Carries the parser out of the command."""

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(command: str) -> ArgumentParser:
    """Return the parser that a command uses, by asking the command for its help."""
    from fedekd.cli import main

    def capture(parser: ArgumentParser, file: Any = None) -> None:
        raise _Captured(parser)

    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())
    with mock.patch.object(ArgumentParser, "print_help", capture), quiet[0], quiet[1]:
        try:
            main([command, "--help"])
        except _Captured as captured:
            return captured.parser
    raise LookupError(f"`{command} --help` prints no help of an ArgumentParser")


def groups(parser: ArgumentParser) -> Iterator[tuple[str, list[Action]]]:
    """Yield title and actions of each group that has options."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != SUPPRESS and not _is_class_help(action)]
        if actions:
            yield group.title or "options", actions


def _is_class_help(action: Action) -> bool:
    return any(option.endswith(".help") for option in action.option_strings)


def _names(action: Action) -> str:
    options = [option for option in action.option_strings if not option.endswith("+")]
    return " ".join(f"`{option}`" for option in options) or f"`{(action.metavar or action.dest).upper()}`"


def _default(action: Action) -> str:
    value = action.default
    if value in (None, "", SUPPRESS) or action.dest in ("help", "config", "print_config"):
        return ""
    if isinstance(value, dict | Namespace) and "class_path" in value:
        value = str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`"


def _description(action: Action, parser: ArgumentParser) -> str:
    text = (action.help or "").replace("%(prog)s", parser.prog).replace("%%", "%")
    choices = re.findall(r"Literal\[([^\]]*)\]", str(getattr(action, "_typehint", "")))
    if choices and choices[0].count(",") and not all(c.strip(" '") in text for c in choices[0].split(",")):
        text += f" One of {', '.join(f'`{choice.strip()}`' for choice in choices[0].replace(chr(39), '').split(','))}."
    return re.sub(r"(?<![`\w-])(--[a-z][\w.]*)", r"`\1`", text).replace("|", r"\|").replace("\n", " ")


class Cli(SphinxDirective):
    """Usage and a table per group of options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the section's content from the parser."""
        parser = parser_of(self.arguments[0])
        usage = re.sub(r"\s+", " ", parser.format_usage()).replace("orchestrator.py", "fedekd").strip()
        lines = ["```text", *usage.removeprefix("usage: ").split(" | "), "```", "", parser.description or "", ""]
        for title, actions in groups(parser):
            title = title[:1].upper() + title[1:]
            lines += [f"**{title}**", "", "| option | default | description |", "| --- | --- | --- |"]
            lines += [f"| {_names(a)} | {_default(a)} | {_description(a, parser)} |" for a in actions]
            lines.append("")
        return self.parse_text_to_nodes("\n".join(line.strip() for line in lines))


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("cli", Cli)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
