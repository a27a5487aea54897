"""Distillation losses, one number a sample, and their gated mean (FedeKD Eq. 4).

Pure functions: gradients flow to whatever asks for them. Whoever trains only the student detaches the
teacher.
"""

from __future__ import annotations

import math

from torch import Tensor, zeros_like
from torch import bool as bool_

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix, require_same_shape


def kl_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence of the student from the teacher, $T^2\, \mathrm{KL}(q \| p)$.

    Here $p = \mathrm{softmax}(z_{student}/T)$ and $q = \mathrm{softmax}(z_{teacher}/T)$. At T = 1 this is
    FedeKD's $\ell_{KD}$, whose gradient with respect to the student's logits is $p - q$ (Corollary 2). The
    factor $T^2$ keeps the gradient's size when T changes (Hinton et al., 2015).

    Args:
        student_logits: Shape (B, C).
        teacher_logits: Shape (B, C).
        temperature: T, above 0.

    Returns:
        Losses in nats, shape (B,).

    Raises:
        ValueError: The shapes differ or are not (B, C), or `temperature` is not a positive number.

    Example:
        >>> import torch
        >>> kl_distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]]))
        tensor([0.6931])
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, but is {temperature}")
    require_matrix(student_logits=student_logits, teacher_logits=teacher_logits)
    log_p = (upcast_to_float32(student_logits) / temperature).log_softmax(dim=1)
    log_q = (upcast_to_float32(teacher_logits) / temperature).log_softmax(dim=1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=1)


def decoupled_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679, Eq. 7).

    $$T^2 \left(\alpha\, \mathrm{KL}(b^t \| b^s) + \beta\, \mathrm{KL}(\hat p^t \| \hat p^s)\right)$$

    with $b = (p_y, 1 - p_y)$, how sure a model is of the target, and $\hat p$ its softmax over the other classes, all
    at temperature T; t is the teacher, s the student. Plain distillation at T = 1 is the case of $\alpha = 1$ and,
    sample by sample, $\beta = 1 - p^t_y$: there a teacher that is sure of the target says little about the others,
    and here it does.

    Args:
        student_logits: Shape (B, C), two classes or more; with two, only the first term is left.
        teacher_logits: Shape (B, C).
        targets: Classes, int64, shape (B,).
        alpha: Weight of the target's term.
        beta: Weight of the other classes' term.
        temperature: T, above 0.

    Returns:
        Losses in nats, shape (B,).

    Raises:
        ValueError: The shapes do not fit together, there is but one class, or `temperature` is not a positive number.

    Example:
        >>> import torch
        >>> teacher, target = torch.tensor([[9.0, 2.0, 0.0]]), torch.tensor([0])
        >>> student = torch.tensor([[9.0, 0.0, 2.0]])  # as sure of the target, and wrong about the others
        >>> bool(decoupled_distillation(student, teacher, target) > 10 * kl_distillation(student, teacher, 4.0))
        True
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, but is {temperature}")
    require_matrix(student_logits=student_logits, teacher_logits=teacher_logits)
    if targets.shape != student_logits.shape[:1] or student_logits.shape[1] < 2:
        raise ValueError(
            f"decoupled distillation needs logits (B, C) with C >= 2 and targets (B,), but has "
            f"{tuple(student_logits.shape)} and {tuple(targets.shape)}"
        )
    place = targets.unsqueeze(1)
    is_target = zeros_like(student_logits, dtype=bool_).scatter(1, place, True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the target, of all others together, and of each among the others."""
        log_p = (upcast_to_float32(logits) / temperature).log_softmax(dim=1)
        # Not the logarithm of 1 - p_y, which loses all its digits where a model is sure.
        log_others = log_p.masked_fill(is_target, -math.inf).logsumexp(dim=1)
        return log_p.gather(1, place).squeeze(1), log_others, log_p - log_others.unsqueeze(1)

    target_t, others_t, among_t = parts(teacher_logits)
    target_s, others_s, among_s = parts(student_logits)
    of_target = target_t.exp() * (target_t - target_s) + others_t.exp() * (others_t - others_s)
    # The target's own entry is no probability among the others, and may be large: it is taken out, not multiplied by 0.
    weights = among_t.masked_fill(is_target, -math.inf).exp()
    of_others = (weights * (among_t - among_s).masked_fill(is_target, 0.0)).sum(dim=1)
    return temperature**2 * (alpha * of_target + beta * of_others)


def squared_error_distillation(student_output: Tensor, teacher_output: Tensor) -> Tensor:
    r"""Squared distance of the student from the teacher, $\|f(x) - g(x)\|_2^2$ (FedeKD Section 3.5).

    Args:
        student_output: Shape (B, D), or (B,) for scalar outputs.
        teacher_output: The same shape.

    Returns:
        Losses in the squared unit of the target, shape (B,).

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> squared_error_distillation(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([4., 0.])
    """
    require_same_shape(student_output=student_output, teacher_output=teacher_output)
    residual = upcast_to_float32(student_output) - upcast_to_float32(teacher_output)
    return residual.square().unsqueeze(-1).flatten(1).sum(dim=1)


def gated_distillation(per_sample_loss: Tensor, weights: Tensor) -> Tensor:
    r"""The gated loss of one batch, $\frac{1}{n} \sum_i \mathrm{sg}(w_i)\, \ell_i$ (FedeKD Eq. 4).

    The weights are held constant, so each sample's gradient keeps its direction and shrinks by $w_i$
    (Proposition 4). The sum is divided by n, not by the sum of the weights.

    Args:
        per_sample_loss: Shape (B,).
        weights: Shape (B,), as `trust_weights` gives them.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> gated_distillation(torch.tensor([4.0, 2.0]), torch.tensor([0.25, 0.5]))
        tensor(1.)
    """
    require_same_shape(per_sample_loss=per_sample_loss, weights=weights)
    return (upcast_to_float32(weights.detach()) * upcast_to_float32(per_sample_loss)).mean()
