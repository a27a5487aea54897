"""Folder of an export: all files appear at once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedekd.atomic import name_in_errors
from fedekd.errors import UserError, shorten_path

CARD = "model_card.json"
"""Name of the card, by which a folder of an export is recognised."""


def check_folder(folder: Path) -> None:
    """Check that a folder can be created, or is one of an earlier export.

    Raises:
        UserError: If it is a file, or has other content.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: expected a folder, got the file {shorten_path(folder)}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file():
        raise UserError(
            f"--output: expected a new folder or one of an earlier export, got {shorten_path(folder)}, which has other"
            " files"
        )


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that appears with all its files; an earlier export is replaced.

    A process that is killed leaves the earlier folder, none, or the new one, and never a part of it.

    Args:
        folder: Folder to create or replace.
        files: Content of each file by name.

    Raises:
        OSError: If a file cannot be written; the error names the folder.
    """
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    old = draft.with_suffix(".old.tmp")
    with name_in_errors(folder, draft):
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
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(draft, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):
                if old.exists():
                    shutil.rmtree(old)
