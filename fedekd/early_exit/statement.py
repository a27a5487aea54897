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


_OTHERS = {TRUE_CLASS: "true classes", PREDICTED_CLASS: "predicted classes"}


def exit_guarantee(policy: ExitPolicy, is_grouped: bool = False) -> str:
    """Return population, target, confidence, n, assumptions and limits in words.

    Args:
        policy: Any exit policy.
        is_grouped: Whether the data have groups, such as patients, whose samples depend on each other. A policy without
            a unit counted all of them.

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
    rate = (
        f"the error rate among the samples{_population(policy)} that take {_places(policy)} is at most"
        f" {policy.target_risk:g}"
    )
    target = f"{rate}, in all groups at once" if len(_covered(policy)) > 1 else rate
    future = f"a random sample of a random {policy.unit}" if policy.unit else "future samples"
    assumed = "these samples are independent draws that were not used in training"
    if is_grouped and not policy.unit:
        assumed = (
            "these samples were not used in training. Not valid: samples of one group, such as a patient, were counted"
            " as independent; calibrate again. Also assumed: samples of different groups are independent"
        )
    others = f" for samples of other {_OTHERS.get(policy.group_by, 'groups')}," if policy.groups else ""
    return (
        f"With probability at least {policy.confidence:.12g} over the draw of {policy.samples} calibration"
        f" samples{unit}{clients}: {target}. Population: {future} from the distribution of the calibration"
        f" samples. Assumed: {assumed}, and the order of the"
        f" tests was fixed on {policy.tuning_samples} other samples. Void:{others} for other devices, sites or class"
        " mixes, after a change of the network or of a threshold, or if the best of several calibrations was chosen."
    )


def _covered(policy: ExitPolicy) -> dict[str, tuple[int, ...]]:
    """Return the covered exits, from 1, of each group that has one."""
    flags = {group.name: group.certified for group in policy.groups} or {"": policy.certified}
    exits = {name: tuple(number for number, flag in enumerate(row, start=1) if flag) for name, row in flags.items()}
    return {name: numbers for name, numbers in exits.items() if numbers}


def _places(policy: ExitPolicy) -> str:
    """Return the covered exits in words, with their groups where these differ."""
    covered = _covered(policy)
    exits = sorted({number for numbers in covered.values() for number in numbers})
    texts = [str(number) for number in exits]
    if len(set(covered.values())) > 1:
        texts = [f"{number} ({', '.join(name for name in covered if number in covered[name])})" for number in exits]
    return f"exit {texts[0]}" if len(texts) == 1 else f"each of the exits {' and '.join(texts)}"


def _population(policy: ExitPolicy) -> str:
    """Return the groups of a policy in words, with a leading space; empty without."""
    covered = _covered(policy)
    if not policy.groups:
        return ""
    names = ", ".join(covered)  # all of them, however many
    if policy.group_by in _POPULATIONS:
        return f" {_POPULATIONS[policy.group_by].format(names=names)},"
    return f" with {policy.group_by} {names}" if len(covered) == 1 else f" of each group, {policy.group_by} {names},"


def closed_exits(policy: ExitPolicy) -> str:
    """Return which exits are closed and which options open them; empty if none is.

    Args:
        policy: Any exit policy.
    """
    places = []
    for exit_, is_open in enumerate(policy.open_exits):
        closed = [group.name for group in policy.groups if group.thresholds[exit_] == math.inf]
        if policy.closed and policy.closed[exit_]:
            continue  # by an alarm, after which no option is to open it
        if not is_open:
            places.append(f"exit {exit_ + 1}")
        elif closed and not policy.shared_thresholds:
            places.append(f"exit {exit_ + 1} for {policy.group_by} {listed(closed)}")
    reasons = [f"exit {exit_} ({reason})" for exit_, reason in enumerate(policy.closed, start=1) if reason]
    parts = [f"closed: {'; '.join(places)}. To open: {OPENING}"] if places else []
    parts += [f"closed after the calibration: {'; '.join(reasons)}"] if reasons else []
    return ". ".join(parts)


def why_closed(policy: ExitPolicy, index: int, group: str = "") -> str:
    """Return why an exit is closed, and the number of samples that it needs at least.

    Args:
        policy: A policy without groups, or one of `group_policies`.
        index: Number of the closed exit, from 0.
        group: Name of the group. Default: none.
    """
    if policy.closed and policy.closed[index]:
        return f"closed: {policy.closed[index]}"
    estimate, unit = policy.required_samples[index], f"samples (one per {policy.unit})" if policy.unit else "samples"
    of_group = f" of group {group}" if group else ""
    samples = policy.tested_samples[index] if policy.tested_samples else policy.samples
    is_tested = policy.search_bounds[index] < math.inf
    if estimate is not None and not is_tested and estimate > samples:
        return f"closed: at least about {estimate} calibration {unit}{of_group} are needed, there are {samples}"
    if policy.mode == "ltt_joint":
        if any(policy.certified):
            return "closed: closed in the cheapest certified threshold vector"
        is_tested = is_tested or estimate is not None
    if is_tested:
        return "closed: the first test failed on the calibration samples"
    if estimate is not None:  # the group is a larger share of the calibration samples than of the tuning samples
        return f"closed: no threshold was expected to pass, by the tuning samples{of_group}"
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
