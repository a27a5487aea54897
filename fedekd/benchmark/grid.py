"""A grid of federations: method x data set x alpha x seed, written as blocks of a YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fedekd.configuration.options import as_values, build_parts, federation_parser, parse
from fedekd.early_exit.guarantee_coverage import CoverageOptions
from fedekd.errors import UserError, nearest
from fedekd.federation.run_folder import RUNTIME_OPTIONS

#: Parts of a configuration that say where and how a run is computed, not what: no part of its key.
_CIRCUMSTANCES = (*RUNTIME_OPTIONS, "trainer", "data.eval_batch_size")


@dataclass(frozen=True)
class Block:
    """A product of data sets, alphas, seeds and methods.

    Args:
        datasets: Names of data sets.
        alphas: Concentrations of the Dirichlet partition.
        seeds: Seeds.
        methods: By the label under which a method is reported: its class_path and init_args.
        options: Further options of every run, such as rounds or client.local_epochs.
        config: The configuration that a data set's runs begin with.
        coverage: Calibration rules whose guarantees are checked on all clients of a finished run, if any.
    """

    datasets: list[str]
    alphas: list[float]
    seeds: list[int]
    methods: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    config: str = "{dataset}.yaml"
    coverage: CoverageOptions | None = None


@dataclass(frozen=True)
class Cell:
    """One federation of a grid.

    Attributes:
        dataset: Name of the data set.
        alpha: Concentration of the partition.
        seed: The seed.
        method: The label of the method.
        values: The run's configuration, as `config.yaml` would hold it.
        key: A hash of what decides its numbers; the same on every machine, and unmoved by options added later.
        configuration: The same of all but the seed: cells of one configuration may be averaged.
        coverage: Calibration rules whose guarantees are checked when it is finished.
    """

    dataset: str
    alpha: float
    seed: int
    method: str
    values: Mapping[str, Any]
    key: str
    configuration: str = ""
    coverage: CoverageOptions | None = None

    @property
    def group(self) -> str:
        """Cells of one group share data and seed, and so the training of Local."""
        return f"{self.dataset} {self.alpha:g} {self.seed}"


def _same(have: Any, wanted: str) -> bool:
    if isinstance(have, int | float):
        try:
            return float(wanted) == have
        except ValueError:
            return False
    return str(have).lower() == wanted.lower()


def parse_filter(text: str) -> dict[str, str]:
    """The conditions of `--filter dataset=retinamnist,alpha=0.1`.

    Example:
        >>> parse_filter("dataset=retinamnist,alpha=0.1")
        {'dataset': 'retinamnist', 'alpha': '0.1'}
        >>> parse_filter("method=FedType, FedProx,seed=0")
        {'method': 'FedType, FedProx', 'seed': '0'}
    """
    conditions: dict[str, str] = {}
    name = ""
    for part in filter(None, text.split(",")):
        if name == "method" and "=" not in part:  # labels have commas in them, as `FedType, FedProx` has
            conditions[name] += f",{part}"
            continue
        name, equals, value = part.partition("=")
        known = ("dataset", "alpha", "seed", "method")
        if not equals:
            raise UserError(f"--filter {text}: {part!r} is not NAME=VALUE, as in --filter dataset=digits,alpha=0.1")
        if name not in known:
            raise UserError(f"--filter {text}: {name!r} cannot be filtered; {nearest(name, known)}")
        conditions[name] = value
    return conditions


def cells(
    blocks: Sequence[Block], conditions: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[Cell]:
    """All cells of a grid that meet the conditions, each once; those that share Local come together.

    Args:
        blocks: Whose cells.
        conditions: By dataset, alpha, seed or method, as `parse_filter` gives them.
        folder: Where the data sets' configurations lie; by default they are looked for by name.

    Raises:
        UserError: If a configuration is not valid; it is found before anything runs.
    """
    parser = federation_parser()
    found: dict[str, Cell] = {}
    for block in blocks:
        for dataset, (label, method) in product(block.datasets, block.methods.items()):
            own = {"dataset": dataset, "method": label}
            places = [
                (alpha, seed)
                for alpha, seed in product(block.alphas, block.seeds)
                if _meets({**own, "alpha": alpha, "seed": seed}, conditions or {})
            ]
            if places:
                coverage = _coverage(block)
                values = _configuration(parser, block, dataset, method, folder)
            for alpha, seed in places:
                data = {**values["data"], "alpha": float(alpha)}
                of_cell = {**values, "data": data, "seed": seed}
                key, configuration = (cell_key(each, parser, coverage) for each in (of_cell, {**of_cell, "seed": 0}))
                cell = Cell(dataset, float(alpha), seed, label, of_cell, key, configuration, coverage)
                found.setdefault(cell.key, cell)
    return sorted(found.values(), key=lambda cell: (cell.dataset, cell.alpha, cell.seed))


def require_valid(grid: Sequence[Cell], trainer: Mapping[str, Any]) -> None:
    """Make the parts of a run for each method, each partition and each set of options in a grid; nothing is trained.

    Args:
        grid: The cells.
        trainer: Replaces the trainer's options of each, as `run_grid` has it.

    Raises:
        UserError: If one of them cannot be made; it names the first cell that has it.
    """
    parser, known = federation_parser(), set[str]()
    for cell in grid:
        values = {**cell.values, "logger": None, "seed": 0, "trainer": {**cell.values["trainer"], **trainer}}
        rest = {name: value for name, value in values.items() if name not in ("method", "data")}
        parts = values["method"], values["data"], rest, [values["method"], cell.coverage is not None]
        aspects = {json.dumps(part, sort_keys=True) for part in parts}
        if aspects <= known:
            continue
        known |= aspects
        try:
            method = build_parts(parser, parser.parse_object(values))["method"]
            if cell.coverage is not None and "validation" in method.training_splits:
                raise UserError("coverage: expected a method that does not train on validation samples")
        except UserError as error:
            raise UserError(f"{cell.dataset} alpha {cell.alpha:g} {cell.method}: {error}") from error


def _coverage(block: Block) -> CoverageOptions | None:
    """A block's, which a parser leaves as a namespace."""
    given = block.coverage
    return given if given is None or isinstance(given, CoverageOptions) else CoverageOptions(**vars(given))


def _meets(place: Mapping[str, Any], conditions: Mapping[str, str]) -> bool:
    return all(_same(place[name], value) for name, value in conditions.items())


def _configuration(
    parser: ArgumentParser, block: Block, dataset: str, method: Any, folder: Path | None
) -> dict[str, Any]:
    name = block.config.replace("{dataset}", dataset)
    argv = ["--config", str(folder / name) if folder else name, f"--method={_as_text(method)}"]
    argv += [f"--{name}={_as_text(value)}" for name, value in block.options.items()]
    return as_values(parser, parse(parser, argv))


def _as_text(value: Any) -> str:
    """A value of a grid as it is written on a command line; the parser makes namespaces of classes in it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=lambda each: each.as_dict())


def cell_key(values: Mapping[str, Any], parser: ArgumentParser, coverage: CoverageOptions | None = None) -> str:
    """A hash of a configuration's departures from the defaults, its circumstances left out.

    A cell whose clients are to be calibrated is not finished by one whose clients were not.
    """
    chosen = {f"client.{part}": values["client"][part]["class_path"] for part in _CLASSES}
    defaults = _defaults(parser, (*chosen.items(), ("method", values["method"]["class_path"])))
    decisive = {
        name: value
        for name, value in _leaves(values)
        # What the defaults were taken of counts, though it is then a default itself.
        if (name.endswith("class_path") or defaults.get(name, _NOTHING) != value)
        and not any(name == part or name.startswith(f"{part}.") for part in _CIRCUMSTANCES)
    }
    if coverage is not None:
        decisive["coverage"] = asdict(coverage)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


_CLASSES = ("private_model", "proxy_model", "optimizer")
_NOTHING = object()
_known_defaults: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}


def _defaults(parser: ArgumentParser, chosen: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The values of a configuration that says no more than which classes it takes."""
    if chosen not in _known_defaults:
        argv = ["--data.dataset=", *(f"--{name}={class_path}" for name, class_path in chosen)]
        _known_defaults[chosen] = dict(_leaves(as_values(parser, parse(parser, argv))))
    return _known_defaults[chosen]


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, values
