"""Distillation losses per sample, and their gated mean (FedeKD Eq. 4).

Pure functions: gradients flow to student and teacher. Detach the teacher to train only the student.
"""

from __future__ import annotations

import math

from torch import Tensor, zeros_like
from torch import bool as bool_

from fedekd.functional.precision import upcast_to_float32
from fedekd.functional.shapes import require_matrix, require_same_shape


def kl_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute the KL divergence of the student from the teacher.

    $T^2\, \mathrm{KL}(q \| p)$ with $p = \mathrm{softmax}(z_{student}/T)$ and
    $q = \mathrm{softmax}(z_{teacher}/T)$. At T = 1 this is FedeKD's $\ell_{KD}$, whose gradient
    with respect to the student's logits is $p - q$ (Corollary 2). The factor $T^2$ keeps the scale of the gradient.

    Args:
        student_logits: Shape (B, C).
        teacher_logits: Shape (B, C).
        temperature: T, above 0.

    Returns:
        Losses in nats, shape (B,).

    Raises:
        ValueError: If the shapes differ or are not (B, C), or `temperature` is not above 0.

    Example:
        >>> import torch
        >>> kl_distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]]))
        tensor([0.6931])

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015; FedeKD (arXiv 2605.05553).
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
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
    r"""Compute the decoupled distillation loss (DKD).

    $$T^2 \left(\alpha\, \mathrm{KL}(b^t \| b^s) + \beta\, \mathrm{KL}(\hat p^t \| \hat p^s)\right)$$

    with $b = (p_y, 1 - p_y)$ and $\hat p$ the softmax over the non-target classes, all at temperature T; t is the
    teacher, s the student. Plain distillation at T = 1 has $\alpha = 1$ and $\beta = 1 - p^t_y$ per sample, so that a
    confident teacher transfers little about the other classes; DKD removes this coupling.

    Args:
        student_logits: Shape (B, C), with C at least 2; for C = 2 the second term is 0.
        teacher_logits: Shape (B, C).
        targets: Class indices, int64, shape (B,).
        alpha: Weight of the target term.
        beta: Weight of the non-target term.
        temperature: T, above 0.

    Returns:
        Losses in nats, shape (B,).

    Raises:
        ValueError: If the shapes do not match, C is 1, or `temperature` is not above 0.

    Example:
        >>> import torch
        >>> teacher, target = torch.tensor([[9.0, 2.0, 0.0]]), torch.tensor([0])
        >>> student = torch.tensor([[9.0, 0.0, 2.0]])  # same target probability, other classes swapped
        >>> bool(decoupled_distillation(student, teacher, target) > 10 * kl_distillation(student, teacher, 4.0))
        True

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679), Eq. 7.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    require_matrix(student_logits=student_logits, teacher_logits=teacher_logits)
    if targets.shape != student_logits.shape[:1] or student_logits.shape[1] < 2:
        raise ValueError(
            "decoupled_distillation: expected logits (B, C) with C >= 2 and targets (B,), got"
            f" {tuple(student_logits.shape)} and {tuple(targets.shape)}"
        )
    target_index = targets.unsqueeze(1)
    is_target = zeros_like(student_logits, dtype=bool_).scatter(1, target_index, True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the target, of all others, and among the others."""
        log_p = (upcast_to_float32(logits) / temperature).log_softmax(dim=1)
        # Not log(1 - p_y), which loses all digits for a confident model.
        log_others = log_p.masked_fill(is_target, -math.inf).logsumexp(dim=1)
        return log_p.gather(1, target_index).squeeze(1), log_others, log_p - log_others.unsqueeze(1)

    target_t, others_t, among_t = parts(teacher_logits)
    target_s, others_s, among_s = parts(student_logits)
    of_target = target_t.exp() * (target_t - target_s) + others_t.exp() * (others_t - others_s)
    # The target's entry is not a probability among the others and may be infinite: mask it, do not multiply by 0.
    weights = among_t.masked_fill(is_target, -math.inf).exp()
    of_others = (weights * (among_t - among_s).masked_fill(is_target, 0.0)).sum(dim=1)
    return temperature**2 * (alpha * of_target + beta * of_others)


def squared_error_distillation(student_output: Tensor, teacher_output: Tensor) -> Tensor:
    r"""Compute the squared error $\|f(x) - g(x)\|_2^2$ (FedeKD Section 3.5).

    Args:
        student_output: Shape (B, D), or (B,) for scalar outputs.
        teacher_output: The same shape.

    Returns:
        Losses in the squared unit of the target, shape (B,).

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> squared_error_distillation(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([4., 0.])
    """
    require_same_shape(student_output=student_output, teacher_output=teacher_output)
    residual = upcast_to_float32(student_output) - upcast_to_float32(teacher_output)
    return residual.square().unsqueeze(-1).flatten(1).sum(dim=1)


def gated_distillation(per_sample_loss: Tensor, weights: Tensor) -> Tensor:
    r"""Compute the gated loss of a batch (FedeKD Eq. 4).

    $$\frac{1}{n} \sum_i \mathrm{sg}(w_i)\, \ell_i$$

    The weights are detached, so each sample's gradient keeps its direction and is scaled by $w_i$ (Proposition 4). The
    sum is divided by n, not by the sum of the weights.

    Args:
        per_sample_loss: Shape (B,).
        weights: Shape (B,), in [0, 1], as returned by `trust_weights`.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> gated_distillation(torch.tensor([4.0, 2.0]), torch.tensor([0.25, 0.5]))
        tensor(1.)
    """
    require_same_shape(per_sample_loss=per_sample_loss, weights=weights)
    return (upcast_to_float32(weights.detach()) * upcast_to_float32(per_sample_loss)).mean()
