"""Lookup of configuration files by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from fedekd.configuration.yaml_files import describe_yaml_error, load_yaml
from fedekd.errors import UserError, nearest, shorten, shorten_path

_PACKAGE = Path(__file__).resolve().parent.parent

#: Keys whose value is a mapping of options.
_GROUPS = {"data", "client", "trainer"}

#: Largest configuration. A device such as /dev/zero has no end.
_MAX_BYTES = 1_000_000


def config_folders() -> list[Path]:
    """Return the existing folders in which a name is searched, in order."""
    candidates = [Path("configs"), _PACKAGE / "configs"]
    if (_PACKAGE.parent / "orchestrator.py").is_file():  # a checkout; site-packages/configs may be of another package
        candidates.insert(1, _PACKAGE.parent / "configs")
    return [folder for folder in candidates if folder.is_dir()]


def shipped_folder() -> Path:
    """Return the folder of the configurations that belong to this code."""
    checkout = _PACKAGE.parent / "configs"
    return checkout if (_PACKAGE.parent / "orchestrator.py").is_file() else _PACKAGE / "configs"


def find_config(name: str) -> Path:
    """Return the file of `--config NAME`: the path `NAME`, or a file in `configs/`.

    Raises:
        UserError: If there is no such file.
    """
    with suppress(OSError):  # a name that is too long
        if Path(name).is_dir():
            raise UserError(f"--config {name}: expected a YAML file, got a directory")
        if Path(name).exists():
            return Path(name)
        for folder in config_folders():
            if (folder / name).is_file():
                return folder / name
    known = {
        str(path.relative_to(folder))
        for folder in config_folders()
        for path in folder.rglob("*.yaml")
        if path.is_file() and path.parent.name != "sweeps"  # those are for wandb
    }
    raise UserError(
        f"--config {shorten_path(name)}: expected a YAML file, got a name that is neither a path nor in configs/."
        f" {nearest(name, known)}"
    )


def _argument(name: str) -> str:
    """Return the path of a regular file, or the text of a pipe, read once.

    Raises:
        UserError: If it has no keys and values; jsonargparse would not name the file.
    """
    if not name:
        raise UserError("--config: expected the name of a file, got nothing")
    label = f"--config {shorten_path(name)}"
    path = Path("/dev/stdin") if name == "-" else find_config(name)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{label}: expected a file that can be read. {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{label}: expected at most {_MAX_BYTES:,} bytes, got more")
    try:
        text = content.decode()
        values = load_yaml(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: expected text in UTF-8, got {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        place, cause = describe_yaml_error(error)
        raise UserError(f"{label}{place}: invalid YAML: {cause}") from error
    _require_groups(values, label)
    return str(path) if path.is_file() else text


def _require_groups(values: object, label: str) -> None:
    """Check the types of a configuration and of its groups."""
    if values is None:
        raise UserError(f"{label}: expected keys and values, got an empty file")
    if not isinstance(values, dict):
        raise UserError(f"{label}: expected keys and values, got {shorten(repr(values))}")
    for name in sorted(_GROUPS & values.keys()):
        if not isinstance(values[name], dict | str):
            raise UserError(f"{label}: {name}: expected keys and values, got {_to_yaml(values[name])}")
    if "config" in values and not isinstance(values["config"], str):
        raise UserError(f"{label}: config: expected the name of a file, got {_to_yaml(values['config'])}")


def _to_yaml(value: object) -> str:
    return "null" if value is None else shorten(str(value))


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Return the arguments with each `--config` checked and moved to the front.

    jsonargparse applies arguments in order: a configuration would overwrite the values given before it.
    """
    configs, others = [], []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config":
            configs.append(f"--config={_argument(next(rest, ''))}")
        elif argument.startswith("--config="):
            configs.append(f"--config={_argument(argument.removeprefix('--config='))}")
        else:
            others.append(argument)
    return configs + others
