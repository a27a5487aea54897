"""What a server knows of its sites: how many samples of what, never which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import fedekd
from fedekd.data import ClientSplits, FederatedDataModule, ImageData
from fedekd.errors import UserError
from fedekd.federation.run_folder import first_difference, to_json_value
from fedekd.flower.messages import is_count
from fedekd.methods import FederationSpec, Method

#: The splits whose sizes a site tells.
SPLITS = ("train", "validation", "test", "tuning", "calibration", "holdout")


def recipe(method: Method, spec: FederationSpec) -> dict[str, Any]:
    """What all parts of a federation must agree on, as plain values; each may have a private model of its own."""
    proxy = spec.build_model("proxy", "server").state_dict()
    client = spec.client
    settings = {name: value for name, value in vars(method).items() if name != "server_state"}
    return {
        "fedekd": fedekd.__version__,
        "task": spec.task,
        "channels": spec.in_channels,
        "image_size": list(spec.image_size),
        "classes": spec.num_outputs,
        "seed": spec.seed,
        "rounds": spec.rounds,
        "local_epochs": client.local_epochs,
        "lr_decay": client.lr_decay,
        "batch_size": spec.batch_size,
        "optimizer": to_json_value(client.optimizer),
        "method": {type(method).__name__: to_json_value(settings)},
        "proxy": {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in proxy.items()},
    }


def describe(method: Method, spec: FederationSpec, images: ImageData, splits: ClientSplits) -> dict[str, Any]:
    """What a site tells of itself."""
    own = torch.cat([splits.train, splits.validation, splits.test])
    counts = torch.bincount(images.labels[own], minlength=images.num_classes)
    return {
        "number": splits.client,
        "recipe": recipe(method, spec),
        "sizes": {name: len(getattr(splits, name)) for name in SPLITS},
        "class_counts": counts.tolist(),
        "digest": splits.digest(images),
    }


@dataclass(frozen=True, eq=False)
class SiteSplits(ClientSplits):
    """A site's samples as the server knows them: of each split the size.

    Attributes:
        content: The digest that the site gave of its samples.
    """

    content: str = ""

    def digest(self, images: ImageData) -> str:
        """What the site said; `images` is not looked at."""
        return self.content


class SiteData(FederatedDataModule):
    """The data of a federation of sites, of which the server holds none.

    Args:
        name: What the data set is called.
        alpha: How the data were dealt, where they were; for the summary.
        descriptions: What each site told, by number.
        batch_size: Samples a training batch.
        eval_batch_size: Samples an evaluation batch.
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
        facts = descriptions[0]["recipe"]
        height, width = facts["image_size"]
        regression = facts["task"] == "regression"
        self._images = ImageData(
            name,
            torch.empty(0, facts["channels"], height, width, dtype=torch.uint8),
            torch.empty(0, dtype=torch.float32 if regression else torch.int64),
            facts["task"],
            len(descriptions[0]["class_counts"]),
            {},
        )
        self._clients = [
            SiteSplits(
                number, **{split: _of_size(each["sizes"][split]) for split in SPLITS}, content=str(each["digest"])
            )
            for number, each in enumerate(descriptions)
        ]
        self._class_counts = np.asarray([each["class_counts"] for each in descriptions], dtype=np.int64)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """As the sites told them, (K, classes)."""
        return self._class_counts


def require_description(description: Mapping[str, Any]) -> None:
    """Hold what a site tells of itself to what `describe` gives.

    Raises:
        UserError: Naming what is missing or of another kind.
    """
    sizes, counts, told = (description.get(name) for name in ("sizes", "class_counts", "recipe"))
    sound = {
        "number": is_count(description.get("number")),
        "recipe": isinstance(told, dict) and "fedekd" in told,
        "sizes": isinstance(sizes, dict) and all(is_count(sizes.get(name)) for name in SPLITS),
        "class_counts": isinstance(counts, list) and all(map(is_count, counts)),
        "digest": isinstance(description.get("digest"), str),
    }
    if wrong := [name for name, fits in sound.items() if not fits]:
        raise UserError(f"its {wrong[0]} is {str(description.get(wrong[0]))[:80]!r}")


def require_alike(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Hold sites to each other, before one of them is asked what their data are like.

    Raises:
        UserError: Naming the site that has another version of fedekd, or differs from the first.
    """
    for description in descriptions:
        version = {"fedekd": description["recipe"]["fedekd"]}
        require_agreement({**description, "recipe": version}, {"fedekd": fedekd.__version__})
    first = descriptions[0]
    for description in descriptions:
        require_agreement(description, first["recipe"])
        classes, others = len(description["class_counts"]), len(first["class_counts"])
        if classes != others:
            raise UserError(
                f"site {description['number']} tells of {classes} classes, and site {first['number']} of {others}"
            )


def require_agreement(description: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Hold a site to what the federation has agreed on.

    Raises:
        UserError: Naming the site, and the first thing in which it differs.
    """
    difference = first_difference(description["recipe"], dict(ours))
    if difference is not None:
        key, theirs, here = difference
        told = "" if key != "fedekd" else "; install the same version everywhere"
        raise UserError(f"site {description['number']} has {key} {theirs}, and the federation {here}{told}")


def _of_size(size: int) -> Tensor:
    return torch.zeros(int(size), dtype=torch.int64)
