"""ServerApp and ClientApp of a federated run, for sites and for simulation."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from jsonargparse import ArgumentParser, Namespace

from fedekd.configuration.options import as_values, build_parts, federation_parser, parse
from fedekd.data.sites import require_site_name
from fedekd.errors import UserError, print_warning
from fedekd.federation import Orchestrator, RoundOptions, RunFolder
from fedekd.federation.options import participants
from fedekd.flower.description import SiteData, require_agreement, require_consistent_sites, shared_config
from fedekd.flower.engine import FlowerEngine, wait_for_sites
from fedekd.flower.messages import BASELINE, DESCRIBE, LAST_ROUND, ROUND, SCORE
from fedekd.flower.mods import convert_dtypes
from fedekd.flower.secure.aggregation import SecureAggregation, require_num_sites
from fedekd.flower.secure.mods import require_protocol, to_client_result
from fedekd.flower.site import Site
from fedekd.flower.site_errors import SiteError, withhold_texts
from fedekd.methods import Method
from fedekd.reporting import Display, result_tables

Mod = Callable[..., Message]


@dataclass(frozen=True)
class Settings:
    """Settings of a federation of sites, the same at the server and all sites.

    Attributes:
        options: Options of `fit`, such as --config digits.yaml --rounds 3.
        sites: Number of sites, at least 1; at least 3 with `secure`.
        folder: Folder of a site's state, unless `folder` in its --node-config names another.
        output: Run folder of the server; empty writes nothing.
        timeout: Seconds that the server waits for the replies of a round, with `secure` of each of its four stages;
            0 waits forever.
        wait: Seconds that the server waits for all sites to connect.
        secure: Aggregate by SecAgg+: the server receives the mean of the updates only. A site with `secure=true` in
            its --node-config refuses to send an update in any other way.
        secure_range: Largest change of a weight that secure aggregation transmits, a power of two.

    Raises:
        UserError: A value is out of range.
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
            raise UserError(f"sites: expected at least 1, got {self.sites}")
        for name in ("timeout", "wait"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: expected at least 0 seconds, got {getattr(self, name)}")
        if not isinstance(self.secure, bool):
            raise UserError(f"secure: expected true or false, got {self.secure!r}")
        if self.secure:
            require_num_sites(self.sites)
        SecureAggregation(self.secure_range)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Settings:
        """Build settings from Flower's run configuration; `options` is one string.

        Raises:
            UserError: `options` or `sites` is missing, or a value is invalid.
        """
        values = {name: run_config[name] for name in cls.__dataclass_fields__ if name in run_config}
        if missing := [name for name in ("options", "sites") if name not in values]:
            raise UserError(f"{missing[0]}: missing in the run configuration. Add it to flwr run --run-config.")
        try:
            values["options"] = tuple(shlex.split(str(values["options"])))
        except ValueError as error:
            raise UserError(f"options: expected options of fit, got {values['options']!r}: {error}") from error
        for name, number in (("sites", int), ("timeout", float), ("wait", float), ("secure_range", float)):
            if name in values:
                try:
                    values[name] = number(values[name])
                except ValueError as error:
                    raise UserError(f"{name}: expected a number, got {values[name]!r}") from error
        return cls(**values)


def make_server_app(settings: Settings | None = None) -> ServerApp:
    """Build the ServerApp.

    Args:
        settings: None reads Flower's run configuration.
    """

    def main(grid: Grid, context: Context) -> None:
        serve(grid, settings or Settings.from_run_config(context.run_config))

    app = ServerApp()
    app.main()(main)
    return app


def make_client_app(settings: Settings | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """Build the ClientApp of a site.

    A site configures its SuperNode by --node-config:
        number: The site's number, from 0; a simulation sets Flower's `partition-id` instead.
        data: File or folder of its samples, in any format of `data.sites`.
        name: Name of the site in tables, logged names and messages; by default the name of its file or folder without
            suffix. An empty name shows the number.
        folder: Folder of its state.
        options: Additional options of `fit`, such as another private model or device.
        secure: True sends updates by secure aggregation only.

    Args:
        settings: None reads Flower's run configuration.
        mods: Flower mods for the updates that a site sends, such as flwr.clientapp.mod.LocalDpMod. They run before
            the masking of secure aggregation.
    """
    app = ClientApp(mods=[withhold_texts])

    def reply(message: Message, context: Context) -> Message:
        run, node = settings or Settings.from_run_config(context.run_config), context.node_config
        number = node.get("number", node.get("partition-id"))
        if number is None:
            raise SiteError("number: missing in the node configuration. Add number=0 (1, 2, ...) to --node-config.")
        data = node.get("data")
        folder = str(node.get("folder", run.folder))
        options = (*run.options, *shlex.split(str(node.get("options", ""))))
        data = None if data is None else str(data)
        site = _site(options, int(number), run.sites, folder, data, _name_of(node, data))
        return Message(site.reply(message), reply_to=message)

    def reply_unmasked(message: Message, context: Context) -> Message:
        if (settings or Settings.from_run_config(context.run_config)).secure or context.node_config.get(
            "secure", False
        ):
            raise SiteError(
                "secure: this site sends updates by secure aggregation only. Set secure=true at the server."
            )
        return reply(message, context)

    for message_type in (DESCRIBE, BASELINE, SCORE, LAST_ROUND):
        app.query(message_type.removeprefix("query."))(reply)
    app.train(ROUND.removeprefix("train."), mods=[convert_dtypes, *mods])(reply_unmasked)
    # Flower's SecAgg+ mod handles messages of type "train" without an action.
    app.train(mods=[require_protocol, secaggplus_mod, to_client_result, *mods])(reply)
    return app


def _name_of(node: Mapping[str, Any], data: str | None) -> str | None:
    """Return the name of a site: that of its node configuration or of its file.

    Raises:
        UserError: If it is not a valid name.
    """
    if "name" in node:
        return None if node["name"] == "" else require_site_name(node["name"], "name")
    if data is None:
        return None
    path = Path(data)
    name = path.name if path.is_dir() else path.stem
    try:
        return require_site_name(name, "name")
    except UserError as error:
        raise UserError(f"{error}. Add name to --node-config") from error


@lru_cache(maxsize=1)  # reused between the messages of one site; holds no client state
def _site(
    options: tuple[str, ...], number: int, sites: int, folder: str, data: str | None, name: str | None = None
) -> Site:
    return Site(options, number, sites, Path(folder), data, name)


def serve(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Run or resume a federation of sites.

    Args:
        grid: Flower's connection to the nodes.
        settings: The federation's settings.

    Returns:
        The summary, as in summary.json; of a finished run in `settings.output` without running anything.

    Raises:
        UserError: The configuration is invalid, sites are missing, or their configurations differ.
    """
    output = Path(settings.output) if settings.output else None
    if output is not None and (run := RunFolder(output, {})).is_complete(print_warning) and run.summary is not None:
        print(f"{output} is finished; nothing to do")
        return run.summary
    parser = federation_parser()
    config = parse(parser, list(settings.options))
    name, parts = _server_parts(parser, config, settings.sites)
    data, method = parts["data"], parts["method"]
    secure = SecureAggregation(settings.secure_range) if settings.secure else None
    if secure is not None:
        _require_secure_mean(method, parts["rounds"])
    with Display(quiet=config.quiet) as display:
        nodes, descriptions = wait_for_sites(grid, settings.sites, settings.wait)
        sites = list(descriptions.values())
        require_consistent_sites(sites)
        parts["data"] = SiteData(name, data.alpha, sites, data.batch_size, data.eval_batch_size)
        engine = FlowerEngine(grid, nodes, settings.timeout or None, display, descriptions, secure)
        parts["engine"] = lambda *_: engine
        # Sites keep few versions of their states: the server must know a recent one.
        parts["rounds"] = replace(parts["rounds"], checkpoint_every=0.0)
        orchestrator = Orchestrator(**parts, output=output, observer=display)
        expected = shared_config(method, orchestrator.spec, orchestrator.privacy)
        for description in sites:
            require_agreement(description, expected)
        if secure is not None:
            first = participants(orchestrator.options, settings.sites, orchestrator.seed, 0)
            require_num_sites(len(first))
            method.init_server(orchestrator.spec)  # check now what is sent, before the sites train their baselines
            secure.require_supported(method.broadcast(first, 0))
        summary = orchestrator.run()
        for table in result_tables(summary, config.metrics):
            display.console.print(table)
    return summary


def _server_parts(parser: ArgumentParser, config: Namespace, sites: int) -> tuple[str, dict[str, Any]]:
    """Build the parts of the server, which has no samples.

    Returns:
        Name of the data set, and the arguments of `Orchestrator`.
    """
    if config.data.dataset is not None and config.data.site_column is None:
        return config.data.dataset, build_parts(parser, config)
    # A data module with sites would read them to count the clients.
    given = config.data.dataset if config.data.sites is None else config.data.sites
    name = Path(given).stem if isinstance(given, str) and given else "sites"
    without = config.clone()
    without.data.dataset, without.data.sites, without.data.site_column = name, None, None
    without.data.num_clients = sites
    parts = build_parts(parser, without)
    config.trainer = without.trainer
    return name, parts | {"config": as_values(parser, config)}


def _require_secure_mean(method: Method, rounds: RoundOptions) -> None:
    """Check that the method needs no more than the uniform mean of the updates.

    Raises:
        UserError: Names the option that needs single updates.
    """
    if not method.supports_secure_mean:
        raise UserError(
            f"secure: expected a method that needs only the uniform mean of the updates, got {type(method).__name__}"
            " as configured. Choose a method or aggregator with uniform weights, or secure=false."
        )
    if rounds.update_loss_rate:
        raise UserError(
            f"update_loss_rate: expected 0 with secure=true, got {rounds.update_loss_rate}."
            " An update cannot be removed from a masked sum."
        )
    if rounds.wire_dtype != "float32":
        raise UserError(
            f"wire_dtype: expected float32 with secure=true, got {rounds.wire_dtype}."
            " A masked update is sent as integers, of the same size for every dtype."
        )
