"""Privacy of updates: noise, and account of epsilon."""

from fedekd.privacy.accounting import gaussian_epsilon, mean_epsilon, update_epsilon
from fedekd.privacy.mechanism import GaussianMechanism

__all__ = [
    "GaussianMechanism",
    "gaussian_epsilon",
    "mean_epsilon",
    "update_epsilon",
]
