"""A checkpoint is whole or it does not count."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.federation.checkpoint import CheckpointStore
from fedekd.federation.storage import pack, unpack


def state(value: float) -> dict[str, Any]:
    tensor = {"weight": torch.full((3,), value)}
    return {"networks": {"private": tensor}, "optimizers": {"private": tensor}, "supervised_epochs": int(value)}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints of two clients; only client 0 took part in the second."""
    folder = CheckpointStore(tmp_path)
    folder.save(1, {"note": 0.1}, {"w": torch.zeros(1)}, {0: state(1), 1: state(2)}.items())
    folder.save(2, {"note": 0.2}, {"w": torch.ones(1)}, {0: state(3)}.items())
    return folder


def weight(client: Any) -> float:
    return float(client["networks"]["private"]["weight"][0])


def test_a_copied_manifest_is_none(folder: CheckpointStore) -> None:
    content = (folder.folder / "manifest-0002.json").read_text()
    for name in ("manifest-0002 (copy).json", "manifest-7.json", "manifest-0009.json.json"):
        (folder.folder / name).write_text(content)
    checkpoint, complaints = folder.load()
    assert checkpoint is not None
    assert (checkpoint.round, complaints) == (2, [])
    folder.save(3, {}, {}, ())
    assert (folder.folder / "manifest-0002 (copy).json").exists()


def test_newest_is_loaded_with_the_older_file_of_an_absent_client(folder: CheckpointStore) -> None:
    checkpoint, complaints = folder.load()
    assert complaints == []
    assert checkpoint is not None
    assert (checkpoint.round, checkpoint.notes) == (2, {"note": 0.2})
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [3, 2]
    assert checkpoint.server["w"].item() == 1


@pytest.mark.parametrize("name", ["client-000-0002.pt", "server-0002.pt", "manifest-0002.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_falls_back_to_the_round_before_and_says_so(folder: CheckpointStore, name: str, damage: str) -> None:
    path = folder.folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:-50].replace(b"0", b"1") + content[-50:])
    else:
        path.unlink()
    checkpoint, complaints = folder.load()
    assert checkpoint is not None
    assert checkpoint.round == 1
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [1, 2]
    assert len(complaints) == (0 if (name.startswith("manifest") and damage == "gone") else 1)
    assert all("round 2 is damaged" in complaint for complaint in complaints)


def test_going_on_after_a_fall_back_makes_the_new_round_count(folder: CheckpointStore) -> None:
    (folder.folder / "server-0002.pt").write_bytes(b"")
    folder.save(2, {}, {"w": torch.full((1,), 5.0)}, {0: state(7)}.items())
    checkpoint, complaints = folder.load()
    assert checkpoint is not None
    assert complaints == []
    assert (checkpoint.round, weight(checkpoint.clients[0]), weight(checkpoint.clients[1])) == (2, 7, 2)


def test_all_damaged_starts_anew_and_is_not_outlived_by_the_damaged(folder: CheckpointStore) -> None:
    for path in folder.folder.glob("server-*"):
        path.unlink()
    checkpoint, complaints = folder.load()
    assert checkpoint is None
    assert len(complaints) == 2
    folder.save(1, {}, {"w": torch.zeros(1)}, {0: state(1), 1: state(1)}.items())
    checkpoint, complaints = folder.load()
    assert checkpoint is not None
    assert (checkpoint.round, complaints) == (1, [])


def test_only_two_checkpoints_are_kept(folder: CheckpointStore) -> None:
    for round_idx in range(3, 8):
        folder.save(round_idx, {}, {"w": torch.zeros(1)}, {0: state(round_idx)}.items())
    names = sorted(path.name for path in folder.folder.iterdir())
    assert names == [
        "client-000-0006.pt",
        "client-000-0007.pt",
        "client-001-0001.pt",
        "manifest-0006.json",
        "manifest-0007.json",
        "server-0006.pt",
        "server-0007.pt",
    ]


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, [2]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        folder.save(3, {}, {"w": torch.zeros(1)}, {0: state(9), 1: state(9)}.items())
    checkpoint, complaints = folder.load()
    assert checkpoint is not None
    assert (checkpoint.round, complaints) == (2, [])
    assert not list(folder.folder.glob("*.tmp"))


def test_equal_states_are_equal_bytes_and_no_code_is_run_on_reading() -> None:
    assert pack(state(1)) == pack(state(1))
    assert pack(unpack(pack(state(1)))) == pack(state(1))
    assert pack(state(1)) != pack(state(2))

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    with pytest.raises(Exception, match=r"[Ww]eights"):
        unpack(pack({"evil": Evil()}))
