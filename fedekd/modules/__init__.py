"""LightningModules: what one client trains, and what anybody's Lightning project can."""

from fedekd.modules.energies import ENERGIES, Energy, build_energy
from fedekd.modules.gated_private import GatedPrivateModule
from fedekd.modules.losses.distillation import DistillationLoss, GatedDistillationLoss, LossTerm, SupervisedLoss
from fedekd.modules.losses.exits import DKDLoss, MutualExitLoss, SelfDistillationLoss
from fedekd.modules.multi_exit import MovingAverage, MultiExitModule
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.modules.prediction import ModelOutput, predict, teacher_forward
from fedekd.modules.proxy_distill import ProxyDistillModule
from fedekd.modules.supervised import SupervisedModule
from fedekd.modules.trainer_factory import TrainerFactory

__all__ = [
    "ENERGIES",
    "DKDLoss",
    "DistillationLoss",
    "Energy",
    "GatedDistillationLoss",
    "GatedPrivateModule",
    "LossTerm",
    "ModelOutput",
    "MovingAverage",
    "MultiExitModule",
    "MutualExitLoss",
    "ObjectiveModule",
    "ProxyDistillModule",
    "SelfDistillationLoss",
    "SupervisedLoss",
    "SupervisedModule",
    "TrainerFactory",
    "build_energy",
    "default_optimizer",
    "predict",
    "teacher_forward",
]
