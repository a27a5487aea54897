"""Conformal prediction sets of classifiers, and what FedType learns from them (Wang et al., ICML 2024).

The sets are RAPS (Angelopoulos et al., Uncertainty Sets for Image Classifiers using Conformal Prediction, ICLR 2021).
Calibrate once: the `conformal_quantile` of the `regularized_scores` of n samples that the model was not trained on.
Then the `prediction_sets` of further samples of the same law hold the true label with probability 1 - alpha at least.
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
    r"""How far down a classifier's ranking the label lies: $E = \rho(y) + u\,\pi_y + \lambda\,(o(y) - \kappa)^+$.

    In this score of RAPS, $o(y)$ is the label's rank, from 1 for the likeliest class (of equally likely ones, the
    lower number comes first), and $\rho(y)$ is the probability of all classes ranked above it.

    Args:
        probabilities: $\pi$, shape (n, C), rows that sum to 1.
        labels: y, shape (n,), integers.
        uniforms: u, shape (n,), drawn uniformly from [0, 1): they break ties, so that coverage is exact.
        lam: $\lambda$, the price of each rank beyond kappa, at least 0.
        kappa: $\kappa$, ranks without a price.

    Returns:
        Scores of at least 0, shape (n,), in at least float32.

    Raises:
        ValueError: The shapes are not as above, or `lam` is negative.

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
    r"""The threshold $\tau$ below which a new sample's score lies with probability $1 - \alpha$ at least.

    It is the quantile of level $\lceil (n+1)(1-\alpha) \rceil / n$, taken as NumPy's `method="higher"` does; where that
    level exceeds 1, n samples are too few for the promise, and $\tau$ is infinite: at $\alpha = 0.1$, below 9.

    Args:
        scores: Of the calibration samples, shape (n,); NaN counts as infinite.
        alpha: $\alpha$, the rate of sets that may miss their label, between 0 and 1.

    Raises:
        ValueError: `alpha` is not between 0 and 1, or the shape is not (n,).

    Example:
        >>> conformal_quantile(torch.arange(9.0), alpha=0.1), conformal_quantile(torch.arange(8.0), alpha=0.1)
        (8.0, inf)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, but is {alpha}")
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (n,), but has {tuple(scores.shape)}")
    n = len(scores)
    # In fractions, since in floats (n + 1) * (1 - alpha) may lie a bit above a whole number, and its ceiling one
    # higher: 0.1 and 1/3 are meant as 1/10 and 1/3.
    numerator = math.ceil((n + 1) * (1 - Fraction(alpha).limit_denominator(10**9)))
    if numerator > n:
        return math.inf
    position = math.ceil(Fraction(numerator * (n - 1), n))
    quantile = float(upcast_to_float32(scores).sort().values[position])
    return math.inf if math.isnan(quantile) else quantile


def prediction_sets(probabilities: Tensor, quantile: float, uniforms: Tensor, lam: float, kappa: int) -> Tensor:
    r"""The labels that cannot be ruled out: those whose regularized score is at most $\tau$ (RAPS, Algorithm 3).

    These are the $L = \min(C, 1 + \#\{j : \sum_{i \le j} \pi_{(i)} + \lambda (j - \kappa)^+ \le \tau\})$ likeliest
    labels, without the last one where $u > V = [\tau - \sum_{i < L} \pi_{(i)} - \lambda (L - \kappa)^+] / \pi_{(L)}$,
    that is, where its score is above $\tau$. The likeliest label always stays, so that no set is empty.

    Args:
        probabilities: Shape (n, C), rows that sum to 1.
        quantile: $\tau$, of `conformal_quantile`; infinite gives every label.
        uniforms: u, shape (n,), drawn uniformly from [0, 1).
        lam: $\lambda$, as in the calibration.
        kappa: $\kappa$, as in the calibration.

    Returns:
        Whether each label is in each sample's set: bool, shape (n, C), at least one a row.

    Raises:
        ValueError: The shapes are not as above, or `lam` is negative.

    Example:
        >>> probabilities, u = torch.tensor([[0.6, 0.1, 0.3]]), torch.tensor([0.5])
        >>> prediction_sets(probabilities, 0.8, u, lam=0.0, kappa=1)
        tensor([[ True, False,  True]])
    """
    scores = _scores_of_every_label(probabilities, uniforms, lam, kappa)
    likeliest = torch.zeros_like(scores, dtype=torch.bool)
    likeliest.scatter_(1, _ranking(probabilities).indices[:, :1], True)
    # Not "scores <= quantile": a score that is NaN rules nothing out.
    return likeliest | ~(scores > quantile)


def fit_temperature(logits: Tensor, labels: Tensor, start: float = 1.3) -> float:
    r"""The temperature T at which $\mathrm{softmax}(z/T)$ gives the labels the highest likelihood (Guo et al., 2017).

    The negative log-likelihood is convex in 1/T, so the root of its slope is the one minimum; it is sought in
    float64 within [0.05, 20], and is the nearer bound if it lies beyond: for a classifier without a single error, 0.05.

    Args:
        logits: z, shape (n, C), finite.
        labels: Shape (n,), integers.
        start: What is returned if no temperature is better than another, as without any sample.

    Raises:
        ValueError: The shapes are not as above, a logit is not finite, or `start` is not positive.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)  # right in 3 of 4: log(3) would be the honest logit
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])) * math.log(3), 6)
        2.0
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start must be a positive number, but is {start}")
    require_matrix(logits=logits)
    require_same_shape(logits_by_sample=logits[:, 0], labels=labels)
    if not logits.isfinite().all():
        raise ValueError("logits must be finite")
    if len(logits) == 0:
        return start
    z = logits.detach().to("cpu", torch.float64)
    lead = z - z.gather(1, labels.detach().to("cpu", torch.int64)[:, None])

    def slope(inverse: float) -> float:
        """The derivative of the mean negative log-likelihood by 1/T; never falling."""
        return ((inverse * lead).softmax(dim=1) * lead).sum(dim=1).mean().item()

    from scipy.optimize import brentq  # here, since it takes a fifth of the time that torch takes to import

    hottest, coldest = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    if slope(hottest) == slope(coldest) == 0:
        return start
    if slope(hottest) >= 0:
        return HIGHEST_TEMPERATURE
    if slope(coldest) <= 0:
        return LOWEST_TEMPERATURE
    return 1 / float(brentq(slope, hottest, coldest, xtol=1e-12))


def set_agreement(proxy_sets: Tensor, private_sets: Tensor) -> Tensor:
    r"""How far the proxy's set may teach the private model (FedType's $\eta$).

    With S the proxy's set and L the private model's, it is $|S \cap L| / |S \cup L|$ if $|L| \le |S|$, and otherwise
    $|S \cap L| / |S|$: a proxy surer than the private model is not held to all that the latter allows.

    Args:
        proxy_sets: S, bool, shape (n, C).
        private_sets: L, bool, shape (n, C).

    Returns:
        Weights in [0, 1], shape (n,).

    Raises:
        ValueError: The shapes differ or are not (n, C).

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
    r"""How far labels outside a set outrank those inside, on average over all pairs of them.

    $$\ell = \frac{1}{|S||S'|} \sum_{a \in S,\, b \in S'} \max(0, z_b - z_a)$$

    FedType trains the private model on it with the proxy's sets S; S' is the complement. That the logits of S are to
    be the higher ones is inferred from the method's purpose.

    Args:
        logits: z, shape (n, C).
        sets: S, bool, shape (n, C).

    Returns:
        Losses of at least 0, shape (n,), in at least float32; 0 where S holds every label, or none.

    Raises:
        ValueError: The shapes differ or are not (n, C).

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
    """Likeliest first; of equals, the lower class first."""
    return upcast_to_float32(probabilities).sort(dim=1, descending=True, stable=True)


def _scores_of_every_label(probabilities: Tensor, uniforms: Tensor, lam: float, kappa: int) -> Tensor:
    """The regularized scores (n, C) that each label would have."""
    require_matrix(probabilities=probabilities)
    require_same_shape(probabilities_by_sample=probabilities[:, 0], uniforms=uniforms)
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, but is {lam}")
    ranked = _ranking(probabilities)
    pi = ranked.values
    above = pi.cumsum(dim=1).roll(1, dims=1)
    above[:, :1] = 0
    ranks = torch.arange(1, pi.shape[1] + 1, dtype=pi.dtype, device=pi.device)
    scores = above + uniforms[:, None].to(pi.dtype) * pi + lam * (ranks - kappa).clamp_min(0)
    return torch.zeros_like(scores).scatter(1, ranked.indices, scores)
