"""Held-out results of two models, and the test of each metric.

A metric is a row of `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedekd.functional.metric_tests import (
    Floats,
    auroc_gain,
    balanced_gains,
    delong_p_value,
    macro_auroc_gains,
    pair_outcomes,
    plugin_betting_p_value,
)

if TYPE_CHECKING:
    from fedekd.do_no_harm.rule import DoNoHarm


@dataclass(frozen=True)
class HeldOut:
    """Results of a model on held-out samples.

    Attributes:
        losses: 0 and 1 for correct and wrong classes, or squared errors, shape (n,).
        scores: Scores of class 1 of two classes, shape (n,); of more classes their log odds (n, C) if the
            metric ranks samples; else empty.
    """

    losses: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Labels:
    """Targets of the compared samples.

    Attributes:
        targets: Class of each sample, shape (n,).
        classes: Classes of the client: those of its training and of its compared samples, ascending.
    """

    targets: Tensor
    classes: tuple[int, ...]


class ClassCounts(NamedTuple):
    """Outcomes of the samples of a class: worse, better and all."""

    worse: int
    better: int
    samples: int


@dataclass(frozen=True)
class Evidence:
    """Outcome of the test of one metric.

    Attributes:
        samples: Compared samples; for `auroc` disjoint sets of samples with at least one of each class.
        worse: Those that only the local model classifies correctly, or that it ranks better.
        better: Those that only the federated model classifies correctly, or that it ranks better.
        gain: Metric of the federated model minus that of the local model.
        p_value: P-value of the hypothesis that the federated model is worse by the margin or more.
        parts: Outcomes of the tests of which all must reject; empty without such tests.
        gains: Values of the betting test, shape (k,); empty for another test.
    """

    samples: int
    worse: int
    better: int
    gain: float
    p_value: float
    parts: tuple[ClassCounts, ...] = ()
    gains: tuple[float, ...] = ()


def class_counts(local: HeldOut, federated: HeldOut, labels: Labels) -> list[ClassCounts]:
    """Return the outcomes of each class of the client."""
    difference = local.losses.double() - federated.losses.double()
    rows = []
    for label in labels.classes:
        own = difference[labels.targets == label]
        rows.append(ClassCounts(int((own < 0).sum()), int((own > 0).sum()), len(own)))
    return rows


def _recall(rule: DoNoHarm, local: HeldOut, federated: HeldOut, labels: Labels) -> Evidence:
    r"""Test that no class has a recall that is lower by the margin or more.

    Intersection-union: the p-value is the largest one of the classes. If the claim is false, one class c is worse by
    the margin or more; then $P(\max p \le \alpha) \le P(p_c \le \alpha) \le \alpha$, whatever the other classes are.
    """
    rows = class_counts(local, federated, labels)
    # A class without samples excludes nothing.
    p_values = [rule.p_value(*row) if row.samples else 1.0 for row in rows]
    gains = [(row.better - row.worse) / row.samples for row in rows if row.samples]
    worse, better, samples = (sum(row[index] for row in rows) for index in range(3))
    p_value, gain = max(p_values, default=1.0), min(gains, default=0.0)
    return Evidence(samples, worse, better, gain, p_value, parts=tuple(rows))


def _balanced_accuracy(rule: DoNoHarm, local: HeldOut, federated: HeldOut, labels: Labels) -> Evidence:
    """Test the mean recall by betting on independent estimates, see `balanced_gains`."""
    rows = class_counts(local, federated, labels)
    difference = (local.losses.double() - federated.losses.double()).cpu().numpy()
    gains = balanced_gains(difference, labels.targets.cpu().numpy(), labels.classes).tolist() if rows else []
    p_value = plugin_betting_p_value(gains, rule.margin, rule.level)
    worse, better, samples = (sum(row[index] for row in rows) for index in range(3))
    has_all = len(gains) > 0
    gain = sum((row.better - row.worse) / row.samples for row in rows) / len(rows) if has_all else 0.0
    return Evidence(samples, worse, better, gain, p_value, gains=tuple(gains))


def _auroc(rule: DoNoHarm, local: HeldOut, federated: HeldOut, labels: Labels) -> Evidence:
    """Test disjoint pairs of two classes, or bet on sets of samples of all classes.

    See `pair_outcomes` and `macro_auroc_gains`.
    """
    arrays = _arrays(local, federated, labels)
    if local.scores.ndim == 2:
        gains = macro_auroc_gains(*arrays, labels.classes)
        p_value = plugin_betting_p_value(gains, rule.margin, rule.level)
        gain = auroc_gain(*arrays, labels.classes)
        return Evidence(len(gains), *_signs(gains), gain, p_value, gains=tuple(gains.tolist()))
    worse, better, pairs = pair_outcomes(*arrays)
    p_value = rule.p_value(worse, better, pairs) if pairs else 1.0
    return Evidence(pairs, worse, better, auroc_gain(*arrays), p_value, parts=(ClassCounts(worse, better, pairs),))


def _auroc_delong(rule: DoNoHarm, local: HeldOut, federated: HeldOut, labels: Labels) -> Evidence:
    """Test the AUROC of all samples by the normal approximation of DeLong."""
    arrays = _arrays(local, federated, labels)
    classes = labels.classes if local.scores.ndim == 2 else None
    if classes is None:
        worse, better, _ = pair_outcomes(*arrays)
    else:
        gains = macro_auroc_gains(*arrays, classes)
        worse, better = _signs(gains)
    p_value = delong_p_value(*arrays, rule.margin, classes)
    return Evidence(len(labels.targets), worse, better, auroc_gain(*arrays, classes), p_value)


def _arrays(local: HeldOut, federated: HeldOut, labels: Labels) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    scores = (held_out.scores.double().cpu().numpy() for held_out in (local, federated))
    return *scores, labels.targets.cpu().numpy()  # type: ignore[return-value]


def _signs(gains: Floats) -> tuple[int, int]:
    """Return the numbers of negative and of positive values."""
    return int((gains < 0).sum()), int((gains > 0).sum())


@dataclass(frozen=True)
class HarmMetric:
    """Metric in which do-no-harm compares two models.

    Attributes:
        title: Name in texts.
        test: Computes the evidence; None for accuracy and squared errors, which need no labels.
        is_exact: True if the error rate is at most the level for every number of samples.
        per_class: True if each class needs samples.
        ranks: True if it compares how samples are ranked: it needs two classes or more, and their scores.
    """

    title: str
    test: Callable[[DoNoHarm, HeldOut, HeldOut, Labels], Evidence] | None
    is_exact: bool = True
    per_class: bool = True
    ranks: bool = False


#: Metrics by the name of the option `do_no_harm.metric`.
METRICS = {
    "accuracy": HarmMetric("accuracy", None, per_class=False),
    "balanced_accuracy": HarmMetric("balanced accuracy", _balanced_accuracy),
    "recall": HarmMetric("recall of a class", _recall),
    "auroc": HarmMetric("AUROC", _auroc, ranks=True),
    "auroc_delong": HarmMetric("AUROC", _auroc_delong, is_exact=False, ranks=True),
}


def labels_of(targets: Tensor, training: Tensor) -> Labels:
    """Return the labels of compared samples.

    Args:
        targets: Class of each compared sample, shape (n,).
        training: Classes of the training samples.
    """
    return Labels(targets, tuple(sorted({*training.tolist(), *targets.tolist()})))


@dataclass(frozen=True)
class CandidateResult:
    """Outcome of one candidate of a client.

    Attributes:
        name: Its name in `Method.candidates`.
        tested: False for those after the first one that failed.
        samples: See `Comparison`.
        worse: See `Comparison`.
        better: See `Comparison`.
        gain: See `Comparison`; 0 if not tested.
        p_value: See `Comparison`; NaN if not tested.
    """

    name: str
    tested: bool = False
    samples: int = 0
    worse: int = 0
    better: int = 0
    gain: float = 0.0
    p_value: float = math.nan
