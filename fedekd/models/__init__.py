"""Networks: the paper's two CNNs, any torchvision classifier, and how to build one by name."""

from fedekd.models.build import build_model, check_model
from fedekd.models.cnn import PrivateCNN, ProxyCNN
from fedekd.models.image_classifier import ImageClassifier
from fedekd.models.size import num_parameters

__all__ = ["ImageClassifier", "PrivateCNN", "ProxyCNN", "build_model", "check_model", "num_parameters"]
