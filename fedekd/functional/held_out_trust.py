"""Trust in a teacher, estimated from its outputs on held-out samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix


def correctness_trust(logits: Tensor, targets: Tensor, bins: int = 4, strength: float = 4.0) -> tuple[Tensor, Tensor]:
    r"""Estimate how often a teacher is right, by predicted class and confidence.

    Held-out samples fall into cells (c, b): the predicted class, and a bin of the confidence (the largest
    probability) between quantiles. With n samples, of which k are predicted correctly, and s the strength,

    $$r = \frac{k + s/2}{n + s}, \quad r_c = \frac{k_c + s r}{n_c + s}, \quad r_b = \frac{k_b + s r}{n_b + s}, \quad
    w_{cb} = \frac{k_{cb} + s (r_c + r_b)/2}{n_{cb} + s}.$$

    Each is the mean of a Beta posterior whose prior has the weight of s samples. The prior of $w_{cb}$ is centred at
    the mean of $r_c$ and $r_b$, the priors of $r_c$ and $r_b$ at r, and the prior of r at 1/2. Without samples all
    weights are 1/2; one more correct prediction lowers no weight. The mean over the held-out samples is about the
    teacher's accuracy on them.

    Args:
        logits: Outputs of the teacher, shape (n, C), C at least 2; samples with NaN or infinity are left out.
        targets: Class indices, shape (n,).
        bins: Number of bins, at least 1.
        strength: s, above 0.

    Returns:
        Upper edges of all bins but the last, shape (bins - 1,), and weights in [0, 1], float64, shape (C, bins); see
        `look_up_trust`.

    Raises:
        ValueError: If a shape does not match, or an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> _, weights = correctness_trust(logits, torch.tensor([0, 0, 0]), bins=1)
        >>> weights.flatten()  # right twice for class 0, wrong once for class 1
        tensor([0.7755, 0.4278], dtype=torch.float64)

    Reference:
        Hierarchical shrinkage of rates: Gelman et al., Bayesian Data Analysis, 3rd edition, Chapter 5.
    """
    require_matrix(logits=logits)
    logits, targets = _held_out(logits, targets, bins, strength)
    value, row = _value_and_row(logits)
    edges = _quantile_edges(value, bins)
    column = torch.bucketize(value, edges, right=True)
    cells = row * bins + column
    size = (logits.shape[1], bins)
    correct = (row == targets).double()
    n = torch.bincount(cells, minlength=math.prod(size)).double().view(size)
    k = torch.bincount(cells, weights=correct, minlength=math.prod(size)).view(size)
    overall = (k.sum() + strength / 2) / (n.sum() + strength)
    of_class, of_bin = (
        (k.sum(axis, keepdim=True) + strength * overall) / (n.sum(axis, keepdim=True) + strength) for axis in (1, 0)
    )
    return edges, (k + strength * (of_class + of_bin) / 2) / (n + strength)


def skill_trust(
    outputs: Tensor, targets: Tensor, mean: float, bins: int = 4, strength: float = 4.0
) -> tuple[Tensor, Tensor]:
    r"""Estimate how much better a teacher is than the mean predictor, by its output.

    The analogue of `correctness_trust` for regression. Held-out samples fall into bins between quantiles of the
    teacher's output g. With $t = \sum_i (g_i - y_i)^2$, $v = \sum_i (\bar y - y_i)^2$, $u = v / n$ and s the strength,

    $$w = \frac{v + s u / 2}{v + t + s u}, \qquad w_b = \frac{v_b + s u w}{v_b + t_b + s u}.$$

    A weight is 1/2 if the teacher is as good as the mean predictor; it tends to 1 as the teacher's error vanishes, and
    to 0 as it grows. Without samples all weights are 1/2; a smaller error lowers no weight.

    Args:
        outputs: Outputs of the teacher, shape (n, 1); samples with NaN or infinity are left out.
        targets: Real targets, shape (n,), in the unit of the outputs.
        mean: $\bar y$, mean of the training targets in that unit.
        bins: Number of bins, at least 1.
        strength: s, above 0.

    Returns:
        Upper edges of all bins but the last, shape (bins - 1,), and weights in [0, 1], float64, shape (1, bins); see
        `look_up_trust`.

    Raises:
        ValueError: If a shape does not match, or an argument is out of range.

    Example:
        >>> outputs, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, -1.0])
        >>> skill_trust(outputs, targets, mean=0.0, bins=1)[1]
        tensor([[0.7778]], dtype=torch.float64)
        >>> skill_trust(0 * outputs, targets, mean=0.0, bins=1)[1]
        tensor([[0.5000]], dtype=torch.float64)
    """
    require_matrix(outputs=outputs)
    if outputs.shape[1] != 1:
        raise ValueError(f"outputs: expected shape (n, 1), got {tuple(outputs.shape)}")
    outputs, targets = _held_out(outputs, targets, bins, strength)
    value, _ = _value_and_row(outputs)
    edges = _quantile_edges(value, bins)
    column = torch.bucketize(value, edges, right=True)
    targets = targets.double()
    errors = (value.double() - targets).square(), (mean - targets).square()
    t, v = (torch.bincount(column, weights=error, minlength=bins) for error in errors)
    # The prior has the error of s samples of the mean predictor, so that weights do not depend on the unit.
    prior = strength * v.sum() / max(len(targets), 1)
    overall = _share(v.sum() + prior / 2, t.sum() + prior / 2)
    return edges, _share(v + prior * overall, t + prior * (1 - overall)).unsqueeze(0)


def look_up_trust(output: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of a teacher's outputs from an estimated table.

    Args:
        output: Outputs of the teacher, shape (B, C); (B, 1) for regression.
        edges: Upper edges of all bins but the last, shape (bins - 1,).
        weights: Shape (C, bins).

    Returns:
        Weights, shape (B,), in the dtype of the output, at least float32, detached from the graph.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> weights = torch.tensor([[0.2, 0.9], [0.4, 0.6]])
        >>> output = torch.tensor([[4.0, 0.0], [0.0, 0.1], [1.0, 0.9]])
        >>> look_up_trust(output, edges=torch.tensor([0.7]), weights=weights)
        tensor([0.9000, 0.4000, 0.2000])
    """
    require_matrix(output=output)
    if weights.shape != (output.shape[1], len(edges) + 1):
        raise ValueError(
            f"weights: expected shape {(output.shape[1], len(edges) + 1)}, one row per output and one column per bin,"
            f" got {tuple(weights.shape)}"
        )
    value, row = _value_and_row(output)
    column = torch.bucketize(value, edges.to(value.dtype), right=True)
    return weights.to(value.dtype)[row, column]


def _value_and_row(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the binned value of each sample and the row of its weights."""
    output = upcast_to_float32(output.detach())
    if output.shape[1] == 1:
        return output[:, 0], torch.zeros_like(output[:, 0], dtype=torch.int64)
    confidence, predicted = output.softmax(dim=1).max(dim=1)
    return confidence, predicted


def _held_out(outputs: Tensor, targets: Tensor, bins: int, strength: float) -> tuple[Tensor, Tensor]:
    """Check held-out samples, and return those with finite outputs on the CPU."""
    if targets.shape != outputs.shape[:1]:
        raise ValueError(f"targets: expected shape {tuple(outputs.shape[:1])}, got {tuple(targets.shape)}")
    if bins < 1 or not 0 < strength < math.inf:
        raise ValueError(f"bins, strength: expected at least 1 and a finite number above 0, got {bins}, {strength}")
    outputs, targets = outputs.detach().cpu(), targets.detach().cpu()
    is_finite = outputs.isfinite().all(dim=1)
    return outputs[is_finite], targets[is_finite]


def _quantile_edges(value: Tensor, bins: int) -> Tensor:
    """Return the edges between bins of about equally many samples; 0 without samples."""
    if not len(value):
        return value.new_zeros(bins - 1)
    return value.quantile(torch.arange(1, bins, dtype=value.dtype) / bins)


def _share(v: Tensor, t: Tensor) -> Tensor:
    """Return v / (v + t), and 1/2 where both are 0."""
    total = v + t
    return torch.where(total > 0, v / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
