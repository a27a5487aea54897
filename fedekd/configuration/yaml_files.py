"""Reader of YAML configurations that refuses ambiguous and unbounded texts."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

#: Levels of nesting. Configurations have fewer than 10; some hundred exceed Python's recursion limit.
MAX_DEPTH = 50

#: Values after aliases are expanded. Grids have some hundred; nested aliases in 300 characters make billions.
MAX_VALUES = 100_000

#: Characters of an integer. Python converts at most 4,300 digits; longer ones stay text, which no option accepts.
_LONGEST_INTEGER = 40

_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_PREFIX + name for name in ("bool", "float", "int", "map", "null", "seq", "str")}
_INTEGER = re.compile(r"[-+]?(?:0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*|[0-9][0-9_]*)$")


class _Loader(get_yaml_default_loader()):  # type: ignore[misc]
    """jsonargparse's loader with the numbers of YAML 1.2.

    In YAML 1.1, `010` is 8 and `1:30` is 90. Here `010` is 10, as on the command line, and `1:30` is text.
    """

    def construct_integer(self, node: yaml.ScalarNode) -> int | str:
        """Return the value of an integer."""
        text = node.value.replace("_", "")
        if len(text) > _LONGEST_INTEGER:
            return str(node.value)
        return int(text, 16 if "0x" in text else 2 if "0b" in text else 10)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag == f"{_PREFIX}int" else re.compile(f"(?!.*:){pattern.pattern}", pattern.flags))
        if tag in (f"{_PREFIX}int", f"{_PREFIX}float")
        else (tag, pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_integer)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Args:
        text: One document.

    Raises:
        yaml.YAMLError: If it is not valid YAML, has a key twice in a mapping, a tag, more than `MAX_DEPTH` levels, or
            more than `MAX_VALUES` values.

    Example:
        >>> load_yaml("{rounds: 010, quiet: yes}")
        {'rounds': 10, 'quiet': True}
        >>> load_yaml("{rounds: 1, rounds: 2}")
        Traceback (most recent call last):
        ...
        yaml.error.MarkedYAMLError: 'rounds' is given twice, first in line 1
          in "<unicode string>", line 1, column 13
    """
    _check_events(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, loader)
        if isinstance(node, yaml.MappingNode):
            _check_options(node)
        return loader.construct_document(node)
    except ValueError as error:  # PyYAML's float pattern accepts `._`
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def describe_yaml_error(error: yaml.YAMLError) -> tuple[str, str]:
    """Return the place of an error, as in `, line 3` or empty, and its cause."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    cause = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return "" if mark is None else f", line {mark.line + 1}", cause


def _check_events(text: str) -> None:
    """Reject tags and deep nesting, before the recursive composition."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} levels of nesting", event)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_PLAIN_TAGS):
            raise _error(f"tag {tag} is not supported", event)


def _count_values(node: yaml.Node, counts: dict[int, int], loader: yaml.Loader) -> int:
    """Check the keys of a node and return its number of values, aliases expanded.

    Args:
        node: A node; the same object for each of its aliases.
        counts: Numbers of nodes by identity; 0 while the parts of a node are counted.
        loader: Converts keys to values.
    """
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise _error("an alias within its own value", node)
        return counts[id(node)]
    counts[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, loader)
        total += sum(_count_values(value, counts, loader) for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(item, counts, loader) for item in node.value)
    if total > MAX_VALUES:
        raise _error(f"more than {MAX_VALUES:,} values after aliases are expanded", node)
    counts[id(node)] = total
    return total


def _check_keys(mapping: yaml.MappingNode, loader: yaml.Loader) -> None:
    """Reject a key that is given twice."""
    lines: dict[Any, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("the key is not text or a number", key)
        value = key.value if key.tag == f"{_PREFIX}merge" else loader.construct_object(key)  # 1 and 01 are one key
        if value in lines:
            raise _error(f"{key.value!r} is given twice, first in line {lines[value]}", key)
        lines[value] = key.start_mark.line + 1


def _check_options(mapping: yaml.MappingNode) -> None:
    """Reject names of options that are not text.

    Mappings in values may have other keys.
    """
    for key, _ in mapping.value:
        if key.tag not in (f"{_PREFIX}str", f"{_PREFIX}merge"):
            raise _error(f"the key {key.value} is not text", key)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
