"""Pure functions: energies, gate, distillation, exits, statistics, averages."""

from fedekd.functional.aggregation import average_state_dicts
from fedekd.functional.aggregators import Aggregator, CoordinateMedian, Mean, TrimmedMean
from fedekd.functional.confidence import (
    AGREEMENT,
    CONFIDENCES,
    SCORES,
    agreement_confidence,
    class_log_odds,
    entropy_confidence,
    margin_confidence,
    max_softmax_confidence,
    score_exit,
)
from fedekd.functional.conformal import (
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    regularized_scores,
    set_agreement,
    set_ranking_loss,
)
from fedekd.functional.distillation import (
    decoupled_distillation,
    gated_distillation,
    kl_distillation,
    squared_error_distillation,
)
from fedekd.functional.e_process import (
    betting_e_process,
    conformal_ranks,
    error_payoffs,
    first_alarm,
    loss_payoffs,
    rank_e_process,
)
from fedekd.functional.energies import (
    entropy_energy,
    feature_distance_energy,
    kl_energy,
    logsumexp_energy,
    margin_energy,
    squared_error_energy,
)
from fedekd.functional.exit_scheduling import active_exits, cosine_similarities, mixing_weights, student_budget
from fedekd.functional.gate import trust_weights
from fedekd.functional.held_out_trust import correctness_trust, look_up_trust, skill_trust
from fedekd.functional.label_prior import adjust_log_prior, estimate_label_prior, log_label_prior
from fedekd.functional.log_linear import (
    combine_log_linear,
    fit_linear_weights,
    fit_log_linear_weights,
    fit_sample_weights,
    sample_weights,
)
from fedekd.functional.paired_tests import betting_p_value, betting_stake, paired_p_value
from fedekd.functional.precision import all_finite, at_least_float32, upcast_to_float32
from fedekd.functional.simplex import project_to_simplex
from fedekd.functional.submodels import average_submodels, submodel_state_dict
from fedekd.functional.unconditional_test import unconditional_p_value

__all__ = [
    "AGREEMENT",
    "CONFIDENCES",
    "SCORES",
    "Aggregator",
    "CoordinateMedian",
    "Mean",
    "TrimmedMean",
    "active_exits",
    "adjust_log_prior",
    "agreement_confidence",
    "all_finite",
    "at_least_float32",
    "average_state_dicts",
    "average_submodels",
    "betting_e_process",
    "betting_p_value",
    "betting_stake",
    "class_log_odds",
    "combine_log_linear",
    "conformal_quantile",
    "conformal_ranks",
    "correctness_trust",
    "cosine_similarities",
    "decoupled_distillation",
    "entropy_confidence",
    "entropy_energy",
    "error_payoffs",
    "estimate_label_prior",
    "feature_distance_energy",
    "first_alarm",
    "fit_linear_weights",
    "fit_log_linear_weights",
    "fit_sample_weights",
    "fit_temperature",
    "gated_distillation",
    "kl_distillation",
    "kl_energy",
    "log_label_prior",
    "logsumexp_energy",
    "look_up_trust",
    "loss_payoffs",
    "margin_confidence",
    "margin_energy",
    "max_softmax_confidence",
    "mixing_weights",
    "paired_p_value",
    "prediction_sets",
    "project_to_simplex",
    "rank_e_process",
    "regularized_scores",
    "sample_weights",
    "score_exit",
    "set_agreement",
    "set_ranking_loss",
    "skill_trust",
    "squared_error_distillation",
    "squared_error_energy",
    "student_budget",
    "submodel_state_dict",
    "trust_weights",
    "unconditional_p_value",
    "upcast_to_float32",
]
