"""Paired tests of two classifiers in balanced accuracy and AUROC.

The labels are given: the samples of a class are independent draws of that class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import rankdata

from fedekd.functional.paired_tests import betting_payoffs

Floats = npt.NDArray[np.float64]

#: Largest stake, as a share of the largest possible loss.
LARGEST_STAKE = 0.9


def balanced_gains(gains: npt.ArrayLike, labels: npt.ArrayLike, classes: npt.ArrayLike) -> Floats:
    r"""Compute independent unbiased estimates of the gain in balanced accuracy.

    With $k = \min_c n_c$, the $n_c$ samples of class c are divided, in order, into k blocks of nearly equal size. Entry
    i is $\frac1C \sum_c \bar g_{ci}$, where $\bar g_{ci}$ is the mean gain of block i of class c. The entries are
    independent, are in [-1, 1] and have the mean $\frac1C \sum_c E[g \mid c]$: all samples are used, although classes
    have different sizes.

    Args:
        gains: Correct predictions of the new model minus those of the old one per sample, shape (n,), in [-1, 1].
        labels: Classes of the samples, shape (n,).
        classes: Classes of the mean, shape (C,), at least one.

    Returns:
        Estimates, shape (k,); empty if a class has no samples.

    Example:
        >>> balanced_gains([1, 0, 0, -1, 1], [0, 0, 1, 1, 1], [0, 1]).tolist()
        [0.25, 0.5]
    """
    values, targets = np.asarray(gains, dtype=np.float64), np.asarray(labels)
    of_class = [values[targets == label] for label in np.asarray(classes).tolist()]
    size = min(map(len, of_class))
    if size == 0:
        return np.empty(0)
    means = [[float(block.mean()) for block in np.array_split(own, size)] for own in of_class]
    return np.asarray(np.mean(means, axis=0), dtype=np.float64)


def plugin_betting_p_value(gains: npt.ArrayLike, margin: float, level: float) -> float:
    r"""Compute the p-value for "the mean gain is at most minus the margin" by betting.

    The wealth is $W = \prod_i \big(1 + \lambda_i \frac{g_i + m}{1 - m}\big)$ with the stakes
    $\lambda_i = \min\big(0.9, \sqrt{2 \ln(1 / \alpha) / (n \hat\sigma^2_{i - 1})}\big)$ of the predictable plug-in:
    $\hat\sigma^2_{i - 1}$ is the variance of the entries before i, with one pseudo-observation of 1/4. Under the
    hypothesis W is a supermartingale that starts at 1, so $P(1 / W \le p) \le p$ for every n (Markov). Unlike a stake
    that is chosen on another split, these stakes need no samples besides the compared ones.

    Args:
        gains: Independent gains with one mean, in [-1, 1], in an order that does not depend on them, shape (n,).
        margin: m, in [0, 1).
        level: alpha, in (0, 1), at which the stakes are most powerful; the p-value is valid at every level.

    Returns:
        A p-value in (0, 1]; 1 without gains.

    Raises:
        ValueError: If a gain, the margin or the level is out of range.

    Example:
        >>> plugin_betting_p_value([], 0.0, 0.1), round(plugin_betting_p_value([0.1] * 200, 0.0, 0.1), 4)
        (1.0, 0.0)

    Reference:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024, equations 23 to
        26.
    """
    payoffs = betting_payoffs(gains, margin)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    if not len(payoffs):
        return 1.0
    before = np.arange(len(payoffs))
    means = np.concatenate([[0.0], np.cumsum(payoffs)[:-1]]) / np.maximum(before, 1)
    squares = np.concatenate([[0.0], np.cumsum(payoffs**2)[:-1]])
    variances = (0.25 + np.maximum(squares - before * means**2, 0.0)) / (before + 1)
    stakes = np.minimum(LARGEST_STAKE, np.sqrt(2.0 * math.log(1.0 / level) / (len(payoffs) * variances)))
    return math.exp(min(0.0, -float(np.log1p(stakes * payoffs).sum())))


def pair_outcomes(old: npt.ArrayLike, new: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[int, int, int]:
    r"""Compare two rankings on disjoint pairs of a positive and a negative sample.

    Pair i has the i-th positive and the i-th negative sample. A model is right about a pair if the positive sample has
    the larger score, and half right if the scores are equal, so that the mean is the AUROC. The difference of the two
    models is rounded down to -1, 0 or 1: its mean is at most the gain in AUROC, so that a test of worse and better
    pairs remains valid. The pairs are independent.

    Args:
        old: Scores of the old model, shape (n,).
        new: Scores of the new model, shape (n,).
        labels: 1 for positive samples, else 0, shape (n,).

    Returns:
        Numbers of worse pairs, better pairs and all pairs.

    Example:
        >>> pair_outcomes([0.9, 0.2, 0.5, 0.5], [0.9, 0.8, 0.1, 0.5], [1, 1, 0, 0])
        (0, 1, 2)
    """
    targets = np.asarray(labels)
    size = min(int((targets == 1).sum()), int((targets == 0).sum()))
    right = []
    for scores in (np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)):
        positive, negative = scores[targets == 1][:size], scores[targets == 0][:size]
        right.append((positive > negative) + 0.5 * (positive == negative))
    difference = np.floor(right[1] - right[0])
    return int((difference < 0).sum()), int((difference > 0).sum()), size


def macro_auroc_gains(old: npt.ArrayLike, new: npt.ArrayLike, labels: npt.ArrayLike, classes: npt.ArrayLike) -> Floats:
    r"""Compute independent unbiased estimates of the gain in a multiclass AUROC.

    The AUROC is the mean over the classes of one class against the rest: $\frac1C \sum_c \sum_{y \ne c}
    \frac{n_y}{n - n_c} \theta_{cy}$, where $\theta_{cy}$ is the probability that a sample of class c has a larger score
    of c than one of class y; ties count half. As in `balanced_gains`, the samples of each class are divided into
    $k = \min_c n_c$ blocks, and entry i is the difference of the two models on the samples of block i. The entries are
    independent, are in [-1, 1] and have the true gain as their mean.

    Args:
        old: Scores of the old model by class, shape (n, number of columns).
        new: Scores of the new model, of the same shape.
        labels: Classes of the samples, shape (n,).
        classes: Classes of the mean, columns of the scores, shape (C,).

    Returns:
        Estimates, shape (k,); empty with fewer than two classes, or if one has no samples.

    Example:
        >>> scores = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]
        >>> macro_auroc_gains(scores, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 2], [0, 1, 2]).tolist()
        [0.0]
        >>> macro_auroc_gains([[1, 0], [0, 1]], [[0, 1], [1, 0]], [0, 1], [0, 1]).tolist()
        [-1.0]
    """
    targets, names = np.asarray(labels), np.asarray(classes)
    members = [np.flatnonzero(targets == label) for label in names.tolist()]
    counts = np.array([len(samples) for samples in members], dtype=np.float64)
    if len(names) < 2 or not counts.all():
        return np.empty(0)
    shares = counts * (1 - np.eye(len(names))) / (counts.sum() - counts)[:, None] / len(names)
    before, after = (np.asarray(scores, dtype=np.float64)[:, names] for scores in (old, new))
    blocks = zip(*(np.array_split(samples, int(counts.min())) for samples in members), strict=True)
    entries = [((_wins(after, block) - _wins(before, block)) * shares).sum() for block in blocks]
    # The shares may add up to more than 1 by a rounding error.
    return np.clip(np.array(entries, dtype=np.float64), -1.0, 1.0)


def _wins(scores: Floats, block: Sequence[npt.NDArray[np.intp]]) -> Floats:
    """Return the estimates of theta, (C, C), from the samples of a block by class."""
    samples = np.concatenate(block)
    sizes = np.array([len(part) for part in block])
    starts, rows = np.cumsum(sizes) - sizes, []
    for column, part in enumerate(block):
        values, others = np.sort(scores[part, column]), scores[samples, column]
        # Of the class's samples, those above each sample, and half of those equal to it.
        not_above = values.searchsorted(others, "left") + values.searchsorted(others, "right")
        rows.append(np.add.reduceat(1.0 - not_above / (2 * len(part)), starts) / sizes)
    return np.array(rows)


def auroc_gain(
    old: npt.ArrayLike, new: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[int] | None = None
) -> float:
    """Compute the gain in AUROC; 0 without samples of each class.

    Args:
        old: Scores of class 1, shape (n,), or with `classes` of each class, shape (n, number of columns).
        new: Scores of the new model, of the same shape.
        labels: Classes of the samples, shape (n,).
        classes: Classes of the mean, columns of the scores; None for two classes.
    """
    first, second = (_projections(scores, labels, classes) for scores in (old, new))
    return 0.0 if first is None or second is None else second[0] - first[0]


def delong_p_value(
    old: npt.ArrayLike,
    new: npt.ArrayLike,
    labels: npt.ArrayLike,
    margin: float,
    classes: Sequence[int] | None = None,
) -> float:
    r"""Compute DeLong's p-value for "the AUROC is lower by the margin or more".

    $z = (\hat A_{new} - \hat A_{old} + m) / s$, $p = 1 - \Phi(z)$. With the differences of the placement values,
    $s^2 = \mathrm{var}(D^+) / n^+ + \mathrm{var}(D^-) / n^-$. For several classes the AUROC is that of
    `macro_auroc_gains`, and $s^2 = \sum_y \mathrm{var}(D_y) / n_y$ with the projections
    $D_y = \frac1C \big(V_y + \sum_{c \ne y} \frac{n_y}{n - n_c} W_c\big)$ of a sample of class y: $V_y$ is the share of
    the other classes below it in the score of y, and $W_c$ the share of class c above it in the score of c. It is
    asymptotic: for small samples, or an AUROC near 1, its error rate may exceed the level.

    Args:
        old: Scores, see `auroc_gain`.
        new: Scores of the new model, of the same shape.
        labels: Classes of the samples, shape (n,); 1 for positive ones of two classes.
        margin: m, in [0, 1).
        classes: See `auroc_gain`.

    Returns:
        A p-value in [0, 1]; 1 with fewer than 2 samples of a class, or without variance.

    Reference:
        DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
        characteristic curves, Biometrics 44 (1988); for several classes by the projection of a U-statistic (Hoeffding).
    """
    first, second, targets = _projections(old, labels, classes), _projections(new, labels, classes), np.asarray(labels)
    if first is None or second is None:
        return 1.0
    of_class = [(second[1] - first[1])[targets == label] for label in np.unique(targets)]
    if min(map(len, of_class)) < 2:
        return 1.0
    variance = sum(float(values.var(ddof=1)) / len(values) for values in of_class)
    if variance <= 0:
        return 1.0
    return float(ndtr(-(second[0] - first[0] + margin) / math.sqrt(variance)))


def _projections(
    scores: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[int] | None
) -> tuple[float, Floats] | None:
    """Return the AUROC and the projections of the samples, (n,); None if undefined."""
    values, targets = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    columns = [(values, targets == 1)] if classes is None else [(values[:, c], targets == c) for c in classes]
    if (classes is not None and len(columns) < 2) or any(len(np.unique(rows)) < 2 for _, rows in columns):
        return None
    counts = np.bincount(targets)[targets]  # of the class of each sample
    area, projections = 0.0, np.zeros(len(targets))
    for column, is_positive in columns:
        above, below = _placements(column, is_positive)
        area += float(above.mean()) / len(columns)
        projections[is_positive] += above / len(columns)
        projections[~is_positive] += below * counts[~is_positive] / len(below) / len(columns)
    return area, projections


def _placements(values: Floats, is_positive: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the share of the other class against which each sample ranks correctly.

    For a positive sample, the negative samples below it count; for a negative sample, the positive samples above it.
    Ties count half.
    """
    positive, negative = values[is_positive], values[~is_positive]
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[: len(positive)] - rankdata(positive)) / len(negative)
    below = 1.0 - (ranks[len(positive) :] - rankdata(negative)) / len(positive)
    return above, below
