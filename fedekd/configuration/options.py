"""The options of a federation, and how they become its parts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger

from fedekd.configuration.configs import resolve_configs
from fedekd.configuration.error_messages import explain
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.jsonargparse_patches import own_defaults
from fedekd.data import FederatedDataModule
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import EngineConfig, RoundOptions
from fedekd.methods import ClientOptions, Method
from fedekd.models import PrivateCNN, ProxyCNN
from fedekd.modules import TrainerFactory
from fedekd.modules.trainer_factory import usable_cores

#: Options of one invocation, which are no part of a run's configuration.
_TRANSIENT = ("config", "output", "resume", "quiet")

#: What the data decide about a model.
_FROM_DATA = {"in_channels", "image_size", "num_classes"}

#: Arguments of torchvision's models whose own defaults no parser takes.
_UNPARSABLE = {"inverted_residual"}

_MODELS = ("client.private_model", "client.proxy_model")


def federation_parser() -> ArgumentParser:
    """The parser of `fit`, and of the `config.yaml` that every run keeps."""
    parser = ArgumentParser(
        prog="orchestrator.py fit",
        usage="%(prog)s --config digits.yaml [--output runs/NAME] [OPTIONS]   |   %(prog)s --resume RUN",
        description="Run a federation, or go on with one.",
        epilog="The arguments of a class are listed by --method.help, --engine.help, --logger.help,"
        " --client.optimizer.help, --client.private_model.help and --client.proxy_model.help, each followed by the"
        " class.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="A YAML file, by path or by its name in configs/; repeatable."
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="The run's folder (default: a new one in runs/)."
    )
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="The folder of a run to go on with; needs nothing else.",
    )
    parser.add_argument("--quiet", type=bool, nargs="?", const=True, default=False, help="Print warnings only.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seeds everything: partition, weights, batches, participation."
    )
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="classification or regression (default: the data set's own).",
    )
    parser.add_argument(
        "--baseline_dir",
        type=str,
        default="runs/local",
        help="Where Local's references are kept for all runs.",
    )
    parser.add_class_arguments(RoundOptions, instantiate=False)
    parser.add_subclass_arguments(
        Method, "method", help="The method: class_path, or the name of one in fedekd.methods."
    )
    parser.add_class_arguments(FederatedDataModule, "data", skip={"seed", "task", "client"}, instantiate=False)
    parser.add_class_arguments(
        ClientOptions, "client", skip={"private_model", "proxy_model", "optimizer"}, instantiate=False
    )
    for role in ("private_model", "proxy_model"):
        parser.add_subclass_arguments(
            torch.nn.Module,
            f"client.{role}",
            skip=_FROM_DATA | _UNPARSABLE,
            instantiate=False,
            help=f"The {role.replace('_', ' ')}: class_path, such as torchvision.models.resnet18, or a name of"
            " fedekd.models; its arguments follow the name after a dot.",
        )
    parser.add_subclass_arguments(
        torch.optim.Optimizer,
        "client.optimizer",
        skip={"params"},
        instantiate=False,
        help="The optimizer: class_path, or the name of one in torch.optim; as in --client.optimizer.lr 1e-3.",
    )
    parser.add_class_arguments(TrainerFactory, "trainer", instantiate=False)
    parser.add_subclass_arguments(
        EngineConfig, "engine", help="Where clients run: Sequential, MultiProcess with --engine.processes N, or Ray."
    )
    parser.add_argument(
        "--do_no_harm",
        type=DoNoHarm | bool | None,
        default=None,
        help="Clients take the federated model only if their own held-out samples show that it is no worse than what"
        " they trained alone; true, or its arguments, as in --do_no_harm.confidence 0.9 (default: they take it).",
    )
    parser.add_argument(
        "--logger", type=Logger | list[Logger] | None, default=None, help="Lightning loggers, by class_path."
    )
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


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse arguments; every mistake is a `UserError` of one line that names the nearest valid name."""
    try:
        with own_defaults():
            config = parser.parse_args(resolve_configs(argv))
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from error
    _require_values(parser, config)
    return config


def _require_values(parser: ArgumentParser, config: Namespace) -> None:
    """Hold a configuration to what a parser lets pass: null, and numbers that are none.

    Raises:
        UserError: If a value is null whose default is not, or not finite.
    """
    defaults = parser.get_defaults(skip_validation=True)
    for key, value in config.items():
        part, within, argument = key.partition(".init_args.")
        flag = key.replace(".init_args", "")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{flag} is {value}, and must be a finite number")
        if value is None:
            default = _class_defaults(config[part].class_path).get(argument) if within else defaults.get(key)
            if default is not None or key.startswith("do_no_harm."):
                raise UserError(f"--{flag} is null, and must have a value")


@cache
def _class_defaults(class_path: str) -> dict[str, Any]:
    """The arguments of a class, or of a function that makes one, and their defaults as a parser sees them."""
    module, _, name = class_path.rpartition(".")
    made = getattr(import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(made, type) else parser.add_function_arguments
    add(made, "made", fail_untyped=False)
    arguments = parser.get_defaults(skip_validation=True).get("made")
    return {} if arguments is None else dict(vars(arguments))


def _only_chosen(config: Namespace) -> Namespace:
    """The configuration without those arguments of models that nobody gave.

    A default is not always a value that can be given: it may be a function, or stand for what a builder decides.
    """
    config = config.clone()
    for role in _MODELS:
        spec = config.get(role)
        given = spec.pop("init_args", None) if spec else None
        if given:
            defaults = _class_defaults(spec.class_path)
            chosen = {k: v for k, v in vars(given).items() if k not in defaults or v != defaults[k]}
            if chosen:
                spec.init_args = Namespace(**chosen)  # type: ignore[no-untyped-call]
    return config


def as_values(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A parsed configuration as plain values: what `config.yaml` holds, enough to repeat a run."""
    values: dict[str, Any] = yaml.safe_load(parser.dump(_only_chosen(config), skip_validation=True, skip_unset=False))
    return {key: value for key, value in values.items() if key not in _TRANSIENT}


def _instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """The method and the loggers; what their constructors object to comes out as it was said."""
    try:
        built: Namespace = parser.instantiate(config)
    except (ValueError, TypeError, ImportError) as error:
        cause: BaseException = error
        while not isinstance(cause, UserError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        named = re.search(r"Problem with given class_path '([^']+)'", str(error))
        what = named[1] if named else f"the method {config.method.class_path} or a logger"
        raise UserError(f"{what} cannot be made: {str(cause).strip().partition(chr(10))[0]}") from error
    return built


def _do_no_harm(said: Mapping[str, Any] | bool | None) -> DoNoHarm | None:
    """`true` takes the defaults, `false` is as good as null."""
    if isinstance(said, Mapping):
        return DoNoHarm(**said)
    return DoNoHarm() if said else None


def parts_of(options: Sequence[str]) -> dict[str, Any]:
    """The parts of a federation, from options of `fit`; see `build_parts`."""
    parser = federation_parser()
    return build_parts(parser, parse(parser, list(options)))


def build_parts(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """The parts of a federation, as `Orchestrator` takes them; `config` gets every `auto` of the trainer decided.

    Raises:
        UserError: If a value is out of range, or a part cannot be built.
    """
    plain = as_values(parser, config)
    built = _instantiate(parser, config)
    if plain["trainer"]["threads"] == "auto":
        plain["trainer"]["threads"] = built.engine.threads(usable_cores(), plain["data"]["num_clients"])
    trainer = TrainerFactory(**plain["trainer"]).resolve()
    for name in plain["trainer"]:
        config.trainer[name] = getattr(trainer, name)
    rounds = RoundOptions(**{name: plain[name] for name in RoundOptions.__dataclass_fields__})
    data = {**plain["data"], "fractions": tuple(plain["data"]["fractions"])}
    loggers = built.logger
    return {
        "method": built.method,
        "data": FederatedDataModule(**data, seed=config.seed, task=config.task),
        "client": ClientOptions(**plain["client"]),
        "trainer": trainer,
        "engine": built.engine,
        "rounds": rounds,
        "do_no_harm": _do_no_harm(plain["do_no_harm"]),
        "seed": config.seed,
        "loggers": loggers if isinstance(loggers, list) else [loggers] if loggers is not None else [],
        "config": as_values(parser, config),
    }
