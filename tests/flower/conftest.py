"""Sites in this process, and a grid between them and the server that can lose, delay and change messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import torch

from fedekd.atomic import unseal
from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule
from fedekd.federation import Orchestrator, RunFolder, SilentObserver
from fedekd.federation.checkpoint import CheckpointStore, unpack
from fedekd.methods import FederationSpec, Method

if find_spec("flwr") is not None:
    from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedekd.flower import apps
    from fedekd.flower.description import SiteData, require_agreement, shared_config
    from fedekd.flower.engine import FlowerEngine, wait_for_sites
    from fedekd.flower.messages import LAST_ROUND, ROUND, STATE, VALUES, pack, values_of
    from fedekd.flower.secure.aggregation import SecureAggregation
    from fedekd.flower.site import Site
else:  # every test in this folder is skipped
    Grid = object

NUM_SITES = 3

#: Flower's node id of each site; unrelated to the site numbers, and in another order.
NODES = {0: 930, 1: 920, 2: 910, 3: 900, 4: 890}

Reply = Callable[[], "Message"]
Interceptor = Callable[["Message", Reply], "Message | None"]


def over_wire(message: Message) -> Message:
    """Serialize a message as Flower does, and read it back."""
    return message_from_proto(type(proto := message_to_proto(message)).FromString(proto.SerializeToString()))


def error_reply(message: Message, error: Exception) -> Message:
    """Flower's reply for a ClientApp that raised an error."""
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class FakeGrid(Grid):
    """Grid that delivers messages in this process; replies come back in reverse order.

    Attributes:
        nodes: By node id, the site or a function from message to content. Other nodes are offline.
        intercept: Called with a message and a function that returns the site's reply; returns what the server receives.
        requests: Messages that reached a node.
        replies: Replies that reached the server.
        timeouts: Type of each batch of messages, and how long the server waits for the replies.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Site | Callable[[Message], RecordDict]] = {}
        self.intercept: Interceptor = lambda message, reply: reply()
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self.timeouts: list[tuple[str, float | None]] = []

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
        self.timeouts += [(message.metadata.message_type, timeout) for message in messages[:1]]
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's grids do
            reply = self._deliver(over_wire(message))
            assert reply is not None or timeout is not None, f"the server would wait forever: {message.metadata}"
            if reply is not None:
                replies.append(over_wire(reply))
        self.replies += replies
        return replies[::-1]

    def _deliver(self, message: Message) -> Message | None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:
            return create_message_error_unavailable_res_message(message.metadata, "node_unavail")
        self.requests.append(message)

        def reply() -> Message:
            try:
                content = node.reply(message) if isinstance(node, Site) else node(message)
            except Exception as error:
                return error_reply(message, error)
            return Message(content, reply_to=message)

        return self.intercept(message, reply)


def in_round(site: int, round_idx: int, interceptor: Interceptor) -> Interceptor:
    """Intercept the messages to one site in one round only."""

    def intercept(message: Message, reply: Reply) -> Message | None:
        is_round = message.metadata.message_type in (ROUND, LAST_ROUND) and values_of(message)["round"] == round_idx
        return interceptor(message, reply) if is_round and message.metadata.dst_node_id == NODES[site] else reply()

    return intercept


def request_lost(message: Message, reply: Reply) -> None:
    """The request does not reach the site."""


def reply_late(message: Message, reply: Reply) -> None:
    """The site does its work, and the reply exceeds the timeout."""
    reply()


def site_error(message: Message, reply: Reply) -> Message:
    """The site raises an error."""
    return error_reply(message, OSError("the disk is full"))


def site_offline(message: Message, reply: Reply) -> Message:
    """The site goes offline before it replies; the SuperLink sends an error reply for it."""
    reply()
    return create_message_error_unavailable_res_message(message.metadata, "node_unavail")


def with_values(**changes: Any) -> Interceptor:
    """Change JSON values of the reply."""

    def intercept(message: Message, reply: Reply) -> Message:
        changed = reply()
        changed.content[VALUES] = pack({**values_of(changed), **changes})[VALUES]
        return changed

    return intercept


def with_json(text: str) -> Interceptor:
    """Replace the JSON text of the reply."""

    def intercept(message: Message, reply: Reply) -> Message:
        changed = reply()
        changed.content[VALUES] = ConfigRecord({"json": text})
        return changed

    return intercept


def with_arrays(change: Callable[[dict[str, Array]], None]) -> Interceptor:
    """Change the arrays of the reply."""

    def intercept(message: Message, reply: Reply) -> Message:
        changed = reply()
        change(changed.content.array_records[STATE])
        return changed

    return intercept


class ServerStoppedError(Exception):
    """The server's process ended."""


class RecordingObserver(SilentObserver):
    """Record warnings and rows; call `before` at the start of a round, and stop the server after round `stop_after`."""

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
            raise ServerStoppedError

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def build(options: Sequence[str]) -> tuple[Method, FederatedDataModule, FederationSpec]:
    """Build a method, its data and its spec as a site does."""
    parts = parts_of(options)
    spec = FederationSpec.from_parts(
        parts["data"],
        parts["client"],
        parts["trainer"],
        rounds=parts["rounds"].rounds,
        seed=parts["seed"],
        num_clients=NUM_SITES,
        default_exits=parts["method"].exits,
    )
    return parts["method"], parts["data"], spec


class Sites:
    """Sites with one folder each, and a server with the same options.

    Args:
        folder: Parent of the sites' folders.
        options: Options of `fit`.
        baseline_dir: Local baselines of the same clients, copied to the sites so that they need not train them.
        count: Number of sites.
    """

    def __init__(
        self, folder: Path, options: Sequence[str], baseline_dir: Path | None = None, count: int = NUM_SITES
    ) -> None:
        self.folder, self.options, self.count, self.grid = folder, list(options), count, FakeGrid()
        for number in range(count):
            if baseline_dir is not None:
                shutil.copytree(baseline_dir, folder / f"hospital-{number}/site-{number:03d}/local")
            self.start(number)

    def start(self, number: int, node: int | None = None, options: Sequence[str] = ()) -> Site:
        """Start or restart a site."""
        site = Site([*self.options, *options], number, self.count, self.folder / f"hospital-{number}")
        self.grid.nodes[NODES[number] if node is None else node] = site
        return site

    def versions(self, number: int) -> dict[int, Path]:
        """State files of a site by version."""
        folder = self.folder / f"hospital-{number}/site-{number:03d}/states"
        return {int(path.stem.rpartition("-")[2]): path for path in sorted(folder.glob("*/*.pt"))}

    def newest_state(self, number: int) -> Any:
        """Newest state of a site."""
        return unpack(unseal(max(self.versions(number).items())[1].read_bytes()))

    def server(
        self,
        output: Path | None = None,
        observer: Any = None,
        timeout: float | None = 60.0,
        secure: SecureAggregation | None = None,
    ) -> Orchestrator:
        """Build a server as `fedekd.flower.apps.serve` does."""
        parts, observer = parts_of(self.options), observer or RecordingObserver()
        nodes, descriptions = wait_for_sites(self.grid, self.count, 0.0)
        data = parts["data"]
        parts["data"] = SiteData(
            data.dataset, data.alpha, list(descriptions.values()), data.batch_size, data.eval_batch_size
        )
        parts["engine"] = lambda *_: FlowerEngine(self.grid, nodes, timeout, observer, descriptions, secure)
        orchestrator = Orchestrator(**parts, output=output, observer=observer)
        for description in descriptions.values():
            require_agreement(description, shared_config(parts["method"], orchestrator.spec))
        return orchestrator


class Run(NamedTuple):
    """A finished run in this process."""

    orchestrator: Orchestrator
    summary: dict[str, Any]
    folder: Path

    def client_states(self) -> dict[int, Any]:
        """Client states of the newest checkpoint."""
        checkpoint, _ = CheckpointStore(self.folder / "checkpoints").load()
        assert checkpoint is not None
        return dict(checkpoint.clients)


def run_in_process(options: Sequence[str], output: Path) -> Run:
    """Run the same federation without Flower."""
    orchestrator = Orchestrator(**parts_of(options), output=output, baseline_dir=output / "local")
    return Run(orchestrator, orchestrator.run(), output)


def is_equal(one: Any, other: Any) -> bool:
    """Return True if two nested states are equal bit for bit; memory layouts may differ."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(is_equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.fixture(autouse=True)
def server_task(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Let Flower take this process for the server of a run."""
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)


@pytest.fixture(scope="session")
def options(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `fit` for three clients of a small data set and two rounds."""
    data = write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz")
    return [
        f"--data.dataset={data}",
        f"--data.num_clients={NUM_SITES}",
        "--data.alpha=1",
        "--data.batch_size=8",
        "--rounds=2",
        "--client.local_epochs=1",
        "--client.optimizer.lr=0.001",
        "--logger=null",
        "--quiet=true",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.threads=1",
    ]


@pytest.fixture
def empty_site_cache() -> Iterator[None]:
    """Drop the sites of other tests before a test, and its own after it."""
    apps._site.cache_clear()
    yield
    apps._site.cache_clear()


@pytest.fixture
def proxy(options: list[str]) -> dict[str, torch.Tensor]:
    """A proxy as the server sends it."""
    return dict(build(options)[2].build_model("proxy", "server").state_dict())


@pytest.fixture(scope="session")
def single_process(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of the same federation without Flower."""
    folder = tmp_path_factory.mktemp("single-process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_figures", lambda *arguments: None)
        return run_in_process(options, folder)


@pytest.fixture
def sites(options: list[str], single_process: Run, tmp_path: Path) -> Sites:
    """Three sites, with trained local baselines."""
    return Sites(tmp_path, options, single_process.folder / "local")


@pytest.fixture
def one_round(options: list[str], single_process: Run, tmp_path: Path) -> Sites:
    """Three sites and one round: the server ends with the mean of the first proxies."""
    return Sites(tmp_path, [*options, "--rounds=1"], single_process.folder / "local")
