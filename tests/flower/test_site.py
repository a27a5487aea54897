"""One site: its own data, its own folder, and what it says to what it is asked."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict

from fedekd.configuration.options import parts_of
from fedekd.errors import UserError
from fedekd.federation.engines.client_store import ClientStore
from fedekd.flower import apps
from fedekd.flower.apps import Settings, make_client_app
from fedekd.flower.description import SPLITS
from fedekd.flower.messages import (
    ABSORB,
    HELLO,
    REFERENCE,
    SCORE,
    VISIT,
    from_arrays,
    note_of,
    packed,
    state_of,
    visit_from_json,
)
from fedekd.flower.rehearsal import write_site_data
from fedekd.flower.site import KEPT_VERSIONS, Site

from .conftest import SITES, Hospitals, same

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def new_sites() -> Iterator[None]:
    """No site of another test is at hand."""
    apps._site.cache_clear()
    yield
    apps._site.cache_clear()


def asked(what: str, note: dict[str, Any], state: Any = None) -> Message:
    """A message as it comes from the server."""
    return Message(packed(note, state), 5, what)


def visit(site: Site, version: int, round_idx: int, state: Any = None) -> Any:
    """One visit, of the server's first proxy unless another state is given."""
    proxy = site.spec.build_model("proxy", "server").state_dict() if state is None else state
    message = asked(VISIT, {"round": round_idx, "version": version, "look": None}, proxy)
    reply = Message(site.answer(message), reply_to=message)
    return visit_from_json(note_of(reply), from_arrays(state_of(reply)))


def files(folder: Path, number: int = 0) -> list[int]:
    """The versions on a site's disk."""
    found = (folder / f"site-{number:03d}/states").glob("*/*.pt")
    return sorted(int(path.stem.rpartition("-")[2]) for path in found)


@pytest.mark.parametrize("channels", [1, 3])
def test_data_of_its_own_are_what_it_was_dealt(
    channels: int, options: list[str], write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_blobs(tmp_path / "all.npz", 90, channels=channels, num_classes=4, seed=2)
    chosen = [*options, f"--data.dataset={path}", "--data.num_classes=4"]
    data = parts_of(chosen)["data"]
    written = write_site_data(data, tmp_path / "dealt")
    assert [own.relative_to(tmp_path).as_posix() for own in written] == [
        f"dealt/site-{number}/images.npz" for number in range(SITES)
    ]
    for number, own in enumerate(written):
        site = Site(chosen, number, SITES, tmp_path / "folder", data=str(own))
        client = data.clients[number]
        assert site.splits.client == site.number == number
        assert len(site.images) == len(client) < 90
        assert site.splits.digest(site.images) == client.digest(data.images)
        for split in SPLITS:
            mine, dealt = getattr(site.splits, split), getattr(client, split)
            assert torch.equal(site.images.pixels[mine], data.images.pixels[dealt]), split
            assert torch.equal(site.images.targets[mine], data.images.targets[dealt]), split
        assert site.images.num_classes == 4


def test_a_site_of_its_own_data_works_as_in_a_simulation(options: list[str], tmp_path: Path) -> None:
    [_, own, _] = write_site_data(parts_of(options)["data"], tmp_path / "dealt")
    sites = [
        Site(options, 1, SITES, tmp_path / "dealt one"),
        Site([*options, "--data.num_classes=3"], 1, SITES, tmp_path / "its own", data=str(own)),
    ]
    one, other = (visit(site, 0, 1) for site in sites)
    assert same(dict(one.update.state), dict(other.update.state))
    assert (one.score, one.logs, one.update.num_samples) == (other.score, other.logs, other.update.num_samples)


def test_it_writes_into_its_folder_alone(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    site = Site(options, 2, SITES, tmp_path / "folder")
    visit(site, 0, 0)
    site.answer(asked(REFERENCE, {"rounds": 1}))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"site-002"}
    assert files(tmp_path / "folder", 2) == [1]
    assert len(list((tmp_path / "folder/site-002/local").iterdir())) == 1


def test_a_version_that_is_not_there_is_one_line(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 1, SITES, tmp_path)
    for what in (VISIT, ABSORB):
        with pytest.raises(UserError, match=r"site 1 has no version 7 of its networks in .*begun in another") as caught:
            site.answer(asked(what, {"round": 1, "version": 7, "look": None}, {}))
        assert "\n" not in str(caught.value)
    assert files(tmp_path, 1) == []


def test_nor_can_it_be_scored(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="site 1 has no version 7"):
        Site(options, 1, SITES, tmp_path).answer(asked(SCORE, {"version": 7}))


def test_an_unknown_question_is_one_line(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.other"):
        Site(options, 1, SITES, tmp_path).answer(asked("train.other", {}))


def test_federations_in_one_folder_do_not_mix(options: list[str], tmp_path: Path) -> None:
    clean = Site(options, 1, SITES, tmp_path / "clean")
    visit(clean, 0, 0)
    visit(Site(options, 1, SITES, tmp_path / "both"), 0, 0)  # run A is stopped after round 0
    visit(Site([*options, "--seed=1"], 1, SITES, tmp_path / "both"), 0, 0)  # run B uses the same folder
    again = visit(Site(options, 1, SITES, tmp_path / "both"), 1, 1)  # run A goes on
    assert same(dict(again.update.state), dict(visit(clean, 1, 1).update.state))


def test_so_many_versions_are_kept(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 0, SITES, tmp_path)
    seen = []
    for version in range(KEPT_VERSIONS + 2):
        visit(site, version, 0)
        seen.append(files(tmp_path))
    assert seen[0] == [1]
    assert max(len(versions) for versions in seen) == KEPT_VERSIONS == 4
    assert seen[-1] == [3, 4, 5, 6]
    visit(site, 4, 0)  # the server has gone back to a checkpoint: what came after it is written anew
    assert files(tmp_path) == [3, 4, 5]


def test_so_many_are_kept_though_another_run_was_before(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 0, SITES, tmp_path)
    for version in range(KEPT_VERSIONS + 1):
        visit(site, version, 0)
    visit(site, 0, 0)
    assert 1 in files(tmp_path)
    assert len(files(tmp_path)) <= KEPT_VERSIONS


def test_the_same_version_gives_the_same_visit(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 0, SITES, tmp_path)
    visit(site, 0, 0)
    first = visit(site, 1, 1)
    visit(site, 2, 2)
    again = visit(Site(options, 0, SITES, tmp_path), 1, 1)
    assert same(dict(first.update.state), dict(again.update.state))
    assert (first.score, first.logs, first.supervised_rounds) == (again.score, again.logs, again.supervised_rounds)


def test_a_first_visit_that_failed_is_made_anew(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> None:
        raise OSError("the disk is full")

    clean = visit(Site(options, 0, SITES, tmp_path / "clean"), 0, 1)
    site = Site(options, 0, SITES, tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(ClientStore, "write", write)
        with pytest.raises(OSError, match="full"):
            visit(site, 0, 1)
    again = visit(site, 0, 1)
    assert again.supervised_rounds == clean.supervised_rounds == 1
    assert (again.score, again.logs) == (clean.score, clean.logs)
    assert same(dict(again.update.state), dict(clean.update.state))


def test_a_simulation_has_as_many_clients_as_sites(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.num_clients is 3, and there are 4 sites") as caught:
        Site(options, 0, 4, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sites": 3}, "the run configuration lacks 'options'"),
        ({"options": "--rounds 1"}, "the run configuration lacks 'sites'"),
        ({}, "the run configuration lacks 'options'"),
        ({"options": "", "sites": 0}, "sites is 0, and must be at least 1"),
        ({"options": "", "sites": 2, "timeout": -1.0}, r"timeout is -1\.0, and must be at least 0"),
        ({"options": "", "sites": 2, "wait": -0.5}, r"wait is -0\.5, and must be at least 0"),
        ({"options": "", "sites": 2, "wait": math.nan}, "wait is nan, and must be at least 0"),
        pytest.param(
            {"options": "--config 'mine.yaml", "sites": 2},
            "options",
        ),
        pytest.param(
            {"options": "", "sites": "three"},
            "sites",
        ),
        pytest.param(
            {"options": "", "sites": 2, "timeout": "1h"},
            "timeout",
        ),
    ],
)
def test_wrong_settings_are_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Settings.of(given)
    assert "\n" not in str(caught.value)


def test_settings_are_read_as_a_shell_would() -> None:
    told = {"options": "--config 'my own.yaml' --rounds 3", "sites": 2, "timeout": 60, "other": "left alone"}
    assert Settings.of(told) == Settings(("--config", "my own.yaml", "--rounds", "3"), 2, timeout=60)


def context(**node: Any) -> Context:
    return Context(1, 5, node, RecordDict(), {})


def test_a_node_says_which_site_it_is(options: list[str], tmp_path: Path) -> None:
    app = make_client_app(Settings(tuple(options), SITES, folder=str(tmp_path / "shared")))
    for node, number in ({"number": 2}, 2), ({"partition-id": 1, "num-partitions": 3}, 1), ({"number": 0, "a": 1}, 0):
        reply = app(asked(HELLO, {}), context(**node))
        assert note_of(reply)["number"] == number
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"site-000", "site-001", "site-002"}
    with pytest.raises(UserError, match="the node's configuration lacks 'number'"):
        app(asked(HELLO, {}), context(data="images.npz"))


def test_a_node_has_its_own_folder_data_and_options(options: list[str], hospitals: Hospitals, tmp_path: Path) -> None:
    [own, *_] = write_site_data(parts_of(options)["data"], tmp_path / "dealt")
    model = "--client.private_model=fedekd.models.ProxyCNN --data.num_classes=3"
    node = context(number=0, data=str(own), folder=str(tmp_path / "mine"), options=model)
    run_config = {"options": shlex.join(options), "sites": SITES, "folder": str(tmp_path / "shared")}
    node.run_config = run_config
    app = make_client_app()
    told = note_of(app(asked(HELLO, {}), node))
    assert told == hospitals_told(hospitals)
    assert not (tmp_path / "shared").exists()
    site = apps._site((*options, *shlex.split(model)), 0, SITES, str(tmp_path / "mine"), str(own))
    assert apps._site.cache_info().hits == 1
    assert type(site.host.engine.client(0).networks["private"]).__name__ == "ProxyCNN"


def hospitals_told(hospitals: Hospitals) -> dict[str, Any]:
    """What site 0 of the simulation tells."""
    message = asked(HELLO, {})
    return note_of(Message(hospitals.open(0).answer(message), reply_to=message))
