"""Key of a local baseline: everything that determines its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from fedekd.atomic import digest
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.federation.source_code import code_of, modules_of, package_code
from fedekd.methods import Client

#: Code that trains and scores a client: a baseline of other code is not reused.
TRAINING_CODE = (
    "data/batches.py",
    "federation/local_baseline.py",
    "functional",
    "global_state.py",
    "methods/options.py",
    "methods/specification.py",
    "methods/client.py",
    "methods/local.py",
    "metrics/registry.py",
    "models",
    "modules",
    "seeding.py",
)

#: Attributes of every `nn.Module`; parameters, buffers and submodules are hashed otherwise.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

#: Depth to which the attributes of a network's own objects are read.
_DEPTH = 4


def baseline_key(client: Client) -> str:
    """Hash everything that determines a client's baseline.

    These are the samples of every split in order, the network (classes, attributes, weights), the options of training,
    the seed, the code, the versions of the libraries, and the kind of device.

    Raises:
        SourceUnavailableError: If the code of the model or of the optimizer cannot be read from files.
    """
    spec = client.spec.hash_dict()
    spec["client"].pop("proxy_model")  # not used in local training
    for name in ("private_model", "private_models", "exits", "depths"):  # of all clients; this client's follow
        spec["client"].pop(name)
    model = client.spec.client.model_for(client.number)
    spec["client"]["private"] = model
    spec["client"]["stages"] = client.spec.client.exits_for(client.number)
    spec["client"]["depth"] = client.spec.depth(client.number)
    network = client.networks["private"]
    optimizer = client.spec.optimizer(network.parameters())
    class_paths = (model if isinstance(model, str) else model["class_path"], client.spec.client.optimizer["class_path"])
    factories = {path.rpartition(".")[0] for path in class_paths}
    content = {
        "data": client.splits.digest(client.images),
        "validation": client.splits.validation_digest(client.images),
        "client": client.number,
        "spec": spec,
        "network": network_fingerprint(network),
        "attributes": [_attributes(part) for part in network.modules()],
        "objects": code_of(
            modules_of([*network.modules(), optimizer]) | {name for name in factories if not _is_own(name)}
        ),
        "code": package_code(TRAINING_CODE),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "numerics": numerics(client.spec.trainer.torch_device),
    }
    return digest(json.dumps(content, sort_keys=True, default=str).encode())


def numerics(device: torch.device) -> dict[str, Any]:
    """Return what changes the last bits: the device, settings of PyTorch."""
    if device.type == "cuda":
        kind = [torch.cuda.get_device_name(device), torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.12 on
        features = {name: value for name, value in capabilities.items() if not name.startswith("num_")}
        kind = [torch.backends.cpu.get_cpu_capability(), features]
    return {
        "device": kind,
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("", "fedekd")


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return own attributes of a module, which may come from a file."""
    own = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE}
    return {name: _plain(value) for name, value in own.items()}


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """Return a value as JSON.

    An array is its digest, an object its class and attributes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), digest(np.ascontiguousarray(value).tobytes())]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, nn.Module | type) or depth == 0:
        return name
    if isinstance(value, Mapping):
        return [[_plain(key, depth - 1), _plain(item, depth - 1)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(item, depth - 1)) for item in value)
    if hasattr(value, "__dict__"):
        return [name, _plain(vars(value), depth - 1)]
    text = repr(value)
    return name if " at 0x" in text else text
