"""The guarantee of do no harm in words; cards and reports print it."""

from __future__ import annotations

from fedekd.do_no_harm.evidence import METRICS
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.tasks import Task


def do_no_harm_guarantee(rule: DoNoHarm, task: Task, samples: int | None = None, is_grouped: bool = False) -> str:
    """Return population, target, confidence, n, assumptions and limits in words.

    Args:
        rule: The rule of a run.
        task: `classification` or `regression`.
        samples: Number of compared samples of the client; for `auroc` of sets of samples. Default: not stated.
        is_grouped: Whether samples have groups such as patients.

    Example:
        >>> do_no_harm_guarantee(DoNoHarm(rule="better"), "classification")
        'No guarantee of do no harm: the federated model is deployed if its accuracy is better on the tuning split.'
    """
    metric = METRICS[rule.metric]
    if rule.rule != "certified":
        compared = metric.title if task == "classification" else "mean squared error"
        decision = f"the federated model is deployed if its {compared} is better on the tuning split"
        return f"No guarantee of do no harm: {decision}."
    clipped = f"mean squared error, each difference of squared errors clipped to ±{rule.clip:g}, is larger"
    loss = f"{metric.title} is lower" if task == "classification" else clipped
    amount = f" by {rule.margin:g} or more" if rule.margin else ""
    is_of_sets = metric.ranks and metric.is_exact
    unit = "disjoint sets of samples with at least one of each class" if is_of_sets else "samples"
    future, draws = "future samples", "these samples are independent draws that were"
    if is_grouped and rule.unit == "group":
        unit += ", at most one of each group such as a patient"
        future = "a random sample of a random group"
        draws = "these groups are independent draws, their size has no relation to their errors, and they were"
    compared = f"the {samples} compared {unit}" if samples is not None else f"its compared {unit}"
    models = f"none of the models {', '.join(rule.candidates)}" if rule.candidates else "no federated model"
    limit = "" if metric.is_exact else " The probability is that of many samples (asymptotic)."
    if metric.ranks:
        limit += (
            " AUROC is the mean over the client's classes of one against the rest, at their shares of these samples."
        )
    counts_samples = is_grouped and rule.unit == "sample"
    grouped = " Samples of one group, such as a patient, are counted as independent: this must be so." * counts_samples
    return (
        f"Do no harm, with probability at least {rule.confidence:.12g} over {compared}: a client deploys {models} whose"
        f" {loss}{amount} than that of its local model.{limit} Population: {future} from the distribution of"
        f" the compared samples, all at the last exit. Assumed: {draws} not used in training.{grouped} Void: for other"
        " devices, sites or class mixes, for other metrics, or after a change of a model."
    )
