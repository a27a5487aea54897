"""Values of YAML texts, and texts that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fedekd.configuration.yaml_files import describe_yaml_error, load_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-08", -8),
        ("0o10", "0o10"),
        ("1_000", 1000),
        ("0x10", 16),
        ("-0b11", -3),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1e-3", 0.001),
        ("1E5", 100_000.0),
        (".5", 0.5),
        ("yes", True),
        ("off", False),
        ("2020-01-01", "2020-01-01"),
        ("9" * 5001, "9" * 5001),
        ("!!int 3", 3),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("w: {0: 0.5, 1: 2.0}", {"w": {0: 0.5, 1: 2.0}}),
        ("", None),
    ],
)
def test_load_yaml_scalar_has_one_value(text: str, value: Any) -> None:
    loaded = load_yaml(text)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  b: 1\n", 3, "'b' is given twice, first in line 2"),
        ("- {a: 1}\n- {a: 1, a: 1}\n", 2, "'a' is given twice, first in line 2"),
        ("a: " + "[" * 500 + "]" * 500, 1, "more than 50 levels of nesting"),
        ("".join(" " * depth + "a:\n" for depth in range(500)), 51, "more than 50 levels of nesting"),
        (BOMB, 5, "more than 100,000 values after aliases are expanded"),
        ("a: &a [*a]", 1, "an alias within its own value"),
        ("a: !!python/object:os.system x", 1, "tag tag:yaml.org,2002:python/object:os.system is not supported"),
        ("a: !!set {x}", 1, "tag tag:yaml.org,2002:set is not supported"),
        ("3: 1", 1, "the key 3 is not text"),
        ("? [a]\n: 1", 1, "the key is not text or a number"),
        ("w:\n  0: 1\n  0: 2\n", 3, "'0' is given twice, first in line 2"),
        ("w:\n  1: 1\n  01: 2\n", 3, "'01' is given twice, first in line 2"),
        ("a: *b", 1, "found undefined alias"),
    ],
)
def test_load_yaml_ambiguous_or_unbounded_text_raises(text: str, line: int, cause: str) -> None:
    with pytest.raises(yaml.YAMLError) as raised:
        load_yaml(text)
    place, reason = describe_yaml_error(raised.value)
    assert (place, reason) == (f", line {line}", cause)
