"""The exponential moving average as a weighted mean of the past (T9)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, probability


def ema_weights(decay: float, steps: int) -> Array:
    """Gives the weights of `steps` students in the teacher: `(1 - m) m^k` for the student of k steps ago.

    Args:
        decay: m of `teacher = m teacher + (1 - m) student`, in [0, 1].
        steps: t >= 0.

    Returns:
        (steps + 1,): the newest student first, then the older ones, last the initial teacher with `m^t`. Sums to 1. At
        m = 0 the teacher is the student; at 1 the initial teacher stays for good.

    Raises:
        ConfigError: a decay outside [0, 1] or negative steps.
    """
    m, t = probability("decay", decay), at_least("steps", steps, 0)
    return np.append((1 - m) * m ** np.arange(t), m**t)


def ema_weights_scheduled(decays: ArrayLike) -> Array:
    """Gives the weights of the students when the decay changes: each `1 - m_s`, times all decays after it.

    Args:
        decays: (t,), in [0, 1], the first step first.

    Returns:
        (t + 1,): the newest student first, last the initial teacher with the product of all decays. Sums to 1.

    Raises:
        ConfigError: decays that are no list of numbers in [0, 1].
    """
    m = np.asarray(decays, dtype=np.float64)
    if m.ndim != 1 or not np.all((m >= 0) & (m <= 1)):
        raise ConfigError(f"The decays are {m.tolist()}; pass a list of numbers from 0 to 1, one for each step.")
    later = np.append(1.0, np.cumprod(m[::-1]))  # (t + 1,), product of the decays after each step, newest first
    return np.append((1 - m[::-1]) * later[:-1], later[-1])


def ema_teacher(students: ArrayLike, initial: ArrayLike, decay: float) -> Array:
    """Gives the teacher after all students, from the closed form and not step by step.

    Args:
        students: (t, ...), the first step first.
        initial: (...), the teacher before the first step.
        decay: in [0, 1].

    Returns:
        (...).

    Raises:
        ConfigError: shapes that do not fit, or a decay outside [0, 1].
    """
    s, first = np.asarray(students, dtype=np.float64), np.asarray(initial, dtype=np.float64)
    if s.ndim == 0 or s.shape[1:] != first.shape:
        raise ConfigError(
            f"The students are {s.shape} and the initial teacher {first.shape}; stack one student for each step, each "
            "of the teacher's shape."
        )
    found: Array = np.tensordot(ema_weights(decay, len(s)), np.concatenate([s[::-1], first[None]]), axes=1)
    return found


def ema_window(decay: float) -> float:
    """Gives the customary window, `1 / (1 - m)` steps: within it lie `1 - m^window`, about 63 %, of all weight.

    Args:
        decay: in [0, 1).

    Raises:
        ConfigError: a decay outside [0, 1).
    """
    return 1 / (1 - _moving(decay))


def ema_lag(decay: float, steps: int | None = None) -> float:
    """Gives the mean age of the teacher's weights in steps: `m (1 - m^t) / (1 - m)`, in the limit `m / (1 - m)`.

    A student that moves by v a step leads its teacher by v times this.

    Args:
        decay: in [0, 1).
        steps: t, how many students there have been; the initial teacher has the age t. None means very many.

    Returns:
        One less than `ema_window` in the limit.

    Raises:
        ConfigError: a decay outside [0, 1) or negative steps.
    """
    m = _moving(decay)
    reached = 1.0 if steps is None else 1 - m ** at_least("steps", steps, 0)
    return m / (1 - m) * reached


def ema_effective_count(decay: float) -> float:
    """Gives how many independent students a plain mean of equal variance has: `1 / sum(w^2) = (1 + m) / (1 - m)`.

    Args:
        decay: in [0, 1).

    Returns:
        About twice `ema_window` for m near 1: as a filter of noise the teacher is twice as long as its window.

    Raises:
        ConfigError: a decay outside [0, 1).
    """
    m = _moving(decay)
    return (1 + m) / (1 - m)


def _moving(decay: float) -> float:
    if not 0 <= decay < 1:
        raise ConfigError(
            f"The decay is {decay}, for which the teacher has no finite window; pass a number from 0 to below 1."
        )
    return float(decay)
