"""LightningModules: what one client trains, and what anybody's Lightning project can."""

from fedekd.modules.energies import ENERGIES, Energy, build_energy
from fedekd.modules.exit_objectives import DecoupledDistilled, DeepToShallow, MutualExits
from fedekd.modules.gated_private import GatedPrivateModule
from fedekd.modules.multi_exit import MovingAverage, MultiExitModule
from fedekd.modules.objective_module import ObjectiveModule, default_optimizer
from fedekd.modules.objectives import Distilled, Gated, Objective, Supervised
from fedekd.modules.prediction import Prediction, predict, teach
from fedekd.modules.proxy_distill import ProxyDistillModule
from fedekd.modules.supervised import SupervisedModule
from fedekd.modules.trainer_factory import TrainerFactory

__all__ = [
    "ENERGIES",
    "DecoupledDistilled",
    "DeepToShallow",
    "Distilled",
    "Energy",
    "Gated",
    "GatedPrivateModule",
    "MovingAverage",
    "MultiExitModule",
    "MutualExits",
    "Objective",
    "ObjectiveModule",
    "Prediction",
    "ProxyDistillModule",
    "Supervised",
    "SupervisedModule",
    "TrainerFactory",
    "build_energy",
    "default_optimizer",
    "predict",
    "teach",
]
