"""Grid of federated runs: method x data set x alpha x seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fedekd.atomic import digest
from fedekd.configuration.jsonargparse_patches import patched_jsonargparse
from fedekd.configuration.options import (
    FROM_DATA,
    as_values,
    build_parts,
    class_defaults,
    do_no_harm_rule,
    federation_parser,
    parse,
)
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.early_exit.guarantee_coverage import CoverageOptions
from fedekd.errors import UserError, require_choice
from fedekd.federation.run_folder import RUNTIME_OPTIONS, to_json_value
from fedekd.federation.source_code import is_installed
from fedekd.models.weights import read_weights

#: Options that do not affect the results of a run and are not part of its key.
_NOT_IN_KEY = (
    *RUNTIME_OPTIONS,
    *(f"trainer.{name}" for name in ("accelerator", "precision", "threads", "channels_last", "loop", "capture")),
    "data.eval_batch_size",
)

#: Options that were added after results had been stored, as in `data.alpha` or `FedeKD.beta`, with the value that gives
#: the numbers of before. With this value an option is not part of the key, and the stored rows stay valid.
ADDED_OPTIONS: dict[str, Any] = {
    "CAFEDistill.finetune_epochs": 0,
    "CAFEDistill.finetune_lr_factor": 0.1,
    "CAFEDistill.heads": None,
    "CAFEDistill.label_prior": None,
    "CAFEDistill.reduction": None,
    "CAFEDistill.teacher_head": None,
    "CAFEDistill.variant": "paper",
    **{f"{name}.finetune_lr_factor": 1.0 for name in ("FedAvg", "FedDyn", "FedPer", "FedProx", "FedRep")},
    "FedRep.finetune_epochs": 0,
    "FedeKD.cross_fit": False,
    "MLP.width": 1.0,
    "ProxyCNN.width": 1.0,
    "SafeKD.teacher": None,
    "baseline.control": None,
    "baseline.epochs": None,
    "baseline.learning_rates": [1e-4, 3e-4, 1e-3, 3e-3],
    "baseline.tune": False,
    "client.class_weights": None,
    "client.freeze": None,
    "client.lora": None,
    "client.private_weights": None,
    "client.scheduler": None,
    "client.scheduler_interval": "epoch",
    "data.categorical_columns": None,
    "data.categories": None,
    "data.classes": None,
    "data.extra_test": 0,
    "data.group_column": None,
    "data.ignore_label": None,
    "data.ignored_columns": None,
    "data.image_size": None,
    "data.max_samples": None,
    "data.memory_limit": 4.0,
    "data.num_workers": 2,
    "data.site_column": None,
    "data.sites": None,
    "data.skip_unreadable": False,
    "data.splits": "random",
    "data.target_column": None,
    "data.transform": None,
    "data.value_range": None,
    "do_no_harm.candidates": [],
    "do_no_harm.metric": "accuracy",
    "do_no_harm.splits": "holdout",
    "do_no_harm.test": "sign",
    "do_no_harm.unit": "sample",
    "metrics": None,
    "privacy": None,
    "select_round": "last",
    "trainer.accumulate_grad_batches": 1,
    "trainer.callbacks": None,
    "trainer.gradient_clip_algorithm": "norm",
    "trainer.gradient_clip_val": None,
    "wire_dtype": "float32",
}

#: Options that were renamed since: present name, and name in the key.
RENAMED_OPTIONS: dict[str, str] = {}

#: Options whose value is a class with arguments.
_CLASSES = ("method", "client.private_model", "client.proxy_model", "client.optimizer")


@dataclass(frozen=True)
class Block:
    """Product of data sets, alphas, seeds and methods.

    Args:
        datasets: Names of data sets.
        alphas: Concentrations of the Dirichlet partition. Default: the clients are the sites of the data.
        seeds: Seeds.
        methods: Label in the results, with class_path and init_args of the method.
        options: Options of all runs of the block, such as rounds or client.local_epochs.
        config: Configuration file to start from; `{dataset}` is replaced by the data set's name.
        coverage: Calibration modes whose coverage is measured on the exits of every finished run; none by default.
    """

    datasets: list[str]
    alphas: list[float] | None = None
    seeds: list[int] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    config: str = "{dataset}.yaml"
    coverage: CoverageOptions | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        dataset: Name of the data set.
        alpha: Concentration of the partition; None if the clients are sites.
        seed: Seed.
        method: Label of the method.
        values: Configuration of the run, as in `config.yaml`.
        key: Hash of all options that affect the results, with their defaults. It is the same on every machine.
        configuration: The same hash without the seed; cells with the same value may be averaged.
        coverage: Calibration modes whose coverage is measured when the run is finished.
    """

    dataset: str
    alpha: float | None
    seed: int
    method: str
    values: Mapping[str, Any]
    key: str
    configuration: str = ""
    coverage: CoverageOptions | None = None

    @property
    def group(self) -> str:
        """Data and seed; cells of one group share their local baseline."""
        return f"{self.clients} {self.seed}"

    @property
    def clients(self) -> str:
        """Data set with the concentration of its partition, if it has one."""
        return self.dataset if self.alpha is None else f"{self.dataset} alpha {self.alpha:g}"


def _matches(value: Any, condition: str) -> bool:
    if isinstance(value, int | float):
        try:
            return float(condition) == value
        except ValueError:
            return False
    return str(value).lower() == condition.lower()


def parse_filter(text: str) -> dict[str, str]:
    """Parse the value of `--filter`.

    Args:
        text: Conditions NAME=VALUE on dataset, alpha, seed or method, separated by commas.

    Returns:
        The values by name.

    Raises:
        UserError: If a condition is malformed or the name is unknown.

    Example:
        >>> parse_filter("dataset=retinamnist,alpha=0.1")
        {'dataset': 'retinamnist', 'alpha': '0.1'}
        >>> parse_filter("method=FedType, FedProx,seed=0")
        {'method': 'FedType, FedProx', 'seed': '0'}
    """
    conditions: dict[str, str] = {}
    name = ""
    for part in filter(None, text.split(",")):
        if name == "method" and "=" not in part:  # labels may contain commas: `FedType, FedProx`
            conditions[name] += f",{part}"
            continue
        name, equals, value = part.partition("=")
        known = ("dataset", "alpha", "seed", "method")
        if not equals:
            raise UserError(f"--filter: expected NAME=VALUE, as in dataset=digits,alpha=0.1, got {part!r}.")
        require_choice("--filter", name, known)
        if name in conditions:
            raise UserError(f"--filter: expected {name} once, got {text!r}. Run the command once per value.")
        conditions[name] = value
    return conditions


def cells(
    blocks: Sequence[Block], conditions: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[Cell]:
    """Return the distinct cells of a grid that match the conditions, sorted by group.

    Args:
        blocks: Blocks of the grid.
        conditions: Conditions as `parse_filter` returns them.
        folder: Folder of the data sets' configurations; by default they are found by name.

    Raises:
        UserError: If a configuration is not valid.
    """
    parser = federation_parser()
    distinct: dict[str, Cell] = {}
    for block in blocks:
        coverage = _coverage_options(block)
        for dataset, (label, method) in product(block.datasets, block.methods.items()):
            values: dict[str, Any] = {}
            for alpha, seed in product([None] if block.alphas is None else block.alphas, block.seeds):
                cell_values = {"dataset": dataset, "method": label, "alpha": alpha, "seed": seed}
                if not all(_matches(cell_values[name], value) for name, value in (conditions or {}).items()):
                    continue
                try:
                    values = values or _configuration(parser, block, dataset, method, folder)
                except UserError as error:
                    raise UserError(f"{dataset} {label}: {error}") from error
                values = {**_with_alpha(values, dataset, alpha), "seed": seed}
                key, configuration = (cell_key({**values, "seed": s}, coverage) for s in (seed, 0))
                alpha = None if alpha is None else float(alpha)
                cell = Cell(dataset, alpha, seed, label, values, key, configuration, coverage)
                distinct.setdefault(cell.key, cell)
    return sorted(distinct.values(), key=lambda cell: (cell.dataset, cell.alpha or 0.0, cell.seed))


def _with_alpha(values: Mapping[str, Any], dataset: str, alpha: float | None) -> dict[str, Any]:
    """Return a configuration with the concentration of a partition.

    Raises:
        UserError: If the clients are sites and a concentration is given, or the clients are parts and none is given.
    """
    data = values["data"]
    has_sites = data["sites"] is not None or data["site_column"] is not None
    if has_sites and alpha is not None:
        raise UserError(
            f"alphas: expected none for {dataset!r}, whose sites are the clients, got {alpha:g}. Omit alphas"
        )
    if not has_sites and alpha is None:
        raise UserError(f"alphas: expected concentrations of the partition of {dataset!r}, got none")
    return dict(values) if alpha is None else {**values, "data": {**data, "alpha": float(alpha)}}


def require_valid(grid: Sequence[Cell], trainer: Mapping[str, Any]) -> None:
    """Build the parts of each distinct kind of run, without training.

    Args:
        grid: The cells.
        trainer: Options that replace those of the cells, as in `run_grid`.

    Raises:
        UserError: If a part cannot be built; the message names the first such cell.
    """
    parser, checked = federation_parser(), set[str]()
    for cell in grid:
        values = {**cell.values, "logger": None, "seed": 0, "trainer": {**cell.values["trainer"], **trainer}}
        rest = {name: value for name, value in values.items() if name not in ("method", "data")}
        parts = values["method"], values["data"], rest, [values["method"], cell.coverage is not None]
        parts_json = {json.dumps(part, sort_keys=True) for part in parts}
        if parts_json <= checked:
            continue
        checked |= parts_json
        try:
            with patched_jsonargparse():
                config = parser.parse_object(values)
            method = build_parts(parser, config)["method"]
            if cell.coverage is not None and "validation" in method.training_splits:
                raise UserError("coverage: expected a method that does not train on validation samples")
        except UserError as error:
            raise UserError(f"{cell.clients} {cell.method}: {error}") from error


def _coverage_options(block: Block) -> CoverageOptions | None:
    options = block.coverage  # the parser leaves a namespace
    return options if options is None or isinstance(options, CoverageOptions) else CoverageOptions(**vars(options))


def _configuration(
    parser: ArgumentParser, block: Block, dataset: str, method: Any, folder: Path | None
) -> dict[str, Any]:
    name = block.config.replace("{dataset}", dataset)
    argv = ["--config", str(folder / name) if folder else name, f"--method={_as_text(method)}"]
    argv += [f"--{name}={_as_text(value)}" for name, value in block.options.items()]
    return as_values(parser, parse(parser, argv))


def _as_text(value: Any) -> str:
    """Return a value of a grid, which may hold namespaces, as command-line text."""
    return value if isinstance(value, str) else json.dumps(value, default=lambda namespace: namespace.as_dict())


def cell_key(values: Mapping[str, Any], coverage: CoverageOptions | None = None) -> str:
    """Return a hash of `resolved_options`, without added options that are off.

    Args:
        values: Configuration of a run.
        coverage: Part of the hash: a run without calibration does not finish a cell with it.
    """
    options = {}
    for name, value in resolved_options(values, coverage).items():
        short = short_name(name)
        if short not in ADDED_OPTIONS or to_json_value(ADDED_OPTIONS[short]) != value:
            options[name.removesuffix(short) + RENAMED_OPTIONS.get(short, short)] = value
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def short_name(option: str) -> str:
    """Return the last two parts of an option of `resolved_options`.

    Example:
        >>> short_name("client.private_model.PrivateCNN.width"), short_name("data.alpha"), short_name("rounds")
        ('PrivateCNN.width', 'data.alpha', 'rounds')
    """
    return ".".join(option.split(".")[-2:])


def resolved_options(values: Mapping[str, Any], coverage: CoverageOptions | None = None) -> dict[str, Any]:
    """Return all options that affect the results, defaults included.

    Of the classes of installed packages, such as the optimizers of PyTorch, only the arguments that differ from their
    defaults are listed: packages add arguments, and rows store the version of torch.

    Args:
        values: Configuration of a run.
        coverage: Options of the calibration, if there is one.

    Returns:
        JSON values by name, as in `data.alpha`, `method` and `method.FedeKD.beta`.
    """
    client = {name: value for name, value in values["client"].items() if f"client.{name}" not in _CLASSES}
    if client.get("private_weights") is not None:  # by content, wherever the file is
        client["private_weights"] = digest(read_weights(client["private_weights"], "client.private_weights"))
    scheduler = client.pop("scheduler", None)
    if scheduler is None:
        client.pop("scheduler_interval", None)
    plain = {name: value for name, value in values.items() if name not in ("method", "client", "do_no_harm")}
    if plain["trainer"].get("gradient_clip_val") is None:
        plain["trainer"] = {k: v for k, v in plain["trainer"].items() if k != "gradient_clip_algorithm"}
    options = dict(_leaves({**plain, "client": client}))
    specs = {"method": values["method"]}
    specs |= {name: values["client"][name.partition(".")[2]] for name in _CLASSES[1:]}
    if scheduler is not None:
        specs["client.scheduler"] = scheduler
    for index, model in enumerate(options.pop("client.private_models", None) or ()):
        specs[f"client.private_models.{index}"] = model
    for name, spec in specs.items():
        options |= _class_options(name, spec)
    rules = {"do_no_harm": do_no_harm_rule(values["do_no_harm"]), "coverage": coverage}
    for name, rule in rules.items():
        options |= {f"{name}.{option}": value for option, value in asdict(rule).items()} if rule is not None else {}
    return {
        name: to_json_value(value)
        for name, value in options.items()
        if not any(name == part or name.startswith(f"{part}.") for part in _NOT_IN_KEY)
    }


def _class_options(name: str, spec: Any) -> dict[str, Any]:
    """Return the class path, arguments and weights of a configured class.

    Raises:
        UserError: If the file of the weights cannot be read.
    """
    class_path = spec if isinstance(spec, str) else spec["class_path"]
    given = {} if isinstance(spec, str) else {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    class_path = class_path if "." in class_path else f"fedekd.models.{class_path}"
    module, _, short = class_path.rpartition(".")
    defaults = class_defaults(class_path)
    if not module.startswith("fedekd.") and is_installed(module):
        arguments = {
            key: value
            for key, value in given.items()
            if key not in defaults or to_json_value(defaults[key]) != to_json_value(value)
        }
    else:
        arguments = {key: value for key, value in {**defaults, **given}.items() if key not in FROM_DATA}
    options: dict[str, Any] = {name: class_path}
    if isinstance(spec, Mapping) and spec.get("weights") is not None:  # of a teacher: by content, wherever the file is
        options[f"{name}.weights"] = digest(read_weights(spec["weights"], f"{name}.weights"))
    for key, value in arguments.items():
        is_class = isinstance(value, Mapping) and "class_path" in value
        path = f"{name}.{short}.{key}"
        options |= _class_options(path, value) if is_class else {path: value}
    return options


def decisive_options(values: Mapping[str, Any], parser: ArgumentParser) -> dict[str, Any]:
    """Return options that affect the results and differ from their defaults.

    A report lists them.

    Args:
        values: Configuration of a run.
        parser: Parser of a run's options.
    """
    chosen = {name: values["client"][name.partition(".")[2]]["class_path"] for name in _CLASSES[1:]}
    defaults = _defaults(parser, (*chosen.items(), ("method", values["method"]["class_path"])))
    # The option is off by default; its rule shows that it is on.
    rule = {f"do_no_harm.{name}": value for name, value in to_json_value(asdict(DoNoHarm())).items() if name != "rule"}
    defaults = {**rule, **defaults}
    return {
        name: value
        for name, value in _leaves(values)
        # A class path counts even if it is the default, because the defaults depend on it.
        if (name.endswith("class_path") or defaults.get(name, _NOTHING) != value)
        and not any(name == part or name.startswith(f"{part}.") for part in _NOT_IN_KEY)
    }


_NOTHING = object()
_known_defaults: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}


def _defaults(parser: ArgumentParser, chosen: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the default options given the chosen classes."""
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
