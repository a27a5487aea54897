"""Networks: CNNs, ResNets, torchvision classifiers, an MLP, and exits for all."""

from fedekd.models.build import build_model, check_model, eval_mode
from fedekd.models.cnn import Conv3, PrivateCNN, ProxyCNN
from fedekd.models.cost import ExitCosts, exit_costs, network_flops, num_parameters
from fedekd.models.ensemble import Ensemble, MultiExitEnsemble, build_ensemble
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.lora import LoraOptions
from fedekd.models.mlp import MLP
from fedekd.models.multi_exit import ExitHead, MultiExitNetwork
from fedekd.models.resnet import CIFARResNet
from fedekd.models.stages import multi_exit

__all__ = [
    "MLP",
    "CIFARResNet",
    "Conv3",
    "Ensemble",
    "ExitCosts",
    "ExitHead",
    "ImageClassifier",
    "LoraOptions",
    "MultiExitEnsemble",
    "MultiExitNetwork",
    "PrivateCNN",
    "ProxyCNN",
    "build_ensemble",
    "build_model",
    "check_model",
    "eval_mode",
    "exit_costs",
    "multi_exit",
    "network_flops",
    "num_parameters",
]
