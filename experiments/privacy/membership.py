"""Membership inference: was a sample in the training data of a model?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import bootstrap, norm, rankdata

Floats = npt.NDArray[np.float64]
Variance = Literal["per_sample", "global"]

#: Smallest standard deviation of a Gaussian of `lira_scores`, for samples with equal confidences in all models.
_MIN_STD = 1e-9


def logit_confidence(logits: npt.ArrayLike, targets: npt.ArrayLike) -> Floats:
    r"""Compute the logit-scaled confidence in the correct class.

    $$\phi = \log \frac{p_y}{1 - p_y} = z_y - \log \sum_{c \ne y} e^{z_c}$$

    Its distribution over models is close to a Gaussian; that of the loss is not.

    Args:
        logits: Finite outputs z of a classifier, shape (..., N, C), at least 2 classes.
        targets: Correct classes y in [0, C), integers, shape (N,).

    Returns:
        Confidences, shape (..., N); larger where the model fits the sample better.

    Example:
        >>> logit_confidence([[0.0, 0.0]], [1]).tolist()
        [0.0]

    Reference:
        Carlini et al., Membership inference attacks from first principles, IEEE S&P 2022 (arXiv 2112.03570), Sec. IV-B.
    """
    values, labels = np.asarray(logits, dtype=np.float64), np.asarray(targets, dtype=np.int64)
    is_target = np.arange(values.shape[-1]) == labels[:, None]
    correct = np.take_along_axis(values, np.broadcast_to(labels[:, None], (*values.shape[:-1], 1)), -1)[..., 0]
    return np.asarray(correct - logsumexp(np.where(is_target, -np.inf, values), axis=-1))


def lira_scores(
    observed: npt.ArrayLike,
    shadow: npt.ArrayLike,
    is_member: npt.ArrayLike,
    *,
    online: bool = True,
    variance: Variance = "per_sample",
) -> Floats:
    r"""Compute the scores of the likelihood ratio attack (LiRA).

    Per sample, a Gaussian is fitted to the confidences of the shadow models that were trained with it (in) and of those
    that were not (out). Online:

    $$\Lambda = \log N(\phi; \mu_{in}, \sigma_{in}^2) - \log N(\phi; \mu_{out}, \sigma_{out}^2).$$

    Offline, without shadow models that were trained with the sample:
    $\Lambda = (\phi - \mu_{out}) / \sigma_{out}$; $\Phi(\Lambda)$ is the probability of the paper.

    Args:
        observed: Confidences of the attacked model, as `logit_confidence`, shape (N,).
        shadow: Those of the shadow models, shape (S, N).
        is_member: True where a shadow model was trained with the sample, shape (S, N). Each sample needs at least one
            model on each side (offline: one without it), or two with variance `per_sample`.
        online: Use both sides; False uses the models without the sample only. Default True.
        variance: `per_sample` (default), or `global`: one per side, the mean over samples, which the paper advises for
            few shadow models (fewer than 64).

    Returns:
        Scores, larger for members, shape (N,).

    Raises:
        ValueError: If shapes differ, or a sample has too few shadow models.

    Example:
        >>> shadow, members = [[2.0], [4.0], [-1.0], [1.0]], [[True], [True], [False], [False]]
        >>> lira_scores([3.0], shadow, members).round(3).tolist()
        [4.5]
        >>> lira_scores([1.0], shadow, members, online=False).tolist()
        [1.0]

    Reference:
        Carlini et al., arXiv 2112.03570, Algorithm 1 (online) and Eq. 4 (offline).
    """
    phi, confidences = np.asarray(observed, dtype=np.float64), np.asarray(shadow, dtype=np.float64)
    inside = np.asarray(is_member, dtype=bool)
    if variance not in get_args(Variance):
        raise ValueError(f"variance: expected one of {get_args(Variance)}, got {variance!r}")
    if phi.ndim != 1 or confidences.shape != inside.shape or confidences.shape[1:] != phi.shape:
        raise ValueError(
            f"shadow, is_member: expected shape (S, {len(phi)}), got {confidences.shape} and {inside.shape}"
        )
    mean, deviation = _gaussian(confidences, ~inside, variance, "out")
    if not online:
        return (phi - mean) / deviation
    mean_in, deviation_in = _gaussian(confidences, inside, variance, "in")
    return np.asarray(norm.logpdf(phi, mean_in, deviation_in) - norm.logpdf(phi, mean, deviation))


def _gaussian(confidences: Floats, used: npt.NDArray[np.bool_], variance: str, side: str) -> tuple[Floats, Floats]:
    """Return mean and standard deviation per sample over the models of one side."""
    counts, smallest = used.sum(axis=0), 2 if variance == "per_sample" else 1
    if (counts < smallest).any():
        raise ValueError(f"is_member: expected at least {smallest} models with each sample {side}, got {counts.min()}")
    if counts.max() < 2:
        raise ValueError(f"is_member: expected a sample with at least 2 models {side}, for the variance")
    mean = np.where(used, confidences, 0.0).sum(axis=0) / counts
    squares = np.where(used, (confidences - mean) ** 2, 0.0).sum(axis=0)
    # The maximum-likelihood variance of each sample, as in the authors' code; a pooled one is corrected for the means.
    squared = squares / counts if variance == "per_sample" else squares.sum() / (counts - 1).sum()
    return mean, np.maximum(np.sqrt(np.broadcast_to(squared, mean.shape)), _MIN_STD)


def roc_auc(members: npt.ArrayLike, others: npt.ArrayLike) -> float:
    """Compute the area under the ROC curve of an attack.

    It is the probability that a member has a larger score than another sample; equal scores count half.

    Args:
        members: Scores of training samples, shape (M,), M at least 1, without NaN.
        others: Scores of other samples, shape (N,), N at least 1, without NaN.

    Returns:
        Area in [0, 1]; 0.5 without any leak.

    Example:
        >>> roc_auc([3.0, 4.0], [1.0, 3.0])
        0.875
    """
    first, second = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    rank_sum = rankdata(np.concatenate([first, second]))[: len(first)].sum()
    return float((rank_sum - len(first) * (len(first) + 1) / 2) / (len(first) * len(second)))


def threshold_advantage(members: npt.ArrayLike, others: npt.ArrayLike, threshold: float = 0.0) -> float:
    """Compute the membership advantage at a threshold: TPR minus FPR.

    The threshold must not be chosen on these scores: the largest advantage over all thresholds is above 0 even for
    random scores. The loss-threshold attack scores a sample by its negative loss, and its threshold is the negative
    mean training loss, which the attacker is assumed to know; LiRA takes 0.

    Args:
        members: Scores of training samples, shape (M,).
        others: Scores of other samples, shape (N,).
        threshold: Scores at least this large are counted as members. Default 0.

    Returns:
        Advantage in [-1, 1].

    Example:
        >>> threshold_advantage([3.0, 4.0], [1.0, 3.0], threshold=3.0)
        0.5

    Reference:
        Yeom et al., Privacy risk in machine learning, CSF 2018 (arXiv 1709.01604), Definition 4 and Adversary 1.
    """
    return float((np.asarray(members) >= threshold).mean() - (np.asarray(others) >= threshold).mean())


def true_positive_rate(members: npt.ArrayLike, others: npt.ArrayLike, false_positive_rate: float) -> float:
    """Compute the largest true positive rate at a limit of the false positive rate.

    Args:
        members: Scores of training samples, shape (M,).
        others: Scores of other samples, shape (N,).
        false_positive_rate: Limit, in (0, 1).

    Returns:
        Rate in [0, 1]; NaN with fewer than 1 / limit other samples, which cannot resolve it.

    Example:
        >>> true_positive_rate([3.0, 4.0], [1.0, 3.0], 0.5), true_positive_rate([3.0, 4.0], [1.0, 3.0], 0.1)
        (1.0, nan)

    Reference:
        Carlini et al., arXiv 2112.03570, Sec. III: the figure of merit of an attack is the TPR at low FPR.
    """
    values = np.asarray(others, dtype=np.float64)
    allowed = _allowed(false_positive_rate, len(values))
    if not allowed:
        return math.nan
    position = len(values) - allowed - 1
    threshold = np.partition(values, position)[position] if position >= 0 else -np.inf
    return float((np.asarray(members, dtype=np.float64) > threshold).mean())


def _allowed(false_positive_rate: float, count: int) -> int:
    """Return the number of other samples that may be counted as members."""
    return math.floor(false_positive_rate * count + 1e-9)  # 0.29 * 100 is below 29 in floating point


@dataclass(frozen=True)
class AttackResult:
    """Success of a membership inference attack, each figure with its interval.

    Attributes:
        members: Number of scores of training samples.
        others: Number of other scores.
        auc: Area under the ROC curve; 0.5 without a leak.
        auc_interval: Its interval.
        advantage: TPR minus FPR at the threshold of the attack; 0 without a leak.
        advantage_interval: Its interval.
        tpr: True positive rate by limit of the false positive rate; NaN where the other samples are too few. Without a
            leak it is about the limit.
        tpr_interval: Its interval, by limit.
    """

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]
    advantage: float
    advantage_interval: tuple[float, float]
    tpr: dict[float, float]
    tpr_interval: dict[float, tuple[float, float]]


def evaluate_attack(
    scores: npt.ArrayLike,
    is_member: npt.ArrayLike,
    threshold: float = 0.0,
    *,
    limits: tuple[float, ...] = (0.01, 0.001),
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> AttackResult:
    """Evaluate the scores of an attack.

    The intervals are percentile bootstraps over samples (`scipy.stats.bootstrap`); of several models, all scores of a
    sample are drawn together. They cover the choice of samples for these models, not the training of other models:
    repeat with other seeds for that.

    Args:
        scores: Larger for members, without NaN, shape (N,), or (A, N) for attacks on A models.
        is_member: True where a sample is in the training data of the attacked model, same shape; at least 2 True and
            2 False.
        threshold: Threshold of the advantage, see `threshold_advantage`. Default 0.
        limits: False positive rates of `true_positive_rate`. Default 1% and 0.1%.
        confidence: Coverage of the intervals, in (0, 1). Default 0.95.
        resamples: Bootstrap resamples. Default 500.
        seed: Seed of the resamples. Default 0.

    Returns:
        The figures with their intervals.

    Raises:
        ValueError: If shapes differ, a score is NaN, or there are fewer than 2 scores on a side.

    Example:
        >>> result = evaluate_attack(np.arange(40.0), np.arange(40) >= 20, threshold=20.0)
        >>> result.auc, result.advantage
        (1.0, 1.0)
    """
    values, inside = np.atleast_2d(np.asarray(scores, dtype=np.float64)), np.atleast_2d(np.asarray(is_member, bool))
    if values.shape != inside.shape or values.ndim > 2 or np.isnan(values).any():
        raise ValueError(f"scores: expected shape {inside.shape} (is_member) without NaN, got {values.shape}")
    if min(inside.sum(), (~inside).sum()) < 2:
        raise ValueError(f"is_member: expected at least 2 scores on each side, got {inside.sum()} members")

    others = int((~inside).sum())
    resolved = [limit for limit in limits if _allowed(limit, others)]

    def figures(samples: npt.NDArray[np.int64]) -> Floats:
        drawn, members = values[:, samples], inside[:, samples]
        sides = drawn[members], drawn[~members]
        if not (len(sides[0]) and len(sides[1])):  # of few samples
            return np.full(2 + len(resolved), np.nan)
        # A draw may have fewer samples than the limit needs: then one of them is allowed.
        rates = [true_positive_rate(*sides, max(limit, 1 / len(sides[1]))) for limit in resolved]
        return np.array([roc_auc(*sides), threshold_advantage(*sides, threshold), *rates])

    samples = np.arange(values.shape[1])
    drawn = bootstrap(
        (samples,),
        figures,
        n_resamples=resamples,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    auc, advantage, *rates = figures(samples).tolist()
    auc_interval, advantage_interval, *intervals = zip(drawn.low.tolist(), drawn.high.tolist(), strict=True)
    return AttackResult(
        members=int(inside.sum()),
        others=others,
        auc=auc,
        auc_interval=auc_interval,
        advantage=advantage,
        advantage_interval=advantage_interval,
        tpr=dict.fromkeys(limits, math.nan) | dict(zip(resolved, rates, strict=True)),
        tpr_interval=dict.fromkeys(limits, (math.nan, math.nan)) | dict(zip(resolved, intervals, strict=True)),
    )
