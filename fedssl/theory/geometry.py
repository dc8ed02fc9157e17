"""What normalisation does to gradients and norms (T6)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, matrix, not_negative, positive
from fedssl.theory.softmax import unit_rows


def radial_component(z: ArrayLike, gradient: ArrayLike) -> Array:
    """Gives the cosine of each embedding and its gradient, `<z, dL/dz> / (|z| |dL/dz|)`.

    Args:
        z: (B, D) embeddings, not normalised.
        gradient: (B, D), dL/dz at them.

    Returns:
        (B,), in [-1, 1]: 0 to rounding when the loss does not depend on |z| (cosine), so that a step turns z and
        changes its length in second order only; below 0 a descent step lengthens z, above 0 it shortens z. 0 where
        either vector is zero.

    Raises:
        ConfigError: no matrices, or shapes that differ.
    """
    a, g = matrix("z", z), matrix("gradient", gradient)
    if a.shape != g.shape:
        raise ConfigError(f"z is {a.shape} and its gradient {g.shape}; pass one gradient for each embedding.")
    cosine: Array = (unit_rows(a) * unit_rows(g)).sum(1)
    return np.clip(cosine, -1, 1)


def norm_after_step(norm: float, gradient_norm: float, rate: float, *, radial: float = 0.0) -> float:
    """Gives |z| after one step `z - rate * g`: `|z'|^2 = |z|^2 - 2 rate |z| |g| radial + rate^2 |g|^2`.

    Args:
        norm: |z|, >= 0.
        gradient_norm: |g|, >= 0.
        rate: the step size, >= 0.
        radial: `radial_component`; the 0 of a cosine loss leaves `|z|^2 + rate^2 |g|^2`: orthogonal steps of a finite
            size never shorten z, and all lengthen it.

    Raises:
        ConfigError: a negative size, or a radial component outside [-1, 1].
    """
    a = not_negative("norm", norm)
    step = not_negative("rate", rate) * not_negative("gradient_norm", gradient_norm)
    if not -1 <= radial <= 1:
        raise ConfigError(f"radial is {radial}, but it is a cosine; pass a number from -1 to 1.")
    return math.sqrt(max(0.0, a * a - 2 * a * step * radial + step * step))


def norm_growth(norm: float, unit_gradient_norm: float, rate: float, steps: int) -> Array:
    """Gives |z| over steps of a cosine loss whose gradient has one size on the unit sphere.

    At length |z| such a gradient has the size c / |z|, so `|z'|^2 = |z|^2 + rate^2 c^2 / |z|^2`: growth slows down by
    itself and follows `(|z_0|^4 + 2 rate^2 c^2 t)^(1/4)` for small steps, while the angle turned by a step,
    about `rate c / |z|^2`, falls.

    Args:
        norm: |z_0|, > 0.
        unit_gradient_norm: c, |dL/dz| at |z| = 1, >= 0.
        rate: >= 0.
        steps: >= 0.

    Returns:
        (steps + 1,), not falling, first `norm`.

    Raises:
        ConfigError: a number out of range.
    """
    lengths = [positive("norm", norm)]
    c = not_negative("unit_gradient_norm", unit_gradient_norm)
    for _ in range(at_least("steps", steps, 0)):
        lengths.append(norm_after_step(lengths[-1], c / lengths[-1], rate))
    return np.array(lengths)
