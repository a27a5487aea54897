"""Options of a federation, and the objects built from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from dataclasses import fields as fields_of
from functools import cache
from importlib import import_module
from typing import Any, get_args

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger

from fedekd.configuration.configs import resolve_configs
from fedekd.configuration.error_messages import explain, subclass_names
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.jsonargparse_patches import patched_jsonargparse
from fedekd.data import FederatedDataModule
from fedekd.data.datamodule import PARTITION_OPTIONS
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError, require, shorten
from fedekd.federation import BaselineOptions, EngineConfig, RoundOptions
from fedekd.methods import ClientOptions, Method
from fedekd.metrics import METRICS
from fedekd.models import PrivateCNN, ProxyCNN
from fedekd.modules import TrainerFactory
from fedekd.modules.trainer_factory import usable_threads
from fedekd.privacy import GaussianMechanism
from fedekd.tasks import TASKS

#: Options of one invocation, which are not written to `config.yaml`.
_TRANSIENT = ("config", "output", "resume", "quiet")

#: Arguments of models whose values follow from the data.
FROM_DATA = {"in_channels", "image_size", "in_features", "num_classes"}

#: Arguments of torchvision's models whose defaults jsonargparse cannot parse.
_UNPARSABLE = {"inverted_residual"}

_MODELS = ("client.private_model", "client.proxy_model")

#: Titles of option groups in `--help`; jsonargparse would take the first lines of docstrings.
_TITLES = {
    RoundOptions.__name__: "Rounds",
    "baseline": "Baselines",
    "method": "Method",
    "data": "Data",
    "client": "Client",
    "client.private_model": "Private model",
    "client.proxy_model": "Proxy model",
    "client.optimizer": "Optimizer",
    "client.scheduler": "Scheduler",
    "trainer": "Trainer",
    "engine": "Engine",
}


def federation_parser() -> ArgumentParser:
    """Return the parser of `fit` and of the `config.yaml` in each run folder."""
    parser = ArgumentParser(
        prog="orchestrator.py fit",
        usage="%(prog)s --config digits.yaml [--output runs/NAME] [OPTIONS]   |   %(prog)s --resume RUN",
        description="Run a federation, or resume one.",
        epilog="To list the arguments of a class, give its name, as in --method.help FedeKD; likewise --engine.help,"
        " --logger.help, --client.optimizer.help, --client.scheduler.help, --client.private_model.help and"
        " --client.proxy_model.help. Without a name: --do_no_harm.help, --privacy.help and --client.lora.help.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file, by path or by its name in configs/. Can be repeated; the last value counts.",
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="Folder of the run (default: a new one in runs/)."
    )
    parser.add_argument(
        "--resume", type=str | None, default=None, help="Folder of a run to resume; needs no other options."
    )
    parser.add_argument("--quiet", type=bool, nargs="?", const=True, default=False, help="Print warnings only.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the partition, weights, batches and participation."
    )
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="classification or regression (default: the task of the data set).",
    )
    parser.add_argument(
        "--baseline_dir", type=str, default="runs/local", help="Folder in which local baselines are kept for all runs."
    )
    parser.add_class_arguments(RoundOptions, instantiate=False)
    parser.add_class_arguments(BaselineOptions, "baseline", instantiate=False)
    methods = ", ".join(subclass_names(Method))
    parser.add_subclass_arguments(Method, "method", help=f"Federated method: {methods}, or a class path.")
    parser.add_class_arguments(FederatedDataModule, "data", skip={"seed", "task", "client"}, instantiate=False)
    parser.add_class_arguments(
        ClientOptions, "client", skip={"private_model", "proxy_model", "optimizer", "scheduler"}, instantiate=False
    )
    for role in ("private_model", "proxy_model"):
        parser.add_subclass_arguments(
            torch.nn.Module,
            f"client.{role}",
            skip=FROM_DATA | _UNPARSABLE,
            instantiate=False,
            help=f"Network: a name in fedekd.models or a class path, such as torchvision.models.resnet18. Arguments:"
            f" --client.{role}.NAME VALUE.",
        )
    parser.add_subclass_arguments(
        torch.optim.Optimizer,
        "client.optimizer",
        skip={"params"},
        instantiate=False,
        help="Optimizer: a name in torch.optim or a class path. Arguments: --client.optimizer.lr 1e-3 (default 1e-4).",
    )
    parser.add_subclass_arguments(
        torch.optim.lr_scheduler.LRScheduler,
        "client.scheduler",
        skip={"optimizer"},
        instantiate=False,
        required=False,
        help="Learning rate scheduler: a name in torch.optim.lr_scheduler or a class path. Arguments:"
        " --client.scheduler.step_size 5 (default: constant rates).",
    )
    parser.add_class_arguments(TrainerFactory, "trainer", instantiate=False)
    parser.add_subclass_arguments(
        EngineConfig,
        "engine",
        help="Where clients run: Sequential, MultiProcess (--engine.processes N) or Ray. Does not change results.",
    )
    parser.add_argument_group("Do no harm").add_argument(
        "--do_no_harm",
        type=DoNoHarm | bool | None,
        default=None,
        help="Clients deploy the federated model only if their held-out samples show that it is not worse than their"
        " local model: true, or arguments such as --do_no_harm.confidence 0.9 (default: they always deploy it).",
    )
    parser.add_argument_group("Privacy").add_argument(
        "--privacy",
        type=GaussianMechanism | None,
        default=None,
        help="Clip each client's update and add Gaussian noise, with an account of epsilon in summary.json:"
        " --privacy.noise_multiplier 1.0 --privacy.clipping_norm 1.0 (default: updates are sent unchanged).",
    )
    parser.add_argument_group("Metrics").add_argument(
        "--metrics",
        type=list[str] | str | None,
        default=None,
        help="Metrics that are reported. The first is the score, by which Delta is computed. "
        + " ".join(
            f"{task.capitalize()}: {', '.join(row.name for row in METRICS.values() if row.task == task)}."
            for task in TASKS
        )
        + " (default: all of the task).",
    )
    parser.add_argument_group("Logging").add_argument(
        "--logger", type=Logger | list[Logger] | None, default=None, help="Lightning loggers, by class path."
    )
    for name, group in (parser.groups or {}).items():
        group.title = _TITLES[name]
    defaults = ClientOptions()
    parser.set_defaults(
        {
            "method": {"class_path": "fedekd.methods.FedeKD"},
            "engine": {"class_path": "fedekd.federation.Sequential"},
            "client.private_model": {"class_path": f"fedekd.models.{PrivateCNN.__name__}"},
            "client.proxy_model": {"class_path": f"fedekd.models.{ProxyCNN.__name__}"},
            "client.optimizer": dict(defaults.optimizer),
        }
    )
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str], values: Mapping[str, Any] | None = None) -> Namespace:
    """Parse arguments.

    Args:
        parser: Parser of a command.
        argv: Its arguments.
        values: A configuration as plain values, which `argv` overrides.

    Raises:
        UserError: If an option or value is invalid; one line, with the most similar valid name.
    """
    first = [] if values is None else [f"--config={yaml.safe_dump(dict(values), sort_keys=False)}"]
    try:
        with patched_jsonargparse():
            config = parser.parse_args([*first, *resolve_configs(argv)])
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from error
    _require_values(parser, config)
    return config


def _require_values(parser: ArgumentParser, config: Namespace) -> None:
    """Reject null, numbers and texts that jsonargparse accepts and no option has.

    Raises:
        UserError: If a number is not finite or has more than 64 bits, a text has a null character, or a value is null
            and its default is not.
    """
    defaults = parser.get_defaults(skip_validation=True)
    fields = {action.dest: _item_defaults(getattr(action, "_typehint", None)) for action in parser._actions}
    for key, value in config.items():
        part, within, argument = key.partition(".init_args.")
        flag = key.replace(".init_args", "")
        for name, leaf in _leaves(value, f"--{flag}"):
            if isinstance(leaf, int | float):
                require(math.isfinite(leaf), name, "a finite number", leaf)
                require(isinstance(leaf, float) or abs(leaf) < 2**63, name, "a number of 64 bits", leaf)
            elif isinstance(leaf, str):
                require("\0" not in leaf, name, "a text without null characters", leaf)
            elif leaf is None and name.removeprefix(f"--{key}.") in fields.get(key, ()):
                raise UserError(f"{name}: expected a value, got null")
        if value is None:
            default = class_defaults(config[part].class_path).get(argument) if within else defaults.get(key)
            if default is not None or key.startswith(("do_no_harm.", "privacy.")):
                raise UserError(f"--{flag}: expected a value, got null")


def _item_defaults(typehint: Any) -> set[str]:
    """Return the names of the fields that cannot be null in a list of dataclasses."""
    item = next(iter(get_args(typehint)), None)
    return {field.name for field in fields_of(item) if field.default is not None} if is_dataclass(item) else set()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value that have no parts, each with its dotted name."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, name)
    else:
        yield name, value


@cache
def class_defaults(class_path: str) -> dict[str, Any]:
    """Return the defaults of a class or factory as jsonargparse parses them."""
    module, _, name = class_path.rpartition(".")
    factory = getattr(import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(factory, type) else parser.add_function_arguments
    add(factory, "arguments", fail_untyped=False)
    arguments = parser.get_defaults(skip_validation=True).get("arguments")
    return {} if arguments is None else dict(vars(arguments))


def _without_model_defaults(config: Namespace) -> Namespace:
    """Return the configuration without the default arguments of models.

    Some defaults are functions or placeholders that cannot be written to a file and parsed again.
    """
    config = config.clone()
    for role in _MODELS:
        spec = config.get(role)
        given = spec.pop("init_args", None) if spec else None
        if given:
            defaults = class_defaults(spec.class_path)
            changed = {k: v for k, v in vars(given).items() if k not in defaults or v != defaults[k]}
            if changed:
                spec.init_args = Namespace(**changed)  # type: ignore[no-untyped-call]
    return config


def _all_values(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """Return all options as plain values."""
    values: dict[str, Any] = yaml.safe_load(
        parser.dump(_without_model_defaults(config), skip_validation=True, skip_unset=False)
    )
    return values


def as_values(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """Return a configuration as plain values, the content of `config.yaml`.

    Options of a partition are left out where sites are the clients. A rule `true` is written with all fields, because
    later versions may have other defaults.
    """
    values = _all_values(parser, config)
    if values["do_no_harm"] is True:
        values["do_no_harm"] = asdict(DoNoHarm())
    if values["data"]["sites"] is not None or values["data"]["site_column"] is not None:
        values["data"] = {key: value for key, value in values["data"].items() if key not in PARTITION_OPTIONS}
    return {key: value for key, value in values.items() if key not in _TRANSIENT}


def _instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Build the method, engine and loggers."""
    try:
        with patched_jsonargparse():
            built: Namespace = parser.instantiate(config)
    except (ValueError, TypeError, ImportError) as error:
        cause: BaseException = error
        while not isinstance(cause, UserError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        named = re.search(r"Problem with given class_path '([^']+)'", str(error))
        name = named[1] if named else f"method {config.method.class_path} or logger"
        reason = shorten(str(cause).strip().partition("\n")[0], 200)
        raise UserError(f"{name}: expected arguments with which it can be built. It reports: {reason}") from error
    return built


def do_no_harm_rule(value: Mapping[str, Any] | bool | None) -> DoNoHarm | None:
    """Return the rule: `true` stands for its defaults, `false` and null for none."""
    if isinstance(value, Mapping):
        return DoNoHarm(**value)
    return DoNoHarm() if value else None


def parts_of(options: Sequence[str]) -> dict[str, Any]:
    """Return the parts of a federation from options of `fit`."""
    parser = federation_parser()
    return build_parts(parser, parse(parser, list(options)))


def build_parts(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """Build the arguments of `Orchestrator` from a parsed configuration.

    Args:
        parser: The parser of `federation_parser`.
        config: Its result. Values `auto` of the trainer are replaced in place by the values chosen.

    Returns:
        Keyword arguments of `Orchestrator`.

    Raises:
        UserError: If a value is out of range, or a part cannot be built.
    """
    plain = _all_values(parser, config)
    built = _instantiate(parser, config)
    options = {**plain["data"], "fractions": tuple(plain["data"]["fractions"])}
    data = FederatedDataModule(**options, seed=config.seed, task=config.task)
    if plain["trainer"]["threads"] == "auto":
        plain["trainer"]["threads"] = built.engine.threads(usable_threads(), data.num_clients)
    trainer = TrainerFactory(**plain["trainer"]).resolve()
    for name in plain["trainer"]:
        config.trainer[name] = getattr(trainer, name)
    rounds = RoundOptions(**{name: plain[name] for name in RoundOptions.__dataclass_fields__})
    loggers = built.logger
    if isinstance(plain["metrics"], str):  # a single name
        config.metrics = plain["metrics"] = [plain["metrics"]]
    return {
        "method": built.method,
        "data": data,
        "client": ClientOptions(**plain["client"]),
        "trainer": trainer,
        "engine": built.engine,
        "rounds": rounds,
        "do_no_harm": do_no_harm_rule(plain["do_no_harm"]),
        "metrics": plain["metrics"],
        "privacy": None if plain["privacy"] is None else GaussianMechanism(**plain["privacy"]),
        "baseline": BaselineOptions(**plain["baseline"]),
        "seed": config.seed,
        "loggers": loggers if isinstance(loggers, list) else [loggers] if loggers is not None else [],
        "config": as_values(parser, config),
    }
