"""LightningModules, loss terms and energies."""

from fedekd.modules.energies import ENERGIES, Energy, build_energy
from fedekd.modules.gated_private import GatedPrivateModule
from fedekd.modules.held_out_trust import HeldOutTrust
from fedekd.modules.losses import (
    DistillationLoss,
    DKDLoss,
    GatedDistillationLoss,
    LinearPenalty,
    LossTerm,
    MutualExitLoss,
    MutualLoss,
    ProximalPenalty,
    SelfDistillationLoss,
    SupervisedLoss,
)
from fedekd.modules.multi_exit import MovingAverage, MultiExitModule, safekd_optimizer
from fedekd.modules.mutual import MutualModule, PrivateProxyPair
from fedekd.modules.objective_module import ObjectiveModule, SupervisedModule, fedekd_optimizer
from fedekd.modules.phase_callbacks import build_callbacks
from fedekd.modules.prediction import ModelOutput, predict, teacher_forward
from fedekd.modules.proxy_distill import ProxyDistillModule
from fedekd.modules.schedule import Schedule
from fedekd.modules.trainer_factory import TrainerFactory

__all__ = [
    "ENERGIES",
    "DKDLoss",
    "DistillationLoss",
    "Energy",
    "GatedDistillationLoss",
    "GatedPrivateModule",
    "HeldOutTrust",
    "LinearPenalty",
    "LossTerm",
    "ModelOutput",
    "MovingAverage",
    "MultiExitModule",
    "MutualExitLoss",
    "MutualLoss",
    "MutualModule",
    "ObjectiveModule",
    "PrivateProxyPair",
    "ProximalPenalty",
    "ProxyDistillModule",
    "Schedule",
    "SelfDistillationLoss",
    "SupervisedLoss",
    "SupervisedModule",
    "TrainerFactory",
    "build_callbacks",
    "build_energy",
    "fedekd_optimizer",
    "predict",
    "safekd_optimizer",
    "teacher_forward",
]
