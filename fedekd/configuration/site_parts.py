"""Parts of a federation at one of its sites; needs no Flower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedekd.configuration.options import build_parts, federation_parser, parse, parts_of
from fedekd.data import ClientSplits, FederatedDataModule, Samples
from fedekd.data.formats import format_of
from fedekd.data.formats.hugging_face import is_hugging_face
from fedekd.data.sites import require_site_name
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation.checks import (
    check_candidates,
    check_models,
    check_required_splits,
    check_round_selection,
    check_schedule,
)
from fedekd.methods import FederationSpec, Method
from fedekd.privacy import GaussianMechanism

#: In a simulation one process runs many sites with equal options; the parts are read-only.
_parts_of = lru_cache(maxsize=1)(parts_of)


@dataclass(frozen=True, eq=False)
class SiteParts:
    """Data, method and specification of one site.

    Attributes:
        number: The site's number, in [0, sites).
        sites: Number of sites.
        own_data: File or folder of the site's own samples; None for its part of the configured data set.
        data: Data module, loaded.
        splits: The site's samples.
        method: The method, without server state.
        spec: How networks are built and trained.
        privacy: Noise of updates, if any.
        do_no_harm: Rule by which the site deploys the federated model; None deploys it always.
        config: All options as plain values, the content of `config.yaml`; paths of data and weights are absolute.
    """

    number: int
    sites: int
    own_data: str | None
    data: FederatedDataModule
    splits: ClientSplits
    method: Method
    spec: FederationSpec
    privacy: GaussianMechanism | None
    do_no_harm: DoNoHarm | None
    config: dict[str, Any]

    @classmethod
    def from_options(
        cls, options: Sequence[str], number: int, sites: int, own_data: str | None = None, name: str | None = None
    ) -> SiteParts:
        """Build the parts from options of `fit`.

        Args:
            options: The federation's configuration.
            number: The site's number.
            sites: Number of sites.
            own_data: File or folder of the site's own samples, in any format of `data.sites`.
            name: Name of the site; None for a number, or without `own_data` for the name in the configured data set.

        Raises:
            UserError: The configuration or the data are invalid.
        """
        if name is not None:
            require_site_name(name, "name")
        if own_data is None:
            parts = _parts_of((*options, "--logger=null"))
        else:
            parts = parts_of(_own_data_options(options, own_data))
        return cls._assemble(parts, number, sites, own_data, name)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], number: int, sites: int, own_data: str | None, name: str | None
    ) -> SiteParts:
        """Build the parts from the attribute `config` of earlier parts.

        Raises:
            UserError: The configuration or the data are invalid.
        """
        parser = federation_parser()
        parts = build_parts(parser, parse(parser, [], config))
        return cls._assemble(parts, number, sites, own_data, name)

    @classmethod
    def _assemble(
        cls, parts: Mapping[str, Any], number: int, sites: int, own_data: str | None, name: str | None
    ) -> SiteParts:
        data, method = parts["data"], parts["method"]
        if own_data is not None:
            data.assign_all(number, name)
        splits = _splits(data, number, sites, own_data)
        if name is not None:
            splits = replace(splits, name=name)
        spec = FederationSpec.from_parts(
            data,
            parts["client"],
            parts["trainer"],
            rounds=parts["rounds"].rounds,
            seed=parts["seed"],
            num_clients=sites,
            default_exits=method.exits,
            metrics=parts["metrics"],
            select_round=parts["rounds"].select_round,
        )
        check_models(spec, [splits])
        check_round_selection(spec, [splits])
        check_required_splits(method, [splits])
        check_schedule(spec, [splits], method.scheduled_epochs(spec))
        if parts["do_no_harm"] is not None:
            check_candidates(parts["do_no_harm"], method, spec, [number])  # private models differ between sites
        rules = parts["privacy"], parts["do_no_harm"]
        config = _with_absolute_paths(parts["config"])
        return cls(number, sites, own_data, data, splits, method, spec, *rules, config)

    @property
    def samples(self) -> Samples:
        """The data set of the site."""
        return self.data.samples

    @property
    def clients(self) -> dict[int, ClientSplits]:
        """Splits by client number: those of the site."""
        return {self.number: self.splits}


def _own_data_options(options: Sequence[str], data: str) -> list[str]:
    """Return the options of a site with its own file, which is one client.

    Raises:
        UserError: If the options divide the file into sites.
    """
    column = parse(federation_parser(), list(options)).data.site_column
    if column is not None:
        raise UserError(
            f"data.site_column: expected null with data in --node-config, whose file is one site, got {column!r}. Set"
            " --data.site_column=null, and leave the column out by --data.ignored_columns"
        )
    # One client: with `auto`, the number of threads depends on it.
    return [*options, f"--data.dataset={data}", "--data.sites=null", "--data.num_clients=1", "--logger=null"]


def _with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with absolute paths, for commands in another working folder.

    Symbolic links are kept: the suffix of a link, not of its target, is that of the format.
    """
    data, client = dict(config["data"]), dict(config["client"])
    data["root"] = _absolute(data["root"])
    if isinstance(data["sites"], str):
        data["sites"] = _absolute(data["sites"])
    elif data["sites"] is not None:
        data["sites"] = {name: _absolute_data(path) for name, path in data["sites"].items()}
    if data["dataset"] is not None:
        data["dataset"] = _absolute_data(data["dataset"])
    if client["private_weights"] is not None:
        client["private_weights"] = _absolute(client["private_weights"])
    return {**config, "data": data, "client": client}


def _absolute_data(source: Any) -> Any:
    """Return an absolute path of a file or folder; other data sets unchanged."""
    if not isinstance(source, str):  # by class_path
        return source
    path = Path(source).expanduser()
    return source if format_of(path) is None or is_hugging_face(path) else _absolute(source)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _splits(module: FederatedDataModule, number: int, sites: int, own_data: str | None) -> ClientSplits:
    if own_data is not None:
        return module.clients[0]
    if module.num_clients != sites:
        raise UserError(
            f"data.{'sites' if module.has_sites else 'num_clients'}: expected {sites} (sites), got"
            f" {module.num_clients}."
            " Set both to the same number, or data in --node-config to the site's own file."
        )
    return module.clients[number]
