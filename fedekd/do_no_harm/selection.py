"""Choice of the model that a client deploys, among its candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from fedekd.do_no_harm.evidence import CandidateResult, HeldOut, Labels
from fedekd.do_no_harm.power import deciding_gains, deciding_parts
from fedekd.do_no_harm.rule import LOCAL, Comparison, DoNoHarm
from fedekd.tasks import Task

#: Returns the results of a model on the samples of some splits.
Evaluate = Callable[[tuple[str, ...]], HeldOut]


def select_model(
    rule: DoNoHarm,
    local: Evaluate,
    candidates: Mapping[str, Evaluate],
    task: Task,
    splits: tuple[str, ...],
    labels: Labels | None = None,
) -> Comparison:
    """Choose the model that a client deploys.

    Candidates are tested in order, each at the full level, up to the first one that fails. A candidate after it is not
    evaluated. Among those that passed, the one with the largest observed gain is deployed.

    Args:
        rule: The decision rule.
        local: Evaluates the local model.
        candidates: Evaluates each candidate, in the order of the tests, at least one.
        task: `classification` or `regression`.
        splits: Splits on whose samples the models are compared.
        labels: Targets of these samples, for a metric that needs them.

    Returns:
        The decision and its evidence.
    """
    comparisons: dict[str, Comparison] = {}
    for name, candidate in candidates.items():
        comparisons[name] = _compare(rule, local, candidate, task, splits, labels)
        if comparisons[name].is_local and rule.rule == "certified":
            break
    passed = [name for name, comparison in comparisons.items() if not comparison.is_local]
    best = max(passed, key=lambda name: comparisons[name].gain, default=None)
    chosen = comparisons[best if best is not None else next(iter(candidates))]
    if not rule.candidates:
        return chosen
    rows = tuple(_row(name, comparisons.get(name)) for name in candidates)
    return replace(chosen, deployed=LOCAL if best is None else best, candidates=rows)


def _compare(
    rule: DoNoHarm,
    local: Evaluate,
    candidate: Evaluate,
    task: Task,
    splits: tuple[str, ...],
    labels: Labels | None,
) -> Comparison:
    """Compare one candidate with the local model."""
    ours, theirs = local(splits), candidate(splits)
    is_certified = rule.rule == "certified"
    evidence = None if labels is None else rule.evidence(ours, theirs, labels)
    if evidence is not None:
        comparison = rule.decide(evidence)
        if is_certified and comparison.is_local and (evidence.parts or evidence.gains):
            found = deciding_parts(rule, evidence) if evidence.parts else deciding_gains(rule, evidence.gains)
            # Scale from tested values to samples, at the present number of samples per value.
            size = sum(part.samples for part in evidence.parts) or len(evidence.gains)
            return replace(comparison, deciding=round((found or 0) * len(ours.losses) / max(size, 1)))
        return comparison
    tuning = (local(("tuning",)).losses, candidate(("tuning",)).losses) if task == "regression" else None
    comparison = rule.compare(ours.losses, theirs.losses, task, tuning)
    if task == "regression" and is_certified and comparison.samples:
        gains = rule.clipped_gains(ours.losses, theirs.losses)
        found = deciding_gains(rule, gains) if comparison.is_local else comparison.samples
        return replace(comparison, deciding=found or 0)
    return comparison


def _row(name: str, comparison: Comparison | None) -> CandidateResult:
    if comparison is None:
        return CandidateResult(name)
    values = asdict(comparison)
    fields = ("samples", "worse", "better", "gain", "p_value")
    return CandidateResult(name, True, **{field: values[field] for field in fields})
