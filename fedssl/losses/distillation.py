"""Losses of a student that follows a target: one example's loss reads no other example."""

from __future__ import annotations

import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses._checks import check_floating, check_pair, check_temperature
from fedssl.losses.similarity import ready_for, wide


def negative_similarity(p: Tensor, z: Tensor, *, similarity: str = "cosine", stop_gradient: bool = True) -> Tensor:
    """Pulls the prediction p towards the target z: `-cos(p, z)` or `-<p, z>`.

    With the inner product nothing bounds the loss: norms that grow lower it without end. Without the stopped gradient
    the target runs towards the prediction as well, and SimSiam collapses: an ablation, not a method.

    Args:
        p: (B, D), the predictor's output.
        z: (B, D), the target of the same examples.
        similarity: "cosine", in which a zero vector has similarity 0 with everything, or "dot".
        stop_gradient: whether z is detached here; false leaves the gradient through z.

    Returns:
        (B,); in [-1, 1] with "cosine", unbounded with "dot".

    Raises:
        ConfigError: shapes that do not fit, an empty batch or an unknown similarity.

    References:
        Chen & He 2021, https://arxiv.org/abs/2011.10566, section 4.1 (stop-gradient)
    """
    check_pair("p", p, "z", z)
    ready = ready_for(similarity)
    inner = (ready(p) * ready(z.detach() if stop_gradient else z)).sum(1)
    # Rounding can leave [-1, 1] by one unit in the last place; the gradient is 0 there, the clamp takes nothing away.
    return -(inner.clamp(-1, 1) if similarity == "cosine" else inner)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Pulls the prediction p towards the target z, which gets no gradient: `-cos(p, stopgrad(z))`.

    -1 means equal directions, 0 orthogonal, 1 opposite. A collapsed encoder reaches -1 as well: a low loss is no proof
    of good features. BYOL's loss is `2 + 2 * negative_cosine(p, z)`. One example's loss reads no other example.

    Args:
        p: (B, D), the predictor's output.
        z: (B, D), the target of the same examples; detached here.

    Returns:
        (B,), in [-1, 1]; 0 where either vector is zero.

    Raises:
        ConfigError: shapes that do not fit or an empty batch.

    References:
        Chen & He 2021, https://arxiv.org/abs/2011.10566; Grill et al. 2020, https://arxiv.org/abs/2006.07733
    """
    return negative_similarity(p, z)


def dino(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
) -> Tensor:
    """Lets the student guess which of D prototypes the teacher sees: cross-entropy of two softmaxes.

    `-sum_d P_d log Q_d` with `P = softmax((teacher - center) / teacher_temperature)`, which gets no gradient, and
    `Q = softmax(student / student_temperature)`. `log D` means that the student sees all prototypes alike (collapse to
    uniform: too much centring); 0 that both see one and the same, which over a whole data set is the other collapse
    (too much sharpening). The center is given: one that follows the batch couples its examples.

    Args:
        student: (B, D), logits of the student's head.
        teacher: (B, D), logits of the teacher's head for another view of the same examples; detached here.
        center: (D,), a running mean of the teacher's logits; zeros for none. Detached here.
        student_temperature: > 0; 0.1 in the paper.
        teacher_temperature: > 0, usually below the student's: 0.04 to 0.07 in the paper.

    Returns:
        (B,), each value >= 0; not below the entropy of P.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or a temperature that is not above 0.

    References:
        Caron et al. 2021, https://arxiv.org/abs/2104.14294, algorithm 1
    """
    check_pair("student", student, "teacher", teacher)
    check_temperature(student_temperature, "student_temperature")
    check_temperature(teacher_temperature, "teacher_temperature")
    if center.shape != teacher.shape[1:]:
        raise ConfigError(
            f"center has the shape {tuple(center.shape)} beside logits of {tuple(teacher.shape)}, so it cannot be "
            f"subtracted from each; pass ({teacher.shape[1]},), zeros for no centring."
        )
    check_floating("center", center)
    with torch.no_grad():
        target = torch.softmax((wide(teacher) - wide(center)) / teacher_temperature, dim=1)  # (B, D)
    return -(target * torch.log_softmax(wide(student) / student_temperature, dim=1)).sum(1)
