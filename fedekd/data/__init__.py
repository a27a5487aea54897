"""Data sets, their partition across clients, batches and corruptions."""

from fedekd.data.batches import TensorBatches, in_memory_format, scale
from fedekd.data.client_splits import ClientSplits, split_client
from fedekd.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from fedekd.data.datamodule import FederatedDataModule
from fedekd.data.partition import (
    PARTITIONS,
    cut_validation,
    dirichlet_cluster_partition,
    dirichlet_label_partition,
    iid_partition,
    split_indices,
)
from fedekd.data.readers import StoredPart
from fedekd.data.sample_warnings import data_warnings
from fedekd.data.samples import Samples
from fedekd.data.sources import load_samples
from fedekd.data.stored import Inputs, StoredInputs, close_inputs, input_batches, split_inputs, take_inputs
from fedekd.data.transforms import build_transform

__all__ = [
    "CORRUPTIONS",
    "PARTITIONS",
    "SEVERITIES",
    "ClientSplits",
    "Corruption",
    "FederatedDataModule",
    "Inputs",
    "Samples",
    "StoredInputs",
    "StoredPart",
    "TensorBatches",
    "build_transform",
    "close_inputs",
    "corrupt",
    "cut_validation",
    "data_warnings",
    "dirichlet_cluster_partition",
    "dirichlet_label_partition",
    "iid_partition",
    "in_memory_format",
    "input_batches",
    "load_samples",
    "scale",
    "split_client",
    "split_indices",
    "split_inputs",
    "take_inputs",
]
