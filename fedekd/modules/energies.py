"""Energies E(x) of a private model and a proxy, as modules that a gate evaluates.

A new energy is a subclass of `Energy`, in any package; a row of `ENERGIES` gives it a short name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedekd import functional as F
from fedekd.errors import UserError, listed, require, require_choice
from fedekd.modules.prediction import ModelOutput
from fedekd.seeding import derive_seed
from fedekd.tasks import Task

Source = Literal["proxy", "private"]


class Energy(nn.Module):
    """Base class of energies; high energy gives a low distillation weight.

    Attributes:
        needs_features: True if the outputs must contain features.
        tasks: Tasks for which the energy is defined.

    Example:
        >>> class ConfidenceGap(Energy):
        ...     def forward(self, private, proxy):
        ...         return (private.output.amax(1) - proxy.output.amax(1)).abs()
    """

    needs_features: bool = False
    tasks: tuple[Task, ...] = ("classification",)

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """Compute the energies of a batch, shape (B,), in at least float32."""
        raise NotImplementedError


class DisagreementEnergy(Energy):
    """Energy of FedeKD: Eq. 1 for classification, Eq. 2 for regression.

    Eq. 2 is the symmetric KL divergence of two unit-variance Gaussians around the outputs, hence the name `kl` of both.

    Args:
        task: `classification` or `regression`.
        eps: Added to the denominator of Eq. 1, above 0.
    """

    tasks = ("classification", "regression")

    def __init__(self, task: Task = "classification", eps: float = 1e-8) -> None:
        super().__init__()
        self.task, self.eps = task, eps

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """Compute Eq. 1 or Eq. 2, shape (B,)."""
        if self.task == "regression":
            return F.squared_error_energy(private.output, proxy.output)
        return F.kl_energy(private.output, proxy.output, eps=self.eps)


class UncertaintyEnergy(Energy):
    """Energy of one model's logits (FedeKD Eq. 6-8).

    Args:
        function: From logits (B, C) to energies (B,).
        of: Model whose logits are used, `proxy` (the teacher) or `private`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], of: Source = "proxy") -> None:
        super().__init__()
        self.function, self.of = function, of

    def forward(self, private: ModelOutput, proxy: ModelOutput) -> Tensor:
        """Compute `function` of the selected logits, shape (B,)."""
        return self.function((proxy if self.of == "proxy" else private).output)


class FeatureEnergy(Energy):
    """Distance of the models' features (FedeKD Eq. 9).

    The private features are projected to the proxy's dimension by a fixed random matrix with entries
    N(0, 1/private_features). The gate is detached, so the projection cannot be trained.

    Args:
        private_features: Dimension of the private model's features, at least 1.
        proxy_features: Dimension of the proxy's features, at least 1.
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
        """Compute Eq. 9, shape (B,)."""
        assert private.features is not None
        assert proxy.features is not None
        features = F.upcast_to_float32(private.features)
        with torch.autocast(features.device.type, enabled=False):
            projected = features @ self.projection.to(features.dtype)
        return F.feature_distance_energy(proxy.features, projected)


def _num_features(network: nn.Module) -> int:
    num_features = getattr(network, "num_features", None)
    if not isinstance(num_features, int):
        raise UserError(
            f"energy 'feature': expected a network with num_features, got {type(network).__name__}. Wrap it in"
            " fedekd.models.ImageClassifier or choose another energy"
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
    """Create an energy from its short name, or check the given instance.

    Args:
        energy: A name of `ENERGIES`, or an instance.
        task: `classification` or `regression`.
        of: Model whose logits `entropy`, `margin` and `logsumexp` use.
        private: The private model, for the dimension of its features.
        proxy: The proxy, for the dimension of its features.

    Raises:
        UserError: If a name is unknown, an object is not an `Energy`, it is not defined for the task, or a network has
            no features.
    """
    require_choice("energy_of", of, get_args(Source))
    name = energy if isinstance(energy, str) else type(energy).__name__
    if isinstance(energy, str):
        require_choice("energy", energy, ENERGIES)
        energy = ENERGIES[energy](task, of, private, proxy)
    require(isinstance(energy, Energy), "energy", f"{listed(ENERGIES)} or an instance of Energy", energy)
    require(task in energy.tasks, "energy", f"one that is defined for {task}", name)
    return energy
