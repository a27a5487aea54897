"""Promises with an error rate: thresholds of early exits, and draws that show whether a promise holds."""

from fedekd.certificates.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.certificates.scored import ScoredExits
from fedekd.certificates.validity import Validity, check_validity, true_risks

__all__ = ["MODES", "ScoredExits", "SelectiveRiskCalibrator", "Validity", "check_validity", "true_risks"]
