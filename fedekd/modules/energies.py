"""The energies of `fedekd.functional` as objects that a gate can be given: E(x) of a private model and a proxy.

A new energy is one class here (or anywhere: `energy` takes an instance too) and, for a short name, one row of
`ENERGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedekd import functional as F
from fedekd.errors import UserError, nearest
from fedekd.modules.prediction import ModelOutput
from fedekd.seeding import derive_seed
from fedekd.tasks import Task

Source = Literal["proxy", "private"]


class Energy(nn.Module):
    """How little a proxy's teaching is to be trusted, sample by sample.

    Attributes:
        needs_features: Whether the predictions must carry features.
        tasks: The tasks for which the energy means something.
    """

    needs_features: bool = False
    tasks: tuple[Task, ...] = ("classification",)

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """The energies (B,) of a batch, at least float32."""
        raise NotImplementedError


class DisagreementEnergy(Energy):
    """The paper's energy: Eq. 1 for classification, Eq. 2 for regression.

    Eq. 2 is the symmetric KL divergence of two unit-variance Gaussians around the predictions, so `kl` names both.
    """

    tasks = ("classification", "regression")

    def __init__(self, task: Task = "classification", eps: float = 1e-8) -> None:
        super().__init__()
        self.task, self.eps = task, eps

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """Eq. 1 or Eq. 2, (B,)."""
        if self.task == "regression":
            return F.squared_error_energy(private.output, proxy.output)
        return F.kl_energy(private.output, proxy.output, eps=self.eps)


class UncertaintyEnergy(Energy):
    """An energy of one model's logits alone (Eq. 6-8).

    Args:
        function: Logits (B, C) to energies (B,).
        of: Whose logits; the proxy's by default, since it is the teacher whose trust is in question.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], of: Source = "proxy") -> None:
        super().__init__()
        self.function, self.of = function, of

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """`function` of the chosen model's logits, (B,)."""
        return self.function((proxy if self.of == "proxy" else private).output)


class FeatureEnergy(Energy):
    """The distance of the models' features (Eq. 9).

    The private features are brought to the proxy's dimension by a fixed random projection with entries
    N(0, 1/private_features): the gate is detached, so nothing could train it.

    Args:
        private_features: Dimension of the private model's features.
        proxy_features: Dimension of the proxy's features.
    """

    needs_features = True
    tasks = ("classification", "regression")
    projection: Tensor

    def __init__(self, private_features: int, proxy_features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive_seed("feature energy", private_features, proxy_features))
        projection = torch.randn(private_features, proxy_features, generator=generator)
        self.register_buffer("projection", projection / private_features**0.5, persistent=False)

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """Eq. 9, (B,)."""
        assert private.features is not None
        assert proxy.features is not None
        features = F.upcast_to_float32(private.features)
        projected = features @ self.projection.to(features.dtype)
        return F.feature_distance_energy(proxy.features, projected)


def _num_features(network: nn.Module) -> int:
    num_features = getattr(network, "num_features", None)
    if not isinstance(num_features, int):
        raise UserError(
            f"energy 'feature' needs networks that tell num_features, and {type(network).__name__} does not;"
            " wrap it in fedekd.models.ImageClassifier or choose another energy"
        )
    return num_features


ENERGIES: dict[str, Callable[[Task, Source, nn.Module, nn.Module], Energy]] = {
    "kl": lambda task, of, private, proxy: DisagreementEnergy(task),
    "entropy": lambda task, of, private, proxy: UncertaintyEnergy(F.entropy_energy, of),
    "margin": lambda task, of, private, proxy: UncertaintyEnergy(F.margin_energy, of),
    "logsumexp": lambda task, of, private, proxy: UncertaintyEnergy(F.logsumexp_energy, of),
    "feature": lambda task, of, private, proxy: FeatureEnergy(_num_features(private), _num_features(proxy)),
}


def build_energy(energy: str | Energy, task: Task, of: Source, private: nn.Module, proxy: nn.Module) -> Energy:
    """An energy by its short name, or the instance that was given.

    Raises:
        UserError: If a name is unknown, the energy is not defined for the task, or a network lacks what it needs.
    """
    if of not in get_args(Source):
        raise UserError(f"energy_of is {of!r}, which is not known; {nearest(of, get_args(Source))}")
    if isinstance(energy, str):
        if energy not in ENERGIES:
            raise UserError(f"energy is {energy!r}, which is not known; {nearest(energy, ENERGIES)}")
        built = ENERGIES[energy](task, of, private, proxy)
    else:
        built = energy
    if task not in built.tasks:
        raise UserError(f"energy {energy!r} is defined for {' and '.join(built.tasks)}, not for task {task!r}")
    return built
