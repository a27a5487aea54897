"""Privacy of updates: noise, account of epsilon, membership inference."""

from fedekd.privacy.accounting import gaussian_epsilon, mean_epsilon, update_epsilon
from fedekd.privacy.mechanism import GaussianMechanism
from fedekd.privacy.membership import (
    AttackResult,
    evaluate_attack,
    lira_scores,
    logit_confidence,
    roc_auc,
    threshold_advantage,
    true_positive_rate,
)

__all__ = [
    "AttackResult",
    "GaussianMechanism",
    "evaluate_attack",
    "gaussian_epsilon",
    "lira_scores",
    "logit_confidence",
    "mean_epsilon",
    "roc_auc",
    "threshold_advantage",
    "true_positive_rate",
    "update_epsilon",
]
