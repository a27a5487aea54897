"""Sites in this process, and between them and the server a grid that can lose, delay and alter what it carries."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch

from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RunFolder, SilentObserver
from fedekd.federation.shared_specification import shared_specification
from fedekd.federation.storage import unpack
from fedekd.methods import FederationSpec, Method

if find_spec("flwr") is not None:
    from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedekd.flower.description import SiteData, recipe, require_agreement
    from fedekd.flower.engine import FlowerEngine, wait_for_sites
    from fedekd.flower.messages import ABSORB, NOTE, STATE, VISIT, note_of, packed
    from fedekd.flower.secure import SecureAggregation
    from fedekd.flower.site import Site
else:  # every test here says that it is skipped
    Grid = object

SITES = 3

#: Flower's numbers of the sites' nodes, which are nothing like the sites' own.
NODES = {0: 930, 1: 920, 2: 910, 3: 900, 4: 890}

Answer = Callable[[], "Message"]
Meddler = Callable[["Message", Answer], "Message | None"]


def carried(message: Message) -> Message:
    """What comes out of a wire: written to bytes by Flower, and read again."""
    return message_from_proto(type(proto := message_to_proto(message)).FromString(proto.SerializeToString()))


def failure(message: Message, error: Exception) -> Message:
    """What Flower answers for a client app that has raised an error."""
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class FakeGrid(Grid):
    """Hands each message to whoever stands at its node; the answers come back in the opposite order.

    Attributes:
        nodes: By Flower's number of a node, the site there, or what it says to a message. Who is not there is offline.
        meddle: Is given a message and what gets its answer, and says what the server is handed; None is nothing.
        sent: The messages that have arrived at a node.
        answers: The answers that have arrived at the server.
        waited: The type of each batch of messages, and how long the server waits for the answers.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Site | Callable[[Message], RecordDict]] = {}
        self.meddle: Meddler = lambda message, answer: answer()
        self.sent: list[Message] = []
        self.answers: list[Message] = []
        self.waited: list[tuple[str, float | None]] = []

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        self.waited += [(message.metadata.message_type, timeout) for message in messages[:1]]
        found = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's own grids do
            reply = self._reply(carried(message))
            assert reply is not None or timeout is not None, f"the server would wait for ever: {message.metadata}"
            if reply is not None:
                found.append(carried(reply))
        self.answers += found
        return found[::-1]

    def _reply(self, message: Message) -> Message | None:
        there = self.nodes.get(message.metadata.dst_node_id)
        if there is None:
            return create_message_error_unavailable_res_message(message.metadata, "node_unavail")
        self.sent.append(message)

        def answer() -> Message:
            try:
                said = there.answer(message) if isinstance(there, Site) else there(message)
            except Exception as error:
                return failure(message, error)
            return Message(said, reply_to=message)

        return self.meddle(message, answer)


def at(number: int, round_idx: int, meddler: Meddler) -> Meddler:
    """Meddle with what one site is asked in one round, and with nothing else."""

    def meddle(message: Message, answer: Answer) -> Message | None:
        asked = message.metadata.message_type in (VISIT, ABSORB) and note_of(message)["round"] == round_idx
        meant = asked and message.metadata.dst_node_id == NODES[number]
        return meddler(message, answer) if meant else answer()

    return meddle


def lost(message: Message, answer: Answer) -> None:
    """The message never arrives."""


def late(message: Message, answer: Answer) -> None:
    """The site does its work, and nobody waits for it."""
    answer()


def broken(message: Message, answer: Answer) -> Message:
    """The site cannot do its work."""
    return failure(message, OSError("the disk is full"))


def dead(message: Message, answer: Answer) -> Message:
    """The site goes offline before it has answered, and the SuperLink says so in its place."""
    answer()
    return create_message_error_unavailable_res_message(message.metadata, "node_unavail")


def told(**said: Any) -> Meddler:
    """The site says something else in its note."""

    def meddle(message: Message, answer: Answer) -> Message:
        reply = answer()
        reply.content[NOTE] = packed({**note_of(reply), **said})[NOTE]
        return reply

    return meddle


def noted(text: str) -> Meddler:
    """The site's note is this text."""

    def meddle(message: Message, answer: Answer) -> Message:
        reply = answer()
        reply.content[NOTE] = ConfigRecord({"json": text})
        return reply

    return meddle


def altered(change: Callable[[dict[str, Array]], None]) -> Meddler:
    """The site sends other arrays."""

    def meddle(message: Message, answer: Answer) -> Message:
        reply = answer()
        change(reply.content.array_records[STATE])
        return reply

    return meddle


class Watch(SilentObserver):
    """Notes warnings and rows; before each round does what it is asked, and after one stops the server."""

    def __init__(self, before: Callable[[int], Any] | None = None, stop_after: int | None = None) -> None:
        self.warnings: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.before, self.stop_after = before, stop_after

    def round_started(self, round_idx: int) -> None:
        if self.before is not None:
            self.before(round_idx)

    def round_finished(self, row: Any) -> None:
        self.rows.append(dict(row))
        if row["round"] == self.stop_after:
            raise StoppedError

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class StoppedError(Exception):
    """The server's process has ended."""


def built(options: Sequence[str]) -> tuple[Method, FederatedDataModule, FederationSpec]:
    """A method, its data and its spec, as a site makes them."""
    parts = parts_of(options)
    given = [parts[name] for name in ("method", "data", "client", "trainer", "rounds", "seed")]
    return parts["method"], parts["data"], shared_specification(*given, SITES)


class Hospitals:
    """Sites with a folder each, and a server of the same options.

    Args:
        folder: Where theirs are made.
        options: As those of `fit`.
        local: Where Local's references of the same clients are: the sites find them in their folders.
        sites: How many there are.
    """

    def __init__(self, folder: Path, options: Sequence[str], local: Path | None = None, sites: int = SITES) -> None:
        self.folder, self.options, self.sites, self.grid = folder, list(options), sites, FakeGrid()
        for number in range(sites):
            if local is not None:
                shutil.copytree(local, folder / f"hospital-{number}/site-{number:03d}/local")
            self.open(number)

    def open(self, number: int, node: int | None = None, options: Sequence[str] = ()) -> Site:
        """Start a site, or start it again."""
        site = Site([*self.options, *options], number, self.sites, self.folder / f"hospital-{number}")
        self.grid.nodes[NODES[number] if node is None else node] = site
        return site

    def versions(self, number: int) -> dict[int, Path]:
        """The states on a site's disk."""
        folder = self.folder / f"hospital-{number}/site-{number:03d}/states"
        return {int(path.stem.rpartition("-")[2]): path for path in sorted(folder.glob("*/*.pt"))}

    def server(
        self,
        output: Path | None = None,
        observer: Any = None,
        timeout: float | None = 60.0,
        secure: SecureAggregation | None = None,
    ) -> Orchestrator:
        """A server over the sites, as `fedekd.flower.apps.serve` makes it."""
        parts, observer = parts_of(self.options), observer or Watch()
        found = wait_for_sites(self.grid, self.sites, 0.0, observer)
        descriptions = sorted(found.values(), key=lambda description: int(description["number"]))
        given = parts["data"]
        parts["data"] = SiteData(given.dataset, given.alpha, descriptions, given.batch_size, given.eval_batch_size)
        nodes = {int(description["number"]): node for node, description in found.items()}
        parts["engine"] = lambda *_: FlowerEngine(
            self.grid, nodes, timeout, observer, {int(each["number"]): each for each in descriptions}, secure
        )
        orchestrator = Orchestrator(**parts, output=output, observer=observer)
        for description in descriptions:
            require_agreement(description, recipe(parts["method"], orchestrator.spec))
        return orchestrator


def in_process(options: Sequence[str], output: Path) -> tuple[Orchestrator, dict[str, Any]]:
    """The same federation in this process, and its summary."""
    orchestrator = Orchestrator(**parts_of(options), output=output, baseline_dir=output / "local")
    return orchestrator, orchestrator.run()


def states(folder: Path) -> dict[int, Any]:
    """The clients' states in the newest checkpoint of a run in this process."""
    newest = {path.stem.split("-")[1]: path for path in sorted((folder / "checkpoints").glob("client-*.pt"))}
    return {int(number): unpack(path.read_bytes()) for number, path in newest.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the last bit, however they lie in memory."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.fixture(autouse=True)
def server_task(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """This process is what Flower takes for a run's server; it leaves the collection of garbage to Python."""
    for module in ("engines.worker", "orchestrator"):
        monkeypatch.setattr(f"fedekd.federation.{module}.gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)


@pytest.fixture(scope="session")
def options(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three clients of a small data set, as options of `fit`."""
    data = write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz")
    small = ["--rounds=2", "--client.local_epochs=1", "--client.optimizer.lr=0.001", "--logger=null", "--quiet=true"]
    machine = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.threads=1"]
    return [f"--data.dataset={data}", f"--data.num_clients={SITES}", "--data.alpha=1", "--data.batch_size=8"] + (
        small + machine
    )


@pytest.fixture(scope="session")
def undisturbed(
    options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Orchestrator, dict[str, Any], Path]]:
    """FedeKD in this process: its orchestrator, its summary and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *arguments: None)
        yield *in_process(options, folder), folder


@pytest.fixture
def hospitals(options: list[str], undisturbed: tuple[Any, Any, Path], tmp_path: Path) -> Hospitals:
    """Three sites of that data set, which know already what Local comes to."""
    return Hospitals(tmp_path, options, undisturbed[2] / "local")
