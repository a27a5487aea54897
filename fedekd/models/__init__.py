"""Networks: CNNs, torchvision classifiers, a perceptron, and exits for all."""

from fedekd.models.build import build_model, check_model, eval_mode
from fedekd.models.cnn import Conv3, PrivateCNN, ProxyCNN
from fedekd.models.cost import ExitCosts, exit_costs, num_parameters
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.mlp import MLP
from fedekd.models.multi_exit import ExitHead, MultiExitNetwork
from fedekd.models.stages import multi_exit

__all__ = [
    "MLP",
    "Conv3",
    "ExitCosts",
    "ExitHead",
    "ImageClassifier",
    "MultiExitNetwork",
    "PrivateCNN",
    "ProxyCNN",
    "build_model",
    "check_model",
    "eval_mode",
    "exit_costs",
    "multi_exit",
    "num_parameters",
]
