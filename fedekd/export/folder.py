"""Folder of an export: all files appear at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedekd.atomic import name_in_errors
from fedekd.errors import UserError, require, shorten_path

CARD, CARD_TEXT = "model_card.json", "model_card.md"
"""Names of the cards; the first lists the other files of an export."""


def check_folder(folder: Path) -> None:
    """Check that a folder can be created, or has an earlier export and nothing else.

    Raises:
        UserError: If it is a file, the root of the file system, or has other content.
    """
    require(folder.absolute().name != "", "--output", "a folder", str(folder))
    _restore(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: expected a folder, got the file {shorten_path(folder)}")
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise UserError(
            f"--output: expected a new folder or one of an earlier export, got {shorten_path(folder)}, which has other"
            " files"
        )


def _is_export(folder: Path) -> bool:
    """Check that all entries of a folder are files that its card names, or a card."""
    try:
        names = {entry["name"] for entry in json.loads((folder / CARD).read_bytes())["files"]} | {CARD, CARD_TEXT}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    return all(path.name in names and path.is_file() for path in folder.iterdir())


def _temporary(target: Path) -> tuple[Path, Path]:
    """Return the paths of the new and of the earlier folder during `write_folder`."""
    return target.with_name(f".{target.name}.new.tmp"), target.with_name(f".{target.name}.old.tmp")


def _restore(folder: Path) -> None:
    """Restore the earlier export after a killed `write_folder`, and remove its draft."""
    target = folder.absolute()
    draft, old = _temporary(target)
    if old.is_dir() and not target.exists():
        old.rename(target)
    for path in (draft, old):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that appears with all its files; an earlier export is replaced.

    A process that is killed leaves the earlier folder, none, or the new one, and never a part of it. Without one, the
    next call restores the earlier folder. Two processes must not write the same folder at once.

    Args:
        folder: Folder to create or replace.
        files: Content of each file by name.

    Raises:
        OSError: If a file cannot be written; the error names the folder.
    """
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, old = _temporary(target)
    with name_in_errors(folder, draft):
        _restore(folder)
        try:
            draft.mkdir()
            for name, content in files.items():
                with (draft / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if target.exists():
                target.rename(old)
            draft.rename(target)
        finally:
            _restore(folder)
