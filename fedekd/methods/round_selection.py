"""Selection of the round whose model a client deploys."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from fedekd.methods.base import Method
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec

#: Split on which rounds are compared.
SELECTION_SPLIT = "tuning"


def used_splits(method: Method, spec: FederationSpec) -> tuple[str, ...]:
    """Return the splits that training and the selection of the round use.

    A file of weights, or of a teacher, may come from an earlier run on the same data that has used the tuning split.
    """
    splits = method.training_splits
    has_file = spec.client.private_weights is not None or getattr(method, "teacher", None) is not None
    uses_tuning = spec.select_round == "best" or has_file
    return (*splits, SELECTION_SPLIT) if uses_tuning and SELECTION_SPLIT not in splits else splits


def select_round(client: Client, round_idx: int, logs: Mapping[str, float], deploy: bool) -> dict[str, float]:
    """Keep what a client serves if it is the best so far.

    Rounds are compared by the primary metric of the run on the tuning split. Of rounds with equal scores the latest is
    kept, and also if no round has a score: a round with non-finite outputs has none.

    Args:
        client: Client after `Method.receive`.
        round_idx: Round, at least 1.
        logs: Scalars of that round; those of the served members (`serving/`) are kept with it.
        deploy: True after the last round: the client then serves the best one. Optimizer states and networks that are
            not served stay those of the last round.

    Returns:
        Scalars to log: `selected/round` and `selected/score` of the best round, and, if it is deployed, its `serving/`.
    """
    score, best = client.evaluate(SELECTION_SPLIT)[0][-1], client.selected
    if best is None or _is_as_good(client, score, best["score"]):
        best = client.selected = {
            "round": round_idx,
            "score": score,
            "served": copy.deepcopy(client.served_state()),
            "logs": {name: value for name, value in logs.items() if name.startswith("serving/")},
        }
    chosen = {"selected/round": float(best["round"]), "selected/score": best["score"]}
    if not deploy:
        return chosen
    client.load_served_state(best["served"])
    client.selected = None
    chosen.update(best["logs"])
    return chosen


def _is_as_good(client: Client, score: float, best: float) -> bool:
    """Return True if a score is at least as good as the best one, or none was."""
    return math.isnan(best) or client.spec.primary.worst([score, best]) == best
