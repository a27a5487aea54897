"""Do-no-harm model selection: adopt the federated model only if an exact test on held-out data allows it."""

from fedekd.do_no_harm.power import acceptance_probability
from fedekd.do_no_harm.rule import Comparison, DoNoHarm

__all__ = ["Comparison", "DoNoHarm", "acceptance_probability"]
