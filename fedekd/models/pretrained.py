"""Networks of torchvision with pretrained weights, for any number of classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pickle import UnpicklingError
from typing import Any

from torch import hub, nn

from fedekd.errors import UserError, describe_error
from fedekd.global_state import isolated_rng
from fedekd.models.image_classifier import replace_head

#: Networks with their weights, by builder and arguments. A process builds the networks of many clients.
_built: dict[tuple[Any, bool, str], nn.Module] = {}

#: Errors of a download (URLError is an OSError), and of a file that is cut or of another network.
_UNREADABLE = (OSError, HTTPException, UnpicklingError, EOFError, RuntimeError)

#: Arguments that torchvision's builders set by themselves for pretrained weights.
_SET_BY_WEIGHTS = ("num_classes", "init_weights")


def has_pretrained_weights(class_path: str, arguments: Mapping[str, Any]) -> bool:
    """Return True for a network of torchvision or timm that has trained weights.

    Example:
        >>> has_pretrained_weights("torchvision.models.resnet18", {"weights": "IMAGENET1K_V1"})
        True
        >>> has_pretrained_weights("torchvision.models.resnet18", {"weights": None})
        False
    """
    option = {"torchvision": "weights", "timm": "pretrained"}.get(class_path.partition(".")[0])
    return option is not None and bool(arguments.get(option))


def without_pretrained_weights(class_path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the same network with random weights.

    Example:
        >>> without_pretrained_weights("torchvision.models.resnet18", {"weights": "IMAGENET1K_V1"})
        {}
    """
    if not has_pretrained_weights(class_path, arguments):
        return dict(arguments)
    kept = {name: value for name, value in arguments.items() if name not in ("weights", "pretrained")}
    if class_path.rpartition(".")[2] in ("googlenet", "inception_v3"):
        kept = {"transform_input": True, **kept}  # torchvision sets it for pretrained weights
    return kept


def build_pretrained(factory: Callable[..., Any], arguments: Mapping[str, Any], num_classes: int) -> Any:
    """Build a network of torchvision with its weights, and a new last linear layer.

    Weights of the same number of classes keep their layer. The initial weights of a new one come from torch's global
    generator.

    Args:
        factory: Builder of torchvision.
        arguments: Its arguments, `weights` among them.
        num_classes: Number of classes; 1 for regression.

    Raises:
        UserError: If the weights cannot be downloaded, or their file cannot be read.
    """
    given = {name: value for name, value in arguments.items() if name not in _SET_BY_WEIGHTS}
    has_auxiliary = given.get("aux_logits") is not False
    if not has_auxiliary:
        given.pop("aux_logits")  # the weights have these heads
    key = (factory, has_auxiliary, repr(sorted(given.items(), key=lambda item: item[0])))
    if key not in _built:
        try:
            with isolated_rng(0):  # all initial weights are replaced
                network = factory(**given)
        except _UNREADABLE as error:
            raise UserError(
                f"expected the weights {given['weights']}, by download or in {hub.get_dir()}/checkpoints, got"
                f" {describe_error(error, 120)}. Copy their file there, or set --client.private_weights"
            ) from error
        if not has_auxiliary and getattr(network, "aux_logits", False):  # of Inception
            network.aux_logits, network.AuxLogits = False, None
        _built[key] = network
    network = copy.deepcopy(_built[key])
    replace_head(network, num_classes)
    return network
