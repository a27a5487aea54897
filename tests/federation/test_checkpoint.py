"""Checkpoints: only complete ones are loaded."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import fedekd.federation.checkpoint
from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.errors import UserError
from fedekd.federation.checkpoint import CheckpointStore, pack, unpack


def state(value: float) -> dict[str, Any]:
    tensor = {"weight": torch.full((3,), value)}
    return {"networks": {"private": tensor}, "optimizers": {"private": tensor}, "supervised_epochs": int(value)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints of two clients; only client 0 took part in the second."""
    store = CheckpointStore(tmp_path)
    store.save(1, {"note": 0.1}, {"w": torch.zeros(1)}, {0: state(1), 1: state(2)}.items())
    store.save(2, {"note": 0.2}, {"w": torch.ones(1)}, {0: state(3)}.items())
    return store


def weight(client: Any) -> float:
    return float(client["networks"]["private"]["weight"][0])


def test_load_copied_manifest_is_ignored(store: CheckpointStore) -> None:
    content = (store.folder / "manifest-0002.json").read_text()
    for name in ("manifest-0002 (copy).json", "manifest-7.json", "manifest-0009.json.json"):
        (store.folder / name).write_text(content)
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert (checkpoint.round, messages) == (2, [])
    store.save(3, {}, {}, ())
    assert (store.folder / "manifest-0002 (copy).json").exists()


def test_load_newest_uses_the_older_file_of_an_absent_client(store: CheckpointStore) -> None:
    checkpoint, messages = store.load()
    assert messages == []
    assert checkpoint is not None
    assert (checkpoint.round, checkpoint.notes) == (2, {"note": 0.2})
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [3, 2]
    assert checkpoint.server["w"].item() == 1


@pytest.mark.parametrize("name", ["states-0002.bin", "manifest-0002.json"])
@pytest.mark.parametrize("fault", ["cut", "changed", "gone"])
def test_load_corrupt_file_falls_back_to_the_previous_round(store: CheckpointStore, name: str, fault: str) -> None:
    path = store.folder / name
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "changed":
        path.write_bytes(content[:-50].replace(b"0", b"1") + content[-50:])
    else:
        path.unlink()
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert checkpoint.round == 1
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [1, 2]
    assert len(messages) == (0 if (name.startswith("manifest") and fault == "gone") else 1)
    assert all("round 2 is corrupt" in message for message in messages)


def test_save_after_a_fallback_replaces_the_corrupt_round(store: CheckpointStore) -> None:
    (store.folder / "states-0002.bin").write_bytes(b"")
    store.load()
    store.save(2, {}, {"w": torch.full((1,), 5.0)}, {0: state(7)}.items())
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert messages == []
    assert (checkpoint.round, weight(checkpoint.clients[0]), weight(checkpoint.clients[1])) == (2, 7, 2)


def test_load_all_corrupt_returns_none_and_save_removes_them(store: CheckpointStore) -> None:
    for path in store.folder.glob("states-*"):
        path.unlink()
    checkpoint, messages = store.load()
    assert checkpoint is None
    assert len(messages) == 2
    store.save(1, {}, {"w": torch.zeros(1)}, {0: state(1), 1: state(1)}.items())
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert (checkpoint.round, messages) == (1, [])


@pytest.mark.parametrize(
    ("old", "new"), [(": 0.2", ": 0.3"), ('"round": 2', '"round": 3'), ("client-001", "client-003"), ("note", "nota")]
)
def test_load_manifest_with_one_flipped_bit_falls_back(store: CheckpointStore, old: str, new: str) -> None:
    path = store.folder / "manifest-0002.json"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    checkpoint, [message] = store.load()
    assert checkpoint is not None
    assert (checkpoint.round, checkpoint.notes) == (1, {"note": 0.1})
    assert "round 2 is corrupt" in message


@pytest.mark.parametrize(("changes", "layout"), [({"format": 3}, "3"), ({"format": None}, "none")])
def test_load_manifest_of_another_version_raises(store: CheckpointStore, changes: dict[str, Any], layout: str) -> None:
    path = store.folder / "manifest-0002.json"
    content = unseal_json(path.read_bytes())
    path.write_bytes(seal_json({**content, **changes}))
    for read in (store.load, store.notes, store.digests):
        with pytest.raises(UserError, match=f"manifest-0002.json: expected format 5, got {layout}. Another version"):
            read()
    CheckpointStore(store.folder).save(3, {"note": 3}, {}, {0: state(1)}.items())  # as at a site after training
    checkpoint, messages = CheckpointStore(store.folder).load()
    assert checkpoint is not None
    assert (checkpoint.round, checkpoint.notes, list(checkpoint.clients), messages) == (3, {"note": 3}, [0], [])


def test_load_manifest_without_its_checksum_falls_back(store: CheckpointStore) -> None:
    path = store.folder / "manifest-0002.json"
    path.write_text(json.dumps(unseal_json(path.read_bytes()), indent=1))
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert (checkpoint.round, len(messages)) == (1, 1)


@pytest.mark.parametrize("damaged", ["manifest-0001.json", "manifest-0002.json"])
def test_save_with_a_damaged_older_manifest_keeps_its_files(store: CheckpointStore, damaged: str) -> None:
    store.load()
    (store.folder / damaged).write_text("{")
    (store.folder / "states-0000.bin").write_bytes(b"")  # of the damaged manifest, or not needed
    before = {path.name for path in store.folder.glob("*.bin")}
    store.save(3, {}, {"w": torch.zeros(1)}, {0: state(5)}.items())
    checkpoint, messages = CheckpointStore(store.folder).load()
    assert checkpoint is not None
    assert (checkpoint.round, messages) == (3, [])
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [5, 2]
    names = {path.name for path in store.folder.glob("*.bin")}
    assert (before < names) == (damaged == "manifest-0002.json")


def test_save_many_rounds_keeps_two_checkpoints(store: CheckpointStore) -> None:
    for round_idx in range(3, 8):
        store.save(round_idx, {}, {"w": torch.zeros(1)}, {0: state(round_idx)}.items())
    names = sorted(path.name for path in store.folder.iterdir())
    states = [f"states-000{round_idx}.bin" for round_idx in (1, 6, 7)]  # client 1 is a third of the first
    assert names == ["manifest-0006.json", "manifest-0007.json", *states]
    checkpoint, _ = CheckpointStore(store.folder).load()
    assert checkpoint is not None
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [7, 2]


def test_save_with_partial_participation_needs_at_most_three_times_the_live_states(tmp_path: Path) -> None:
    store, size = CheckpointStore(tmp_path), len(pack(state(1)))
    latest = dict[int, int]()
    generator = random.Random(0)
    for round_idx in range(1, 40):
        clients = range(20) if round_idx == 1 else generator.sample(range(20), 3)
        latest |= dict.fromkeys(clients, round_idx)
        store.save(round_idx, {}, {}, ((number, state(round_idx)) for number in clients))
        written = (tmp_path / f"states-{round_idx:04d}.bin").stat().st_size
        assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) <= 3 * 20 * size + 2 * written
    checkpoint, messages = CheckpointStore(tmp_path).load()
    assert checkpoint is not None
    assert messages == []
    assert {number: int(weight(client)) for number, client in checkpoint.clients.items()} == latest


def test_save_of_the_same_round_keeps_the_other_clients(store: CheckpointStore) -> None:
    store.save(2, {}, {}, {1: state(8)}.items())
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert messages == []
    assert [weight(checkpoint.clients[0]), weight(checkpoint.clients[1])] == [3, 8]


@pytest.mark.parametrize("calls", [0, 1])
def test_save_disk_full_leaves_the_last_checkpoint_valid(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    fsync_file, calls_left = os.fsync, [calls]

    def fsync(descriptor: int) -> None:
        calls_left[0] -= 1
        if calls_left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync_file(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        store.save(3, {}, {"w": torch.zeros(1)}, {0: state(9), 1: state(9)}.items())
    checkpoint, messages = store.load()
    assert checkpoint is not None
    assert (checkpoint.round, messages) == (2, [])
    assert not list(store.folder.glob("*.tmp"))


@pytest.mark.parametrize("calls", range(3))  # the changed state, the copied one, the server's
def test_save_failed_write_raises_and_leaves_the_last_checkpoint_valid(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with atomic_file(path) as file:
            writes = count()

            class Full:
                tell = file.tell

                def write(self, content: bytes) -> None:
                    if next(writes) == calls:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    file.write(content)

            yield Full()

    monkeypatch.setattr(fedekd.federation.checkpoint, "atomic_file", full)
    with pytest.raises(OSError, match="No space"):
        store.save(2, {}, {"w": torch.zeros(1)}, {1: state(9)}.items())
    checkpoint, messages = CheckpointStore(store.folder).load()
    assert checkpoint is not None
    assert (checkpoint.round, messages, weight(checkpoint.clients[0])) == (2, [], 3)


def test_pack_equal_states_give_equal_bytes_and_unpack_runs_no_code() -> None:
    assert pack(state(1)) == pack(state(1))
    assert pack(unpack(pack(state(1)))) == pack(state(1))
    assert pack(state(1)) != pack(state(2))

    class RunsCode:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    with pytest.raises(Exception, match=r"[Ww]eights"):
        unpack(pack({"code": RunsCode()}))
