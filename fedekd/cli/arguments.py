"""The options of a federation, and how they become its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger

from fedekd.cli.configs import resolve_configs
from fedekd.cli.messages import explain
from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import RoundOptions
from fedekd.methods import ClientOptions, Method
from fedekd.models import PrivateCNN, ProxyCNN
from fedekd.modules import TrainerFactory

#: Options of one invocation, which are no part of a run's configuration.
_TRANSIENT = ("config", "output", "resume", "quiet")

#: What the data decide about a model.
_FROM_DATA = {"in_channels", "image_size", "num_classes"}


def federation_parser() -> ArgumentParser:
    """The parser of `fit`, and of the `config.yaml` that every run keeps."""
    parser = ArgumentParser(
        prog="orchestrator.py fit",
        usage="%(prog)s --config digits.yaml [--output runs/NAME] [OPTIONS]   |   %(prog)s --resume RUN",
        description="Run a federation, or go on with one.",
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
    parser.add_argument("--quiet", type=bool, default=False, help="Print warnings only.")
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
        "--reference_dir",
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
        parser.add_subclass_arguments(torch.nn.Module, f"client.{role}", skip=_FROM_DATA, instantiate=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "client.optimizer", skip={"params"}, instantiate=False)
    parser.add_class_arguments(TrainerFactory, "trainer", instantiate=False)
    parser.add_argument(
        "--logger", type=Logger | list[Logger] | None, default=None, help="Lightning loggers, by class_path."
    )
    defaults = ClientOptions()
    parser.set_defaults(
        {
            "method": {"class_path": "fedekd.methods.FedeKD"},
            "client.private_model": {"class_path": f"fedekd.models.{PrivateCNN.__name__}"},
            "client.proxy_model": {"class_path": f"fedekd.models.{ProxyCNN.__name__}"},
            "client.optimizer": dict(defaults.optimizer),
        }
    )
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse arguments; every mistake is a `UserError` of one line that names the nearest valid name."""
    try:
        return parser.parse_args(resolve_configs(argv))
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from error


def as_values(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A parsed configuration as plain values: what `config.yaml` holds, enough to repeat a run."""
    values: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_validation=True, skip_unset=False))
    return {key: value for key, value in values.items() if key not in _TRANSIENT}


def _instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """The method and the loggers; what their constructors object to comes out as it was said."""
    try:
        built: Namespace = parser.instantiate(config)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error
    return built


def build_parts(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """The parts of a federation, as `Orchestrator` takes them; `config` gets every `auto` of the trainer decided.

    Raises:
        UserError: If a value is out of range, or a part cannot be built.
    """
    plain = as_values(parser, config)
    trainer = TrainerFactory(**plain["trainer"]).resolve()
    for name in plain["trainer"]:
        config.trainer[name] = getattr(trainer, name)
    rounds = RoundOptions(**{name: plain[name] for name in RoundOptions.__dataclass_fields__})
    data = {**plain["data"], "fractions": tuple(plain["data"]["fractions"])}
    built = _instantiate(parser, config)
    loggers = built.logger
    return {
        "method": built.method,
        "data": FederatedDataModule(**data, seed=config.seed, task=config.task),
        "client": ClientOptions(**plain["client"]),
        "trainer": trainer,
        "rounds": rounds,
        "seed": config.seed,
        "loggers": loggers if isinstance(loggers, list) else [loggers] if loggers is not None else [],
        "config": as_values(parser, config),
    }
