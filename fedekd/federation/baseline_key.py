"""Key of a local baseline: everything that determines its numbers."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import lightning
import torch

from fedekd.atomic import digest
from fedekd.class_paths import class_paths_in
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.federation.object_state import StateReader
from fedekd.federation.source_code import code_of, modules_of, package_code
from fedekd.methods import Client
from fedekd.methods.options import scheduler_paths

#: Code that trains and scores a client: a baseline of other code is not reused.
TRAINING_CODE = (
    "data/batches.py",
    "data/readers.py",
    "data/stored.py",
    "data/tables.py",
    "data/transforms.py",
    "federation/local_baseline.py",
    "functional",
    "global_state.py",
    "methods/options.py",
    "methods/specification.py",
    "methods/client.py",
    "methods/client_state.py",
    "methods/serving.py",
    "methods/local.py",
    "metrics",
    "models",
    "modules",
    "seeding.py",
)


def baseline_key(client: Client) -> str:
    """Hash everything that determines a client's baseline.

    These are the samples of every split in order, the network (classes, attributes, weights), the options of training,
    the seed, the code, the versions of the libraries, and the kind of device.

    Raises:
        SourceUnavailableError: If the code of the model or of the optimizer cannot be read from files, or an
            attribute of the model has no readable state.
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
    transforms = tuple(class_paths_in(client.spec.transform))
    others = (*class_paths_in(client.spec.trainer.callbacks), *scheduler_paths(client.spec.client.scheduler))
    # A bare name is of torchvision or Lightning, whose versions are hashed instead of the code.
    factories = {path.rpartition(".")[0] for path in (*class_paths, *transforms, *others)} - {""}
    reader = StateReader(network)
    attributes, settings = reader.attributes(), reader.read(optimizer.defaults)
    names = modules_of([*network.modules(), optimizer]) | factories | reader.modules
    content = {
        "data": client.splits.digest(client.samples),
        "validation": client.splits.validation_digest(client.samples),
        "unit": [client.splits.target_shift, client.splits.target_scale],
        "client": client.number,
        "spec": spec,
        "network": network_fingerprint(network),
        "attributes": attributes,
        "optimizer": settings,
        "objects": code_of(name for name in names if not is_own(name)),
        "code": package_code(TRAINING_CODE),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            **{name: version(name) for name in ("torchmetrics", "scikit-learn", "scipy")},
            **({"torchvision": version("torchvision")} if transforms else {}),
            **({} if client.spec.client.lora is None else {"peft": version("peft")}),
        },
        "numerics": numerics(client.spec.trainer.torch_device),
    }
    return digest(json.dumps(content, sort_keys=True, default=reader.read).encode())


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


def is_own(module: str) -> bool:
    """Return True for modules of fedekd and of the program that runs."""
    return module.partition(".")[0] in ("", "fedekd")
