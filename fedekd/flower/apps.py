"""What Flower's runtime starts: a server app, and at each site a client app. Also for its simulation."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedekd.configuration.options import build_parts, federation_parser, parse
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions, RunFolder
from fedekd.federation.participation import participants
from fedekd.flower.description import SiteData, recipe, require_agreement, require_alike
from fedekd.flower.engine import FlowerEngine, wait_for_sites
from fedekd.flower.mods import require_protocol, to_client_result
from fedekd.flower.secure import SecureAggregation, require_sites
from fedekd.flower.site import Site
from fedekd.methods import Method
from fedekd.reporting import Display, result_tables

Mod = Callable[..., Message]


@dataclass(frozen=True)
class Settings:
    """A federation of sites; the same at all of them.

    Attributes:
        options: Its configuration, as options of `fit`, such as --config digits.yaml --rounds 3.
        sites: How many sites there are.
        folder: Where a site keeps its networks, unless its node says so itself.
        output: The server's run folder; empty writes nothing.
        timeout: Seconds that the server waits for the answers of a round, or of each of the four stages of a secure
            one; 0 waits on.
        wait: Seconds that the server waits for the sites to come.
        secure: Whether the server is to learn the mean of the updates alone; a node that says so of itself in its own
            configuration sends no other.
        secure_range: The largest change of a weight that is then carried, a power of two.
    """

    options: tuple[str, ...]
    sites: int
    folder: str = "site"
    output: str = ""
    timeout: float = 0.0
    wait: float = 600.0
    secure: bool = False
    secure_range: float = 8.0

    def __post_init__(self) -> None:
        if self.sites < 1:
            raise UserError(f"sites is {self.sites}, and must be at least 1")
        for name in ("timeout", "wait"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}, and must be at least 0")
        if not isinstance(self.secure, bool):
            raise UserError(f"secure is {self.secure!r}, and must be true or false")
        if self.secure:
            require_sites(self.sites)
        SecureAggregation(self.secure_range)

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Settings:
        """From Flower's run configuration: `options` as one text, the others as they are."""
        known = {name: run_config[name] for name in cls.__dataclass_fields__ if name in run_config}
        if lacking := [name for name in ("options", "sites") if name not in known]:
            raise UserError(f"the run configuration lacks {lacking[0]!r}")
        try:
            known |= {"options": tuple(shlex.split(str(known["options"])))}
        except ValueError as error:
            raise UserError(f"options is {known['options']!r}: {error}") from error
        for name, kind in (("sites", int), ("timeout", float), ("wait", float), ("secure_range", float)):
            if name in known:
                try:
                    known[name] = kind(known[name])
                except ValueError as error:
                    raise UserError(f"{name} is {known[name]!r}, and must be a number") from error
        return cls(**known)


def make_server_app(settings: Settings | None = None) -> ServerApp:
    """The server's side; without settings those of Flower's run configuration count."""

    def main(grid: Grid, context: Context) -> None:
        serve(grid, settings or Settings.of(context.run_config))

    app = ServerApp()
    app.main()(main)
    return app


def make_client_app(settings: Settings | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """A site's side.

    A node says which site it is: `number`, or in a simulation Flower's `partition-id`; where its data lie: `data`;
    where it keeps its networks: `folder`; and what it does in its own way: `options`, such as another private model or
    device.

    Args:
        settings: None takes Flower's run configuration.
        mods: Of Flower, for the updates that leave a site, such as flwr.clientapp.mod.LocalDpMod. Where updates are
            hidden among each other, that comes after these.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        chosen, node = settings or Settings.of(context.run_config), context.node_config
        number = node.get("number", node.get("partition-id"))
        if number is None:
            raise UserError("the node's configuration lacks 'number', which site it is, from 0")
        data = node.get("data")
        folder = str(node.get("folder", chosen.folder))
        options = (*chosen.options, *shlex.split(str(node.get("options", ""))))
        site = _site(options, int(number), chosen.sites, folder, None if data is None else str(data))
        return Message(site.answer(message), reply_to=message)

    def answer_openly(message: Message, context: Context) -> Message:
        if (settings or Settings.of(context.run_config)).secure or context.node_config.get("secure", False):
            raise UserError("this site sends its updates by secure aggregation alone (secure)")
        return answer(message, context)

    for action in ("hello", "reference", "score", "receive"):
        app.query(action)(answer)
    app.train("visit", mods=list(mods))(answer_openly)
    # Flower's mod listens to messages of this type alone.
    app.train(mods=[require_protocol, secaggplus_mod, to_client_result, *mods])(answer)
    return app


@lru_cache(maxsize=1)  # what a process needs for one message after another; nothing of a client's state is in it
def _site(options: tuple[str, ...], number: int, sites: int, folder: str, data: str | None) -> Site:
    return Site(options, number, sites, Path(folder), data)


def serve(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Run a federation of sites to its end, or go on with one; the summary, as `summary.json` holds it.

    Raises:
        UserError: If the configuration is not valid, or the sites do not fit together.
    """
    output = Path(settings.output) if settings.output else None
    if output is not None and (finished := RunFolder(output, {}).summary) is not None:
        print(f"{output} is finished: nothing to do")
        return finished
    parser = federation_parser()
    config = parse(parser, list(settings.options))
    parts = build_parts(parser, config)
    given, method = parts["data"], parts["method"]
    if settings.secure:
        _require_mean(method, parts["rounds"])
    with Display(quiet=config.quiet) as display:
        found = wait_for_sites(grid, settings.sites, settings.wait, display)
        told = sorted(found.values(), key=lambda description: int(description["number"]))
        require_alike(told)
        parts["data"] = SiteData(given.dataset, given.alpha, told, given.batch_size, given.eval_batch_size)
        nodes = {int(description["number"]): node for node, description in found.items()}
        by_number = {int(description["number"]): description for description in told}
        secure = SecureAggregation(settings.secure_range) if settings.secure else None
        engine = FlowerEngine(grid, nodes, settings.timeout or None, display, by_number, secure)
        parts["engine"] = lambda *_: engine
        orchestrator = Orchestrator(**parts, output=output, observer=display)
        ours = recipe(method, orchestrator.spec)
        for description in told:
            require_agreement(description, ours)
        if secure is not None:
            taking_part = participants(orchestrator.options, settings.sites, orchestrator.seed, 0)
            require_sites(len(taking_part))
            method.init_server(orchestrator.spec)  # as the run will: before it, sites would train Local for nothing
            secure.require(method.broadcast(taking_part, 0))
        summary = orchestrator.run()
        for table in result_tables(summary):
            display.console.print(table)
    return summary


def _require_mean(method: Method, rounds: RoundOptions) -> None:
    """Hold a federation to what it can be where the server knows nothing of updates but their mean.

    Raises:
        UserError: Naming what needs more.
    """
    if not method.supports_secure_mean:
        name = type(method).__name__
        raise UserError(f"secure: {name}, as it is configured, needs more of the updates than their uniform mean")
    if rounds.dropout:
        raise UserError(
            f"dropout is {rounds.dropout}, and nothing can be taken out of a secure sum afterwards (secure)"
        )
