"""Where a configuration is found by its bare name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedekd.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent


def config_folders() -> list[Path]:
    """Folders that a bare name is looked up in: the user's own, the checkout's, the installed package's."""
    candidates = [Path("configs"), _PACKAGE.parent / "configs", _PACKAGE / "configs"]
    return [folder for folder in candidates if folder.is_dir()]


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
        if path.is_file()
    }
    raise UserError(f"--config {name}: there is no such file, here or in configs/; {nearest(name, known)}")


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
            configs += ["--config", str(find_config(name))]
        elif argument.startswith("--config="):
            configs += ["--config", str(find_config(argument.removeprefix("--config=")))]
        else:
            others.append(argument)
    return configs + others
