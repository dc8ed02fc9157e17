"""FedVSSL: a mixture of loss-weighted and size-weighted means of the backbone, with averaging over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedssl.errors import ConfigError, ProtocolError
from fedssl.parts import Arrays, Part
from strategies import rules
from strategies.base import PartStrategy, Update


@dataclass
class FedVSSL(PartStrategy):
    """FedVSSL (Rehman et al. 2022, https://arxiv.org/abs/2207.01975, equations 2 to 4).

    `new = alpha * sum_k e^{-l_k} w_k / sum_k e^{-l_k} + (1 - alpha) * sum_k n_k w_k / sum_k n_k`, where l_k is the mean
    loss of client k in this round; with `beta` (stochastic weight averaging) the server keeps `(new + now) / 2`. Both
    means are convex, so equal clients are a fixed point. Only the backbone travels: every other trainable part stays on
    its client.

    Attributes:
        alpha: share of the loss-weighted mean, in [0, 1].
        beta: whether the new model is averaged with the one before.
    """

    reads: ClassVar[Literal["mean", "each"]] = "each"
    alpha: float = 0.9
    beta: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"strategy.alpha={self.alpha} is a share of one of two means: give a number in [0, 1]")

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Heads stay at home."""
        return {part.name: "local" for part in parts if part.trainable and part.name != "encoder"}

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mixture; see the class."""
        unsaid = [update.client for update in updates if "loss" not in update.metrics]
        if unsaid:
            raise ProtocolError(
                f"client {unsaid[0]} did not report its loss, by which FedVSSL weighs: it runs another app"
            )
        arrays = [update.arrays for update in updates]
        by_loss = rules.weighted_mean(arrays, rules.loss_weights([update.metrics["loss"] for update in updates]))
        by_size = rules.weighted_mean(arrays, [update.weight for update in updates])
        new = rules.blend(by_size, by_loss, self.alpha)
        return rules.blend(now, new, 0.5) if self.beta else new
