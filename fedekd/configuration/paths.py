"""Paths in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fedekd.data.formats import format_of
from fedekd.data.formats.hugging_face import is_hugging_face


def copy_paths(values: Mapping[str, Any], config: Namespace) -> None:
    """Set the paths of a configuration to those of another one.

    Args:
        values: A configuration, as `with_absolute_paths` returns it.
        config: The configuration that is changed.
    """
    for section, name in (("data", "root"), ("data", "sites"), ("data", "dataset"), ("client", "private_weights")):
        config[f"{section}.{name}"] = values[section][name]


def with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with absolute paths, for commands in another working folder.

    These are the paths of data and of private weights. Symbolic links are kept: the suffix of a link, not of its
    target, is that of the format.
    """
    data, client = dict(config["data"]), dict(config["client"])
    data["root"] = _absolute(data["root"])
    if isinstance(data["sites"], str):
        data["sites"] = _absolute(data["sites"])
    elif data["sites"] is not None:
        data["sites"] = {name: _absolute_data(path) for name, path in data["sites"].items()}
    if data["dataset"] is not None:
        data["dataset"] = _absolute_data(data["dataset"])
    if client["private_weights"] is not None:
        client["private_weights"] = _absolute(client["private_weights"])
    return {**config, "data": data, "client": client}


def _absolute_data(source: Any) -> Any:
    """Return an absolute path of a file or folder; other data sets unchanged."""
    if not isinstance(source, str):
        return source
    path = Path(source).expanduser()
    return source if format_of(path) is None or is_hugging_face(path) else _absolute(source)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
