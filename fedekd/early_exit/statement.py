"""The guarantee of an exit policy in words; cards, reports and commands print it."""

from __future__ import annotations

import math

from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.early_exit.grouping import PREDICTED_CLASS, TRUE_CLASS
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import listed

#: Options that can open a closed exit.
OPENING = "raise --target_risk, lower --confidence, or calibrate on more samples (--input, or --data.fractions of fit)"

_POPULATIONS = {
    TRUE_CLASS: "of each true class ({names}), with thresholds shared by all classes because the true class is unknown"
    " at deployment",
    PREDICTED_CLASS: "that the exit predicts as a class, for each class ({names})",
}


def exit_guarantee(policy: ExitPolicy) -> str:
    """Return population, target, confidence, n, assumptions and limits in words.

    Args:
        policy: Any exit policy.

    Example:
        >>> policy = ExitPolicy((0.9, -math.inf), (0.9, -math.inf), (True, False), 0.05, 0.9, "ltt", samples=400)
        >>> exit_guarantee(policy).partition(":")[0]
        'With probability at least 0.9 over the draw of 400 calibration samples'
    """
    if not policy.is_certified:
        if policy.has_no_guarantee:
            guaranteed = " and ".join(name for name, mode in MODES.items() if mode.has_guarantee)
            return f"No guarantee: mode {policy.mode} has none; {guaranteed} have one."
        return "No sample exits early, and no guarantee is needed: all exits before the last are closed."
    unit = f", one per {policy.unit}" if policy.unit else ""
    clients = f" of each of {policy.simultaneous_clients} clients at once" if policy.simultaneous_clients > 1 else ""
    exits = [str(number + 1) for number, is_certified in enumerate(_certified(policy)) if is_certified]
    place = f"exit {exits[0]}" if len(exits) == 1 else f"each of the exits {' and '.join(exits)}"
    rate = f"the error rate among the samples{_population(policy)} that take {place} is at most {policy.target_risk:g}"
    target = f"{rate}, in all groups at once" if len(policy.groups) > 1 else rate
    future = f"a random sample of a random {policy.unit}" if policy.unit else "future samples"
    return (
        f"With probability at least {policy.confidence:.12g} over the draw of {policy.samples} calibration"
        f" samples{unit}{clients}: {target}. Population: {future} from the distribution of the calibration"
        " samples. Assumed: these samples are independent draws that were not used in training, and the order of the"
        f" tests was fixed on {policy.tuning_samples} other samples. Void: for other devices, sites or class mixes,"
        " after a change of the network or of a threshold, or if the best of several calibrations was chosen."
    )


def _certified(policy: ExitPolicy) -> list[bool]:
    """Return which exits are covered, for some group."""
    rows = [policy.certified, *(group.certified for group in policy.groups)]
    return [any(column) for column in zip(*rows, strict=True)]


def _population(policy: ExitPolicy) -> str:
    """Return the groups of a policy in words, with a leading space; empty without."""
    covered = [group.name for group in policy.groups if any(group.certified)]
    if not covered:
        return ""
    names = ", ".join(covered)  # all of them, however many
    if policy.group_by in _POPULATIONS:
        return f" {_POPULATIONS[policy.group_by].format(names=names)},"
    each = "with" if len(covered) == 1 else "of each group,"
    return f" {each} {policy.group_by} {names},"


def closed_exits(policy: ExitPolicy) -> str:
    """Return which exits are closed and which options open them; empty if none is.

    Args:
        policy: Any exit policy.
    """
    places = []
    for exit_, is_open in enumerate(policy.open_exits):
        closed = [group.name for group in policy.groups if group.thresholds[exit_] == math.inf]
        if not is_open:
            places.append(f"exit {exit_ + 1}")
        elif closed and not policy.shared_thresholds:
            places.append(f"exit {exit_ + 1} for {policy.group_by} {listed(closed)}")
    return f"closed: {'; '.join(places)}. To open: {OPENING}" if places else ""


def why_closed(policy: ExitPolicy, index: int, group: str = "") -> str:
    """Return why an exit is closed, and the number of samples that would open it.

    Args:
        policy: A policy without groups, or one of `group_policies`.
        index: Number of the closed exit, from 0.
        group: Name of the group. Default: none.
    """
    if policy.closed and policy.closed[index]:
        return f"closed: {policy.closed[index]}"
    estimate, unit = policy.required_samples[index], f"samples (one per {policy.unit})" if policy.unit else "samples"
    of_group = f" of group {group}" if group else ""
    if estimate is not None and estimate > policy.samples:
        return f"closed: about {estimate} calibration {unit}{of_group} would open it, there are {policy.samples}"
    if policy.mode == "ltt_joint" and any(policy.certified):
        return "closed: closed in the cheapest certified threshold vector"
    if policy.search_bounds[index] < math.inf or estimate is not None:
        return "closed: the first test failed on the calibration samples"
    if MODES[policy.mode].has_guarantee:
        return (
            f"closed: no threshold reaches error rate {policy.target_risk:g} on the tuning samples, or no sample"
            " reaches this exit"
        )
    return "closed: no threshold fulfils the rule"


def percent(share: float) -> str:
    """Return a share in percent, without the sign of a rounded zero."""
    text = f"{share:.1%}"
    return "0.0%" if text == "-0.0%" else text
