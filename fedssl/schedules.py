"""Learning-rate and EMA schedules: pure functions of the progress of the whole run, in [0, 1]."""

from __future__ import annotations

import math


def learning_rate(progress: float, base: float, schedule: str, warmup: float) -> float:
    """The learning rate at a point of the run.

    Args:
        progress: share of the run that lies behind, in [0, 1].
        base: the highest rate, reached when the warm-up ends.
        schedule: "cosine" falls to 0 at the end of the run (Loshchilov & Hutter 2017), "constant" stays.
        warmup: share of the run with a linear rise from 0, in [0, 1).
    """
    if progress < warmup:
        return base * progress / warmup
    if schedule == "constant":
        return base
    return 0.5 * base * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def ema_decay(progress: float, base: float, schedule: str) -> float:
    """The decay of an EMA teacher at a point of the run: "constant", or "cosine" from `base` to 1 (BYOL, sec. 3.2)."""
    if schedule == "constant":
        return base
    return 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2
