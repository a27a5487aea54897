"""Errors of atomic writes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fedekd.atomic import atomic_file


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), f"[Errno {errno.ECONNRESET}] reset"),
        (FileNotFoundError(errno.ENOENT, "gone", "other"), f"[Errno {errno.ENOENT}] gone: 'other'"),
        (OSError(errno.ENOSPC, "full"), f"[Errno {errno.ENOSPC}] full: 'FILE'"),
        (OSError(errno.EIO, "broken"), f"[Errno {errno.EIO}] broken: 'FILE'"),
    ],
)
def test_atomic_file_names_the_file_in_errors_of_the_write_only(error: OSError, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(type(error)) as caught, atomic_file(path):
        raise error
    assert str(caught.value) == text.replace("FILE", str(path))


def test_atomic_file_directory_in_place_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_file(tmp_path / "x"):
        pass
    assert str(caught.value) == f"[Errno {errno.EISDIR}] Is a directory: '{tmp_path / 'x'}'"
