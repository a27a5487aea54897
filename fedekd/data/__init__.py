"""Data sets, their partition across clients, batches and corruptions."""

from fedekd.data.batches import TensorBatches, in_memory_format, scale
from fedekd.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from fedekd.data.datamodule import ClientSplits, FederatedDataModule, data_warnings, split_client
from fedekd.data.partition import (
    PARTITIONS,
    cut_validation,
    dirichlet_cluster_partition,
    dirichlet_label_partition,
    iid_partition,
    split_indices,
)
from fedekd.data.samples import Samples
from fedekd.data.sources import load_samples

__all__ = [
    "CORRUPTIONS",
    "PARTITIONS",
    "SEVERITIES",
    "ClientSplits",
    "Corruption",
    "FederatedDataModule",
    "Samples",
    "TensorBatches",
    "corrupt",
    "cut_validation",
    "data_warnings",
    "dirichlet_cluster_partition",
    "dirichlet_label_partition",
    "iid_partition",
    "in_memory_format",
    "load_samples",
    "scale",
    "split_client",
    "split_indices",
]
