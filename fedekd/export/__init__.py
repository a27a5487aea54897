"""Export deployed models: weights, torch.export, ONNX, model cards."""

from fedekd.export.exporter import FORMATS, Export, export_model
from fedekd.export.inputs import InputFormat
from fedekd.export.served import OUTPUTS, EarlyExitNetwork, ServedNetwork
from fedekd.export.specification import ModelSpecification
from fedekd.export.weights_file import load_network, load_served

__all__ = [
    "FORMATS",
    "OUTPUTS",
    "EarlyExitNetwork",
    "Export",
    "InputFormat",
    "ModelSpecification",
    "ServedNetwork",
    "export_model",
    "load_network",
    "load_served",
]
