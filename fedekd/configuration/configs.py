"""Lookup of configuration files by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from fedekd.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent

#: Keys whose value is a mapping of options.
_GROUPS = {"data", "client", "trainer"}


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
    if Path(name).is_file():
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
    raise UserError(f"--config {name}: file not found, neither here nor in configs/; {nearest(name, known)}")


def _validated(path: Path) -> Path:
    """Return the path after checking that the file holds keys and values.

    Raises:
        UserError: If it does not; jsonargparse would not name the file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: expected text in UTF-8, got {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: invalid YAML: {error}") from error
    if values is None:
        raise UserError(f"--config {path}: the file is empty")
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected keys and values, got {str(values)[:60]!r}")
    for name in _GROUPS & values.keys():
        if not isinstance(values[name], dict | str):
            raise UserError(f"--config {path}: {name}: expected keys and values, got {_to_yaml(values[name])}")
    if "config" in values and not isinstance(values["config"], str):
        raise UserError(f"--config {path}: config: expected the name of a file, got {_to_yaml(values['config'])}")
    return path


def _to_yaml(value: object) -> str:
    return "null" if value is None else str(value)


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Return the arguments with each `--config NAME` as a path, moved to the front.

    jsonargparse applies arguments in order: a configuration would overwrite the values given before it.
    """
    configs, others = [], []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config":
            name = next(rest, None)
            if name is None:
                raise UserError("--config: expected the name of a file, got nothing")
            configs += ["--config", str(_validated(find_config(name)))]
        elif argument.startswith("--config="):
            configs += ["--config", str(_validated(find_config(argument.removeprefix("--config="))))]
        else:
            others.append(argument)
    return configs + others
