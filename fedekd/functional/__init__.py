"""The mathematics, without state: energies, the gate, distillation losses and averages of models."""

from fedekd.functional.aggregation import average_state_dicts
from fedekd.functional.distillation import gated_distillation, kl_distillation, squared_error_distillation
from fedekd.functional.energies import (
    entropy_energy,
    feature_distance_energy,
    kl_energy,
    logsumexp_energy,
    margin_energy,
    squared_error_energy,
)
from fedekd.functional.gate import trust_weights
from fedekd.functional.precision import at_least_float32

__all__ = [
    "at_least_float32",
    "average_state_dicts",
    "entropy_energy",
    "feature_distance_energy",
    "gated_distillation",
    "kl_distillation",
    "kl_energy",
    "logsumexp_energy",
    "margin_energy",
    "squared_error_distillation",
    "squared_error_energy",
    "trust_weights",
]
