"""Atomic file writes, and checksums in files that are read back.

A write is atomic also if the process is killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedekd.errors import NO_ROOM

#: First bytes of the trailer of `seal`; the SHA-256 of the content follows.
_MAGIC = b"fedekd:sha256:"

#: Errors of `write` and `fsync`, which name no file.
_WRITE_ERRORS = (*NO_ROOM, errno.EIO, errno.ESTALE)

#: Names of the drafts of `atomic_file`.
DRAFTS = ".*.tmp"

#: Last member of a JSON object of `seal_json`: the SHA-256 of all bytes before it.
_JSON_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n?')


def digest(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def seal(content: bytes) -> bytes:
    """Append a trailer with the SHA-256 of the content."""
    return content + _MAGIC + hashlib.sha256(content).digest()


def unseal(content: bytes) -> bytes:
    """Return the content of `seal`.

    Raises:
        ValueError: If the trailer is missing or does not match.
    """
    body = content[: -len(_MAGIC) - hashlib.sha256().digest_size]
    if not body or content != seal(body):
        raise ValueError("it does not match its SHA-256")
    return body


def seal_json(values: Mapping[str, Any]) -> bytes:
    """Serialize a JSON object whose last member is the SHA-256 of all before it."""
    body = json.dumps(dict(values), indent=1).encode().removesuffix(b"\n}")
    return body + f',\n "sha256": "{digest(body)}"\n}}\n'.encode()


def unseal_json(content: bytes) -> dict[str, Any]:
    """Return the object of `seal_json`, without the checksum.

    Raises:
        ValueError: If the checksum is missing or does not match.
    """
    body = content[: content.rfind(b',\n "sha256"')]
    trailer = _JSON_SEAL.fullmatch(content[len(body) :])
    if trailer is None or digest(body) != trailer[1].decode():
        raise ValueError("it does not match its SHA-256")
    values: dict[str, Any] = json.loads(body + b"\n}")
    return values


@contextmanager
def name_in_errors(path: str | os.PathLike[str], *drafts: Path) -> Iterator[None]:
    """Context manager: name a file in errors of its writes, or of a draft.

    Other errors, as of a network that is read meanwhile, stay unchanged.
    """
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in _WRITE_ERRORS
        if is_unnamed or error.filename in map(str, drafts):
            error.filename = os.fspath(path)
            del error.filename2  # None would be printed
        raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager: open a file that replaces `path` once it is on disk.

    The bytes go to a draft in the same folder, since a rename is atomic only within one file system. It is flushed and
    synced before it replaces the target. If the block raises, the target is unchanged. Missing folders are created.

    Args:
        path: File to create or replace.

    Yields:
        A binary file, open for writing.

    Raises:
        OSError: If the file cannot be written; the error names the target.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A random name keeps apart the runs that share a folder: threads, processes and machines.
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with name_in_errors(target, draft):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


def remove_drafts(folder: Path, min_age: float = 0.0) -> None:
    """Remove drafts of `atomic_file` that killed processes left in a folder.

    Args:
        folder: Folder; may be missing.
        min_age: Seconds since the last write. A folder with several writers needs more than the time of a write.
    """
    for draft in folder.glob(DRAFTS):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime >= min_age:
                draft.unlink()
