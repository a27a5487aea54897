"""Promises with an error rate: exits that are rarely wrong, models that do no harm; and draws that test them."""

from fedekd.certificates.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.certificates.do_no_harm import Comparison, DoNoHarm
from fedekd.certificates.federated import FederatedValidity, check_federated_validity
from fedekd.certificates.power import acceptance
from fedekd.certificates.scored import ScoredExits
from fedekd.certificates.validity import Validity, check_validity, true_risks

__all__ = [
    "MODES",
    "Comparison",
    "DoNoHarm",
    "FederatedValidity",
    "ScoredExits",
    "SelectiveRiskCalibrator",
    "Validity",
    "acceptance",
    "check_federated_validity",
    "check_validity",
    "true_risks",
]
