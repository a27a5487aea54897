"""Where a configuration is found by its bare name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from fedekd.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent

#: Keys that hold others.
_GROUPS = {"data", "client", "trainer"}


def config_folders() -> list[Path]:
    """Folders that a bare name is looked up in: the user's own, the checkout's, the installed package's."""
    candidates = [Path("configs"), _PACKAGE / "configs"]
    if (_PACKAGE.parent / "orchestrator.py").is_file():  # a checkout; where packages are installed, it is anybody's
        candidates.insert(1, _PACKAGE.parent / "configs")
    return [folder for folder in candidates if folder.is_dir()]


def shipped_folder() -> Path:
    """The folder of the configurations that belong to this code: the checkout's, or the installed package's."""
    checkout = _PACKAGE.parent / "configs"
    return checkout if (_PACKAGE.parent / "orchestrator.py").is_file() else _PACKAGE / "configs"


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: a path as it is, or a file of `configs/`.

    Raises:
        UserError: If there is none.
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
    raise UserError(f"--config {name}: there is no such file, here or in configs/; {nearest(name, known)}")


def _readable(path: Path) -> Path:
    """The path of a file that holds keys and values.

    Raises:
        UserError: If it holds something else; a parser says less clearly what, and not in which file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from error
    if values is None:
        raise UserError(f"--config {path} is empty")
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold keys and values, not {str(values)[:60]!r}")
    for name in _GROUPS & values.keys():
        if not isinstance(values[name], dict | str):
            raise UserError(f"--config {path}: {name} is {_shown(values[name])}, and must hold keys and values")
    if "config" in values and not isinstance(values["config"], str):
        raise UserError(f"--config {path}: config is {_shown(values['config'])}, and must be the name of a file")
    return path


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """The arguments with every `--config NAME` as a path, and moved to the front.

    A parser applies what it reads in order, so that a value given before a configuration would be lost silently.
    """
    configs, others = [], []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config":
            name = next(rest, None)
            if name is None:
                raise UserError("--config needs the name of a file")
            configs += ["--config", str(_readable(find_config(name)))]
        elif argument.startswith("--config="):
            configs += ["--config", str(_readable(find_config(argument.removeprefix("--config="))))]
        else:
            others.append(argument)
    return configs + others
