"""Description of a site: configuration, split sizes and class counts, no samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import fedekd
from fedekd.data import ClientSplits, FederatedDataModule, Samples
from fedekd.data.site_warnings import site_warnings
from fedekd.data.sites import require_site_name
from fedekd.errors import UserError, listed, require, shorten
from fedekd.federation.run_folder import first_difference, to_json_value
from fedekd.federation.update_validation import is_count
from fedekd.methods import FederationSpec, Method
from fedekd.metrics import METRICS
from fedekd.models.digest import tensors_fingerprint
from fedekd.models.freezing import frozen_names
from fedekd.privacy import GaussianMechanism
from fedekd.tasks import TASKS

#: The splits whose sizes are part of a description.
SPLITS = ("train", "validation", "test", "tuning", "calibration", "holdout")

#: Largest numbers in a description: samples of a site, classes, features, channels, and pixels per side. ImageNet-21k
#: has 21,841 classes.
_MAX_SAMPLES, _MAX_CLASSES, _MAX_FEATURES, _MAX_CHANNELS, _MAX_SIDE = 10**9, 10**5, 10**6, 2**10, 2**13

_LONGEST_CLASS = 100

#: What to do about a description that `describe` cannot give.
_CORRECT = "Check the data and the version of fedekd at the site"


def shared_config(method: Method, spec: FederationSpec, privacy: GaussianMechanism | None = None) -> dict[str, Any]:
    """Return what the server and all sites must agree on, as JSON values.

    The private model is not part of it: each site may have its own. Where private models are exchanged, their frozen
    tensors and their file of weights are part of it.
    """
    proxy = spec.build_model("proxy", "server").state_dict()
    client = spec.client
    settings = {name: value for name, value in vars(method).items() if name != "server_state"}
    return {
        "fedekd": fedekd.__version__,
        "task": spec.task,
        "input_shape": list(spec.input_shape),
        "classes": spec.num_outputs,
        "seed": spec.seed,
        "rounds": spec.rounds,
        "local_epochs": client.local_epochs,
        "lr_decay": client.lr_decay,
        "class_weights": client.class_weights,
        "metric": spec.primary.name,
        "batch_size": spec.batch_size,
        "optimizer": to_json_value(client.optimizer),
        "method": {type(method).__name__: to_json_value(settings)},
        "proxy": {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in proxy.items()},
        **_training_options(spec),
        **({} if spec.select_round == "last" else {"select_round": spec.select_round}),
        **({} if privacy is None else {"privacy": to_json_value(privacy)}),
        **_initial_values(method, spec),
    }


def _initial_values(method: Method, spec: FederationSpec) -> dict[str, Any]:
    """Return what must be equal of private models that are exchanged.

    Frozen tensors are not sent, and the server's initial weights replace those of the sites.
    """
    client = spec.client
    if not method.exchanges_private or not client.starts_equal("server"):
        return {}
    network = spec.build_model("private", "server")
    state = network.state_dict()
    frozen = tensors_fingerprint({name: state[name] for name in sorted(frozen_names(network))})
    return {
        **({"frozen": frozen} if client.has_frozen_parts else {}),
        **({"pretrained": client.private_weights_sha256 or True} if client.is_pretrained("server") else {}),
    }


def _training_options(spec: FederationSpec) -> dict[str, Any]:
    """Return the scheduler, callbacks, clipping and accumulation where they are used."""
    values = spec.hash_dict()
    if values["trainer"].get("gradient_clip_algorithm") == "norm":  # the value is compared first
        del values["trainer"]["gradient_clip_algorithm"]
    names = {
        "client": ("scheduler", "scheduler_interval", "lora"),
        "trainer": ("callbacks", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches"),
    }
    return {
        name: to_json_value(values[part][name])
        for part, group in names.items()
        for name in group
        if name in values[part]
    }


def describe(
    method: Method,
    spec: FederationSpec,
    samples: Samples,
    splits: ClientSplits,
    privacy: GaussianMechanism | None = None,
) -> dict[str, Any]:
    """Return a site's description, as JSON values."""
    indices = torch.cat([splits.train, splits.validation, splits.test])
    counts = torch.bincount(samples.labels[indices], minlength=samples.num_classes)
    return {
        "site": splits.client,
        "config": shared_config(method, spec, privacy),
        "sizes": {name: len(getattr(splits, name)) for name in SPLITS},
        "class_counts": counts.tolist(),
        "digest": splits.digest(samples),
        "name": splits.name,
        "class_names": None if samples.has_numbered_classes else list(samples.class_names),
        "columns": _columns_digest(samples),
    }


def _columns_digest(samples: Samples) -> str | None:
    """Return the SHA-256 (hex) of a table's columns and categories; None for images.

    The names of columns and categories stay at the site.
    """
    if not samples.columns:
        return None
    columns = [[column.name, column.kind, column.categories] for column in samples.columns]
    return sha256(json.dumps(columns).encode()).hexdigest()


def site_label(number: int, name: str | None = None) -> str:
    """Return a site in messages: `site 2`, or `site 'basel'`."""
    return f"site {number}" if name is None else f"site {name!r}"


def described_label(description: Mapping[str, Any]) -> str:
    """Return the site of a description in messages."""
    return site_label(description["site"], description.get("name"))


@dataclass(frozen=True, eq=False)
class SiteSplits(ClientSplits):
    """A site's splits on the server: the sizes are right, the indices are zeros.

    Attributes:
        content: The digest of the samples, from the site's description.
    """

    content: str = field(default="", kw_only=True)

    def digest(self, samples: Samples) -> str:
        """Return the digest from the site's description; `samples` is not used."""
        return self.content


class SiteData(FederatedDataModule):
    """Data module on the server of a federation of sites; it holds no samples.

    Args:
        name: Name of the data set.
        alpha: Dirichlet concentration of the partition, if there was one; reported in the summary.
        descriptions: The sites' descriptions, in the order of their numbers.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per evaluation batch.
    """

    def __init__(
        self,
        name: str,
        alpha: float,
        descriptions: Sequence[Mapping[str, Any]],
        batch_size: int,
        eval_batch_size: int,
    ) -> None:
        super().__init__(name, len(descriptions), alpha, batch_size=batch_size, eval_batch_size=eval_batch_size)
        config = descriptions[0]["config"]
        names = [description.get("name") for description in descriptions]
        self.has_sites = all(name is not None for name in names)
        self._samples = Samples(
            name,
            torch.empty(0, *config["input_shape"], dtype=torch.uint8),
            torch.empty(0, dtype=torch.float32 if config["task"] == "regression" else torch.int64),
            config["task"],
            # Real-valued targets have one count, that of all samples.
            len(counts) if len(counts := descriptions[0]["class_counts"]) > 1 else 0,
            class_names=tuple(descriptions[0].get("class_names") or ()),
            site_names=tuple(filter(None, names)),
        )
        self._clients = [
            SiteSplits(
                site,
                # Expanded: memory for one index, whatever the size.
                *(torch.zeros(1, dtype=torch.int64).expand(description["sizes"][split]) for split in SPLITS),
                content=description["digest"],
                name=description.get("name"),
            )
            for site, description in enumerate(descriptions)
        ]
        self._class_counts = np.asarray([description["class_counts"] for description in descriptions], dtype=np.int64)

    def warnings(self) -> list[str]:
        """Return lines on named sites; each site checks its own samples."""
        if not self.has_sites:
            return []
        counts = self._class_counts if self.task == "classification" else np.zeros((len(self._class_counts), 0))
        tests = [len(splits.test) for splits in self.clients]
        return site_warnings(self.samples.site_names, counts, self.samples.class_names, tests)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Return the sites' class counts, (sites, classes)."""
        return self._class_counts


def require_description(description: Mapping[str, Any]) -> None:
    """Check that a received description has the fields and types of `describe`.

    Raises:
        UserError: Names the first missing or invalid field.
    """
    config, sizes, counts = (description.get(name) for name in ("config", "sizes", "class_counts"))
    digest = description.get("digest")
    expected = {
        "site": ("a number", is_count(description.get("site"))),
        "config": ("options with the version of fedekd", isinstance(config, dict) and "fedekd" in config),
        "sizes": (
            f"at most {_MAX_SAMPLES:,} samples of each split",
            isinstance(sizes, dict) and all(_is_size(sizes.get(name)) for name in SPLITS),
        ),
        "class_counts": (
            f"counts of 1 to {_MAX_CLASSES:,} classes",
            isinstance(counts, list) and 0 < len(counts) <= _MAX_CLASSES and all(map(_is_size, counts)),
        ),
        "digest": (
            "64 hexadecimal digits",
            _is_digest(digest),
        ),
        "name": ("a valid name of a site or null", _is_name(description.get("name"))),
        "class_names": (
            f"a different name of 1 to {_LONGEST_CLASS} printable characters per class, or null",
            _are_class_names(description.get("class_names"), counts),
        ),
        "columns": (
            "64 hexadecimal digits or null",
            description.get("columns") is None or _is_digest(description["columns"]),
        ),
    }
    for name, (allowed, is_valid) in expected.items():
        require(is_valid, name, allowed, description.get(name), _CORRECT)
    assert isinstance(sizes, dict)
    assert isinstance(counts, list)
    held = {name: sizes[name] for name in ("train", "validation", "test")}
    parts = sum(sizes[name] for name in ("tuning", "calibration", "holdout"))
    is_consistent = sum(held.values()) == sum(counts) and parts == held["validation"]
    require(is_consistent, "sizes", f"splits of {sum(counts):,} samples, and parts of validation", sizes, _CORRECT)
    require(sizes["train"] > 0, "sizes", "at least 1 training sample", sizes["train"], _CORRECT)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_name(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(require_site_name(value))
    except UserError:
        return False


def _are_class_names(names: Any, counts: Any) -> bool:
    """Return True for None, or for different printable names of all classes."""
    if names is None:
        return True
    if not (isinstance(names, list) and isinstance(counts, list) and len(names) == len(counts)):
        return False
    are_names = all(isinstance(name, str) and 0 < len(name) <= _LONGEST_CLASS and name.isprintable() for name in names)
    return are_names and len(set(names)) == len(names)


def _is_size(value: Any) -> bool:
    return is_count(value) and value <= _MAX_SAMPLES


def _require_inputs(config: Mapping[str, Any], site: str) -> None:
    """Check what the server builds its networks from.

    Raises:
        UserError: If a value is not plausible.
    """
    shape = config.get("input_shape")
    largest = {1: (_MAX_FEATURES,), 3: (_MAX_CHANNELS, _MAX_SIDE, _MAX_SIDE)}
    is_shape = (
        isinstance(shape, list)
        and len(shape) in largest
        and all(is_count(size) and 1 <= size <= most for size, most in zip(shape, largest[len(shape)], strict=True))
    )
    expected = {
        "task": (f"one of {listed(TASKS)}", config.get("task") in TASKS),
        "input_shape": (f"a number of features, or channels, height and width up to {largest[3]}", is_shape),
    }
    for name, (allowed, is_valid) in expected.items():
        require(is_valid, f"{site}: {name}", allowed, config.get(name), _CORRECT)
    metrics = [row.name for row in METRICS.values() if row.task == config["task"]]
    metric = config.get("metric")
    require(isinstance(metric, str) and metric in metrics, f"{site}: metric", f"one of {listed(metrics)}", metric)


def _require_counted_classes(description: Mapping[str, Any]) -> None:
    """Check that the outputs of a site's networks are the classes that it counts.

    Raises:
        UserError: If the numbers differ, or there is one class.
    """
    classes, option = description["config"].get("classes"), f"{described_label(description)}: classes"
    if description["config"]["task"] == "regression":
        require(is_count(classes) and classes == 1, option, "1 for regression", classes, _CORRECT)
        return
    count = len(description["class_counts"])
    require(is_count(classes) and classes == count, option, f"{count} (class_counts)", classes, _CORRECT)
    require(count > 1, option, "at least 2", count, "Set --data.classes or --data.num_classes at all sites")


def require_consistent_sites(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Check that all sites have equal versions, configurations and class numbers.

    Raises:
        UserError: Names the first site that differs from the server's version or from the first site.
    """
    for description in descriptions:
        version = {"fedekd": description["config"]["fedekd"]}
        require_agreement({**description, "config": version}, {"fedekd": fedekd.__version__})
        _require_inputs(description["config"], described_label(description))
        _require_counted_classes(description)
    first = descriptions[0]
    _require_different_names(descriptions)
    for description in descriptions:
        if description.get("columns") != first.get("columns"):
            raise UserError(
                f"{described_label(description)}: expected a table with the columns and categories of"
                f" {described_label(first)}. Set --data.categories and --data.categorical_columns to the same values"
                " at all sites"
            )
        require_agreement(description, first["config"])
        names, expected_names = (
            None if part.get("class_names") is None else [shorten(name, 20) for name in part["class_names"]]
            for part in (description, first)
        )
        classes, expected = len(description["class_counts"]), len(first["class_counts"])
        if classes != expected and names is None:
            raise UserError(
                f"{described_label(description)}: expected {expected} classes, as at {described_label(first)}, got"
                f" {classes}. Set --data.num_classes to the same number at all sites."
            )
        if description.get("class_names") != first.get("class_names"):
            raise UserError(
                f"{described_label(description)}: expected the classes {_listed_classes(expected_names, expected)}, as"
                f" at {described_label(first)}, got {_listed_classes(names, classes)}. Set --data.classes to the same"
                " names at all sites"
            )


def _listed_classes(names: Sequence[str] | None, count: int) -> str:
    """Return names of classes for an error, with room for two lists."""
    return f"0..{count - 1}" if names is None else shorten(", ".join(names), 80)


def _require_different_names(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Check that all sites have different names, or none has one.

    Raises:
        UserError: Names two sites with one name, or a site without one.
    """
    seen: dict[str, int] = {}
    for description in descriptions:
        number, name = description["site"], description.get("name")
        if (name is None) != (descriptions[0].get("name") is None):
            raise UserError("name: expected one at every site or at none. Set name in each --node-config")
        if name is not None and (other := seen.setdefault(name.casefold(), number)) != number:
            raise UserError(
                f"name: expected different names, got {name!r} at sites {other} and {number}. Set name in --node-config"
            )


def require_agreement(description: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check a site's configuration against the federation's.

    Raises:
        UserError: Names the site and the first option that differs.
    """
    difference = first_difference(description["config"], dict(config))
    if difference is not None:
        key, actual, expected = difference
        action = (
            "Install the same version of fedekd at the server and at all sites."
            if key == "fedekd"
            else "Use the same options and configuration files at the server and at all sites."
        )
        values = f"expected {str(expected)[:60]}, got {str(actual)[:60]}"
        raise UserError(f"{described_label(description)}: {key[:100]}: {values}. {action}")
