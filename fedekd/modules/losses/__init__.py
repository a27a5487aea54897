"""Loss terms: the summands of the loss that an `ObjectiveModule` minimises."""

from fedekd.modules.losses.base import LossTerm, Record, SupervisedLoss, weighted_exit_loss
from fedekd.modules.losses.checks import require_exit_weights, require_nonnegative, require_temperature
from fedekd.modules.losses.distillation import GATES, DistillationLoss, Gate, GatedDistillationLoss, MutualLoss
from fedekd.modules.losses.exits import DKDLoss, MutualExitLoss, SelfDistillationLoss
from fedekd.modules.losses.fedtype import ConformalModel, SetRankingLoss
from fedekd.modules.losses.regularizers import LinearPenalty, ProximalPenalty, copy_parameters

__all__ = [
    "GATES",
    "ConformalModel",
    "DKDLoss",
    "DistillationLoss",
    "Gate",
    "GatedDistillationLoss",
    "LinearPenalty",
    "LossTerm",
    "MutualExitLoss",
    "MutualLoss",
    "ProximalPenalty",
    "Record",
    "SelfDistillationLoss",
    "SetRankingLoss",
    "SupervisedLoss",
    "copy_parameters",
    "require_exit_weights",
    "require_nonnegative",
    "require_temperature",
    "weighted_exit_loss",
]
