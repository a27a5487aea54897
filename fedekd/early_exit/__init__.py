"""Early-exit inference, calibration with guarantees, cost curves and reports."""

from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.calibration.exit_scores import ExitScores
from fedekd.early_exit.calibration.federated_validity import FederatedValidity, check_federated_validity
from fedekd.early_exit.calibration.validity import Validity, check_validity, true_risks
from fedekd.early_exit.cost_curves import BUDGETS, Point, budget_points, cost_of, exit_points
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.inference import EarlyExitOutput, early_exit_forward, exit_index
from fedekd.early_exit.latency import Latency, forward_milliseconds, measure_latency
from fedekd.early_exit.policy import ExitPolicy

__all__ = [
    "BUDGETS",
    "MODES",
    "EarlyExitOutput",
    "ExitPolicy",
    "ExitScores",
    "FederatedValidity",
    "Latency",
    "Point",
    "SelectiveRiskCalibrator",
    "Validity",
    "budget_points",
    "check_federated_validity",
    "check_validity",
    "cost_of",
    "early_exit_forward",
    "exit_index",
    "exit_points",
    "forward_milliseconds",
    "measure_latency",
    "network_fingerprint",
    "true_risks",
]
