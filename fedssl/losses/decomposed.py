"""Losses that couple a batch through the mean of one finite statistic: what is a record's own, and what is the batch's.

    L = (1 / n) sum_i l_i + F(s),    s = (1 / n) sum_i phi_i.

With lambda the gradient of F at s, `sum_i grad [l_i + <lambda, phi_i>]` is n times the gradient of L: once s is known,
every record's share of the gradient is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from fedssl.method import Batch, Step
from fedssl.model import Model

BATCH_NORM = "normalises over the batch in its head: set method.norm=group"


@dataclass(frozen=True)
class Own:
    """What records contribute, each by itself.

    Attributes:
        losses: (B,) l_i, of which no row reads another.
        statistics: (B, P) phi_i.
        features: (B, dim) encoder outputs of view 0.
    """

    losses: Tensor
    statistics: Tensor
    features: Tensor


@runtime_checkable
class Decomposed(Protocol):
    """A method whose loss splits so. `n` is the expected size of a batch: with the real one the loss is equal."""

    @property
    def length(self) -> int:
        """P, the numbers of a statistic."""
        ...

    @property
    def matrix(self) -> int:
        """K, where the statistic has K x K matrices; 0 where it has none."""
        ...

    @property
    def undecomposed(self) -> str:
        """What, as configured, couples records besides, and what to set instead; empty: nothing."""
        ...

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """The records' own losses and statistics."""
        ...

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """(), F at the mean statistic (P,)."""
        ...

    def settled(self, s: Tensor) -> Tensor:
        """(P,), the nearest sensible statistic to a noisy one, such as one whose covariances have no negative variance.

        A function of its argument alone; it leaves statistics of real records as they are.
        """
        ...

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """What `after_step` reads in `aux`, from the mean statistic (P,)."""
        ...
