"""Choosing the temperature: two rules from score statistics, and the same rules read off a batch while training.

`for_target_probability` and `max_snr` answer for Gaussian scores (`fedssl.theory.scores`), exactly. `Scheduled`,
`TargetProbability` and `MaxSNR` are what a method is configured with: each computes a temperature from the similarities
of the batch at hand, without gradient, without randomness and without waiting for the device. A temperature is a choice
of the objective, not a weight: no gradient flows through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses.similarity import product, ready_for, wide
from fedssl.theory.temperatures import (
    HIGHEST,
    LOWEST,
    NOISE_FLOOR,
    check_floor,
    check_range,
    for_target_probability,
    max_snr,
)

__all__ = [
    "WORDS",
    "MaxSNR",
    "Rule",
    "Scheduled",
    "TargetProbability",
    "choose",
    "for_target_probability",
    "max_snr",
    "rule",
]

FALLBACK = 0.2  # where a batch says nothing about the temperature
_ANCHORS, _NEGATIVES = 64, 256  # the most that a rule reads of a batch
_POINTS = 32  # temperatures tried at once, a factor of 1.25 apart
_FLAT = 1e-4  # mean probabilities that differ by less over all temperatures tell nothing


@runtime_checkable
class Rule(Protocol):
    """Chooses a temperature for each batch."""

    @property
    def reads_scores(self) -> bool:
        """Whether `at` looks at the scores; where not, `choose` does not compute them."""
        ...

    def at(self, positive: Tensor, negative: Tensor, progress: float, count: int | None = None) -> float | Tensor:
        """The temperature for these scores.

        Args:
            positive: (B,) similarities, not divided by a temperature.
            negative: (B, K) similarities, K >= 0.
            progress: share of the run that lies behind, in [0, 1].
            count: how many negatives the loss has, where `negative` holds a sample of them; None means K.

        Returns:
            A number, or a detached tensor () on the scores' device.
        """
        ...


@dataclass(frozen=True)
class Scheduled:
    """A temperature that depends on the progress of the run alone.

    Args:
        start: at progress 0, > 0.
        end: at progress 1, > 0.
        schedule: "cosine" (flat at both ends) or "linear".

    Raises:
        ConfigError: a temperature that is not above 0 or an unknown schedule.

    References:
        Kukleva et al. 2023, https://arxiv.org/abs/2303.13664 (temperature schedules)
    """

    start: float = 0.5
    end: float = 0.1
    schedule: str = "cosine"
    reads_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_temperature(self.start)
        _check_temperature(self.end)
        if self.schedule not in ("cosine", "linear"):
            raise ConfigError(f"The schedule {self.schedule!r} is not known; use 'cosine' or 'linear'.")

    def at(self, positive: Tensor, negative: Tensor, progress: float, count: int | None = None) -> float:
        """The schedule's value; the scores are not read."""
        share = min(1.0, max(0.0, progress))
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class TargetProbability:
    """The temperature at which the batch's mean softmax probability of the positive is p*.

    Of several temperatures the largest. Where none in the range reaches p*, the end that comes nearer. A batch is read
    whole up to 64 anchors and 256 negatives; of a larger one every n-th of each is read, and each negative counts for
    those left out. That overestimates p where a few unseen ones would decide: below a third of their scores' deviation.

    Args:
        probability: p*, in (0, 1).
        lowest, highest: the range, 0 < lowest < highest.
        fallback: used where nothing can be read: no negatives, scores that are all equal or so far apart that no
            temperature changes the probabilities, scores that are not finite, an empty batch.

    Raises:
        ConfigError: a number out of range.
    """

    probability: float = 0.5
    lowest: float = LOWEST
    highest: float = HIGHEST
    fallback: float = FALLBACK
    reads_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ConfigError(f"The target probability is {self.probability}; pass a number between 0 and 1.")
        check_range(self.lowest, self.highest)
        _check_temperature(self.fallback)

    def at(self, positive: Tensor, negative: Tensor, progress: float, count: int | None = None) -> Tensor:
        """The temperature (), by interpolation between 32 that are tried at once; see `Rule.at`."""
        if negative.numel() == 0:
            return _constant(positive, self.fallback)
        grid, missing = _curves(positive, negative, count, self.lowest, self.highest)  # (T,), (T, b)
        excess = 1 - self.probability - missing.mean(1)  # (T,), E[p] - p*
        reached = excess >= 0
        crossed = reached[1:] != reached[:-1]  # (T - 1,)
        last = (crossed * torch.arange(1, len(grid), device=grid.device)).argmax(0, keepdim=True)  # (1,)
        before, after = excess.gather(0, last), excess.gather(0, last + 1)
        share = before / torch.where(before == after, 1.0, before - after)
        inside = torch.lerp(grid.gather(0, last), grid.gather(0, last + 1), share)
        nearer = torch.where(excess[:1].abs() <= excess[-1:].abs(), grid[:1], grid[-1:])
        log_t = torch.where(crossed.any(), inside, nearer)
        return _settle(log_t, missing, self.lowest, self.highest, self.fallback)


@dataclass(frozen=True)
class MaxSNR:
    """The temperature at which the batch's gradients (p - 1) / t have the largest signal-to-noise ratio.

    Mean and variance are over the anchors of the batch; the floor is added to the variance as in `gradient_snr`. A
    large batch is read in part, as by `TargetProbability`.

    Args:
        noise_floor: > 0, in units of the gradient (1 / score). Without a floor the best temperature is infinite; the
            larger it is, the lower the temperature.
        lowest, highest: the range, 0 < lowest < highest.
        fallback: used where nothing can be read: one anchor, which has no variance, and as by `TargetProbability`.

    Raises:
        ConfigError: a number out of range.
    """

    noise_floor: float = NOISE_FLOOR
    lowest: float = LOWEST
    highest: float = HIGHEST
    fallback: float = FALLBACK
    reads_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_floor(self.noise_floor)
        check_range(self.lowest, self.highest)
        _check_temperature(self.fallback)

    def at(self, positive: Tensor, negative: Tensor, progress: float, count: int | None = None) -> Tensor:
        """The temperature (), a parabola through the best of 32 and its neighbours; see `Rule.at`."""
        if negative.numel() == 0 or len(positive) == 1:
            return _constant(positive, self.fallback)
        grid, missing = _curves(positive, negative, count, self.lowest, self.highest)  # (T,), (T, b)
        gradient = missing / grid.exp()[:, None]
        snr = gradient.mean(1) / (gradient.var(1, correction=0) + self.noise_floor**2).sqrt()  # (T,)
        best = snr.argmax(0, keepdim=True)  # (1,)
        inner = best.clamp(1, len(grid) - 2)
        left, middle, right = (snr.gather(0, inner + i) for i in (-1, 0, 1))
        bend = left - 2 * middle + right  # below 0 at an inner maximum
        shift = torch.where(bend < 0, (left - right) / (2 * torch.where(bend < 0, bend, -1.0)), 0.0).clamp(-1, 1)
        log_t = grid.gather(0, inner) + torch.where(inner == best, shift, best - inner) * (grid[1] - grid[0])
        return _settle(log_t, missing, self.lowest, self.highest, self.fallback)


WORDS: dict[str, Callable[[], Rule]] = {
    "cosine": Scheduled,
    "target_probability": TargetProbability,
    "max_snr": MaxSNR,
    "auto": MaxSNR,
}


def rule(value: float | str | Rule) -> float | Rule:
    """Reads what a method was configured with: a number, a rule, or the word for a rule with its defaults.

    Args:
        value: > 0; or a rule; or "cosine" (0.5 falling to 0.1), "target_probability" (0.5), "max_snr" or, for the same,
            "auto".

    Raises:
        ConfigError: another word, or a number that is not above 0 and finite.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_temperature(value)
        return float(value)
    if isinstance(value, str):
        if value not in WORDS:
            raise ConfigError(f"The temperature {value!r} is not known; use a number or one of {', '.join(WORDS)}.")
        return WORDS[value]()
    if isinstance(value, Rule):  # a protocol: to ask takes longer than all else here
        return value
    raise ConfigError(f"The temperature is {value!r}; use a number above 0, often 0.1, or one of {', '.join(WORDS)}.")


def choose(
    value: float | Rule,
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    progress: float,
    similarity: str = "cosine",
) -> float | Tensor:
    """Gives the temperature for a batch: a number as it is, at no cost, or what a rule says of the batch's scores.

    Scores are computed of at most 64 anchors and 256 negatives each, in float32 or wider, without gradient.

    Args:
        value: what `rule` returned.
        anchor: (B, D).
        positive: (B, D), row i belongs to anchor i.
        negatives: (K, D) shared, (B, K, D) own of each anchor, or None for the other positives of the batch.
        progress: share of the run that lies behind, in [0, 1].
        similarity: "cosine" or "dot".

    Returns:
        A number, or a detached tensor () on the embeddings' device.

    Raises:
        ConfigError: shapes that do not fit or an unknown similarity, when there is a rule that reads them.
    """
    if isinstance(value, (int, float)):
        return value
    if not value.reads_scores:
        return value.at(anchor[:0, 0], anchor[:0], progress)
    own = None if negatives is None else tuple(negatives.shape)
    fits = own is None or (len(own) in (2, 3) and (*own[:-2], own[-1]) in ((anchor.shape[-1],), tuple(anchor.shape)))
    if anchor.ndim != 2 or positive.shape != anchor.shape or not fits:
        raise ConfigError(
            f"anchor is {tuple(anchor.shape)}, positive {tuple(positive.shape)} and negatives {own}, so they cannot be "
            "compared; pass (B, D), (B, D) and (K, D), (B, K, D) or None."
        )
    with torch.no_grad():
        count = max(len(anchor) - 1, 0) if negatives is None else negatives.shape[-2]
        return value.at(*_scores(anchor, positive, negatives, similarity), progress=progress, count=count)


def _scores(anchor: Tensor, positive: Tensor, negatives: Tensor | None, similarity: str) -> tuple[Tensor, Tensor]:
    """Similarities of some anchors with their positives, (b,), and with some negatives, (b, k)."""
    ready = ready_for(similarity)
    rows = _every(len(anchor), _ANCHORS)
    a, p = ready(anchor[rows]), ready(positive[rows])  # (b, D)
    own = (a * p).sum(1)
    if negatives is None:
        others = max(len(positive) - 1, 0)
        against = product(a, ready(positive).T)  # (b, B)
        row = torch.arange(len(positive), device=a.device)[rows, None]  # (b, 1)
        column = torch.arange(others, device=a.device)[None, _every(others, _NEGATIVES)]  # (1, k)
        return own, against.gather(1, column + (column >= row))  # the anchor's own column is skipped
    some = _every(negatives.shape[-2], _NEGATIVES)
    if negatives.ndim == 2:
        return own, product(a, ready(negatives[some]).T)
    return own, product(ready(negatives[rows, some]), a.unsqueeze(2)).squeeze(2)


def _curves(
    positive: Tensor, negative: Tensor, count: int | None, lowest: float, highest: float
) -> tuple[Tensor, Tensor]:
    """Log temperatures (T,) from low to high, and 1 - p of some anchors at each, (T, b)."""
    rows, some = _every(len(positive), _ANCHORS), _every(negative.shape[1], _NEGATIVES)
    margin = wide(negative.detach()[rows, some]) - wide(positive.detach()[rows, None])  # (b, k)
    grid = torch.linspace(math.log(lowest), math.log(highest), _POINTS, dtype=margin.dtype, device=margin.device)
    unseen = math.log((count or negative.shape[1]) / margin.shape[1])  # those left out are taken to be like those read
    odds = torch.logsumexp(margin / grid.exp()[:, None, None], dim=2) + unseen  # (T, b) of 1 - p against p
    return grid, odds.masked_fill(odds == math.inf, math.nan).sigmoid()


def _settle(log_t: Tensor, missing: Tensor, lowest: float, highest: float, fallback: float) -> Tensor:
    """The temperature () of a log temperature (1,), or the fallback where the probability is flat or not a number."""
    mean = missing.mean(1)
    told = (mean.amax() - mean.amin() >= _FLAT) & log_t.isfinite()  # False for nan
    return torch.where(told, log_t.exp().clamp(lowest, highest), fallback).squeeze(0).to(missing.dtype)


def _constant(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=wide(like[:0]).dtype, device=like.device)


def _every(length: int, most: int) -> slice:
    """The fewest equal steps that leave at most `most` of `length`."""
    return slice(None, None, max(1, -(-length // most)))


def _check_temperature(value: float) -> None:
    if not 0 < value < math.inf:  # also refuses nan
        raise ConfigError(
            f"The temperature is {value}, but similarities are divided by it; set a finite value above 0, often 0.1."
        )
