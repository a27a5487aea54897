"""Conformal prediction sets of classifiers, and the losses of FedType on them.

The sets are RAPS (Angelopoulos et al., Uncertainty Sets for Image Classifiers using Conformal Prediction, ICLR 2021).
Calibration: the `conformal_quantile` of the `regularized_scores` of n samples that were not used for training. The
`prediction_sets` of further samples of the same distribution then contain the true label with probability of at least
1 - alpha.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix, require_same_shape

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0


def regularized_scores(probabilities: Tensor, labels: Tensor, uniforms: Tensor, lam: float, kappa: int) -> Tensor:
    r"""Compute the RAPS scores of the labels.

    $$E = \rho(y) + u\,\pi_y + \lambda\,(o(y) - \kappa)^+$$

    with $o(y)$ the rank of the label, 1 for the most likely class (the lower index first for equal probabilities), and
    $\rho(y)$ the probability of all classes ranked above it.

    Args:
        probabilities: $\pi$, shape (n, C), rows that sum to 1.
        labels: y, shape (n,), integers.
        uniforms: u, shape (n,), uniform in [0, 1); they break ties, so that coverage is exact.
        lam: $\lambda$, penalty per rank beyond kappa, at least 0.
        kappa: $\kappa$, number of ranks without penalty.

    Returns:
        Scores of at least 0, shape (n,), in at least float32.

    Raises:
        ValueError: If a shape is wrong, or `lam` is negative.

    Example:
        >>> half = torch.tensor([0.5])
        >>> regularized_scores(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([2]), half, lam=0.5, kappa=1)
        tensor([1.8750])
    """
    require_matrix(probabilities=probabilities)
    require_same_shape(probabilities_by_sample=probabilities[:, 0], labels=labels)
    scores = _scores_of_every_label(probabilities, uniforms, lam, kappa)
    return scores.gather(1, labels.long()[:, None]).squeeze(1)


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    r"""Compute the threshold $\tau$ of a coverage of at least $1 - \alpha$.

    It is the quantile of level $\lceil (n+1)(1-\alpha) \rceil / n$ (NumPy's `method="higher"`). If that level exceeds
    1, n samples are too few for the guarantee and $\tau$ is infinite: for $\alpha = 0.1$ with fewer than 9 samples.

    Args:
        scores: Scores of the calibration samples, shape (n,); NaN counts as infinite.
        alpha: $\alpha$, miscoverage rate, in (0, 1).

    Returns:
        tau; a new sample's score is at most tau with probability of at least $1 - \alpha$.

    Raises:
        ValueError: If `alpha` is out of range, or the shape is not (n,).

    Example:
        >>> conformal_quantile(torch.arange(9.0), alpha=0.1), conformal_quantile(torch.arange(8.0), alpha=0.1)
        (8.0, inf)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape (n,), got {tuple(scores.shape)}")
    n = len(scores)
    # As fractions: in floats (n + 1) * (1 - alpha) may exceed a whole number by a rounding error, and its ceiling
    # would be one too high.
    numerator = math.ceil((n + 1) * (1 - Fraction(alpha).limit_denominator(10**9)))
    if numerator > n:
        return math.inf
    position = math.ceil(Fraction(numerator * (n - 1), n))
    quantile = float(upcast_to_float32(scores).sort().values[position])
    return math.inf if math.isnan(quantile) else quantile


def prediction_sets(probabilities: Tensor, quantile: float, uniforms: Tensor, lam: float, kappa: int) -> Tensor:
    r"""Compute the sets of labels with a score of at most $\tau$ (RAPS, Algorithm 3).

    These are the $L = \min(C, 1 + \#\{j : \sum_{i \le j} \pi_{(i)} + \lambda (j - \kappa)^+ \le \tau\})$ most
    likely labels, without the last one if
    $u > V = [\tau - \sum_{i < L} \pi_{(i)} - \lambda (L - \kappa)^+] / \pi_{(L)}$, that is,
    if its score exceeds $\tau$. The most likely label is always included, so no set is empty.

    Args:
        probabilities: Shape (n, C), rows that sum to 1.
        quantile: $\tau$ of `conformal_quantile`; infinite gives all labels.
        uniforms: u, shape (n,), uniform in [0, 1).
        lam: $\lambda$, as in the calibration.
        kappa: $\kappa$, as in the calibration.

    Returns:
        Membership of each label in each set: bool, shape (n, C), at least one per row.

    Raises:
        ValueError: If a shape is wrong, or `lam` is negative.

    Example:
        >>> probabilities, u = torch.tensor([[0.6, 0.1, 0.3]]), torch.tensor([0.5])
        >>> prediction_sets(probabilities, 0.8, u, lam=0.0, kappa=1)
        tensor([[ True, False,  True]])
    """
    scores = _scores_of_every_label(probabilities, uniforms, lam, kappa)
    most_likely = torch.zeros_like(scores, dtype=torch.bool)
    most_likely.scatter_(1, _ranking(probabilities).indices[:, :1], True)
    # Not "scores <= quantile": a NaN score excludes no label.
    return most_likely | ~(scores > quantile)


def fit_temperature(logits: Tensor, labels: Tensor, start: float = 1.3) -> float:
    r"""Compute the temperature T of maximum likelihood of $\mathrm{softmax}(z/T)$.

    The negative log-likelihood is convex in 1/T, so the root of its derivative is the only minimum. The search runs in
    float64 within [0.05, 20] and returns the nearer bound if the minimum lies outside: 0.05 for a classifier without
    errors.

    Args:
        logits: z, shape (n, C), finite.
        labels: Shape (n,), integers.
        start: Returned if all temperatures are equally likely, as without samples; above 0.

    Returns:
        T, in [0.05, 20].

    Raises:
        ValueError: If a shape is wrong, a logit is not finite, or `start` is not positive.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)  # correct in 3 of 4: log(3) is the calibrated logit
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])) * math.log(3), 6)
        2.0

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start: expected a finite number above 0, got {start}")
    require_matrix(logits=logits)
    require_same_shape(logits_by_sample=logits[:, 0], labels=labels)
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite values")
    if len(logits) == 0:
        return start
    z = logits.detach().to("cpu", torch.float64)
    difference = z - z.gather(1, labels.detach().to("cpu", torch.int64)[:, None])

    def slope(inverse: float) -> float:
        """Compute the derivative of the mean negative log-likelihood by 1/T."""
        return ((inverse * difference).softmax(dim=1) * difference).sum(dim=1).mean().item()

    from scipy.optimize import brentq  # here, because its import takes a fifth of the time of torch's

    hottest, coldest = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    if slope(hottest) == slope(coldest) == 0:
        return start
    if slope(hottest) >= 0:
        return HIGHEST_TEMPERATURE
    if slope(coldest) <= 0:
        return LOWEST_TEMPERATURE
    return 1 / float(brentq(slope, hottest, coldest, xtol=1e-12))


def set_agreement(proxy_sets: Tensor, private_sets: Tensor) -> Tensor:
    r"""Compute the agreement of two prediction sets (FedType's $\eta$).

    With S the proxy's set and L the private model's, it is $|S \cap L| / |S \cup L|$ if $|L| \le |S|$, and otherwise
    $|S \cap L| / |S|$: a proxy with the smaller set is not penalised for labels that only the private model includes.

    Args:
        proxy_sets: S, bool, shape (n, C).
        private_sets: L, bool, shape (n, C).

    Returns:
        Weights in [0, 1], shape (n,).

    Raises:
        ValueError: If the shapes differ or are not (n, C).

    Example:
        >>> small, large = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
        >>> set_agreement(proxy_sets=small, private_sets=large), set_agreement(proxy_sets=large, private_sets=small)
        (tensor([1.]), tensor([0.5000]))
    """
    require_matrix(proxy_sets=proxy_sets, private_sets=private_sets)
    proxy_sets, private_sets = proxy_sets.bool(), private_sets.bool()
    shared = (proxy_sets & private_sets).sum(dim=1)
    either = (proxy_sets | private_sets).sum(dim=1)
    proxy, private = proxy_sets.sum(dim=1), private_sets.sum(dim=1)
    return shared / torch.where(private <= proxy, either, proxy).clamp_min(1)


def set_ranking_loss(logits: Tensor, sets: Tensor) -> Tensor:
    r"""Compute the mean ranking loss of labels outside a set over those inside.

    $$\ell = \frac{1}{|S||S'|} \sum_{a \in S,\, b \in S'} \max(0, z_b - z_a)$$

    FedType trains the private model on it with the proxy's sets S; S' is the complement. The paper does not state the
    sign; the purpose of the method implies that the logits of S should be the higher ones.

    Args:
        logits: z, shape (n, C).
        sets: S, bool, shape (n, C).

    Returns:
        Losses of at least 0, shape (n,), in at least float32; 0 where S has all labels or none.

    Raises:
        ValueError: If the shapes differ or are not (n, C).

    Example:
        >>> set_ranking_loss(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, False, False]]))
        tensor([1.])
    """
    require_matrix(logits=logits, sets=sets)
    z = upcast_to_float32(logits)
    violations = (z[:, None, :] - z[:, :, None]).relu()  # (n, a, b): by how much b outranks a
    sets = sets.bool()
    pairs = sets[:, :, None] & ~sets[:, None, :]
    return (violations * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)


def _ranking(probabilities: Tensor) -> torch.return_types.sort:
    """Sort by probability, most likely first; ties by class index."""
    return upcast_to_float32(probabilities).sort(dim=1, descending=True, stable=True)


def _scores_of_every_label(probabilities: Tensor, uniforms: Tensor, lam: float, kappa: int) -> Tensor:
    """Compute the regularised scores of all labels, shape (n, C)."""
    require_matrix(probabilities=probabilities)
    require_same_shape(probabilities_by_sample=probabilities[:, 0], uniforms=uniforms)
    if not lam >= 0:
        raise ValueError(f"lam: expected at least 0, got {lam}")
    ranked = _ranking(probabilities)
    pi = ranked.values
    above = pi.cumsum(dim=1).roll(1, dims=1)
    above[:, :1] = 0
    ranks = torch.arange(1, pi.shape[1] + 1, dtype=pi.dtype, device=pi.device)
    scores = above + uniforms[:, None].to(pi.dtype) * pi + lam * (ranks - kappa).clamp_min(0)
    return torch.zeros_like(scores).scatter(1, ranked.indices, scores)
