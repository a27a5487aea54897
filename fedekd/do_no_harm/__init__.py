"""Do-no-harm model selection with exact tests on held-out samples."""

from fedekd.do_no_harm.power import (
    acceptance_probability,
    deciding_gains,
    deciding_samples,
    estimate_acceptance,
    fewest_samples,
    recall_acceptance,
)
from fedekd.do_no_harm.rule import Comparison, DoNoHarm

__all__ = [
    "Comparison",
    "DoNoHarm",
    "acceptance_probability",
    "deciding_gains",
    "deciding_samples",
    "estimate_acceptance",
    "fewest_samples",
    "recall_acceptance",
]
