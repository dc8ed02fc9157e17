"""FedCA: average the networks, and give each client what the others project their examples to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedssl.errors import ConfigError
from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout
from fedssl.workshop import Workshop, public_base
from strategies import rules
from strategies.base import PartStrategy, Update

SENT, DICTIONARY, TARGET = "projections.rows", "dictionary.rows", "target.rows"  # arrays of the method of the same name


@dataclass
class FedCA(PartStrategy):
    """FedCA (Zhang et al. 2020, https://arxiv.org/abs/2010.08982), for the method of that name.

    The networks are averaged as by FedAvg. The dictionary has a block for each client: when it takes part its rows
    become `momentum * old + (1 - momentum) * new`, at length 1; while it does not they stay. Every client is sent all
    blocks and empties its own before it trains. What the server returns as projections is its own first value, zeros.

    With an alignment it trains a base model on the public examples before the first round and sends its projections.

    Attributes:
        momentum: a row's share of itself when its client comes again, in [0, 1).
        base_epochs: of the base model, over the public examples.
    """

    reads: ClassVar[Literal["mean", "each"]] = "each"
    needs: ClassVar[tuple[str, ...]] = ("projections", "dictionary")
    momentum: float = 0.5
    base_epochs: int = 20
    _workshop: Workshop | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"strategy.momentum={self.momentum} is a row's share of itself: give a number in [0, 1)")
        if self.base_epochs < 1:
            raise ConfigError(f"strategy.base_epochs={self.base_epochs} would align with an untrained model: give 1")

    @property
    def student(self) -> Arrays:
        """None: the averaged networks are the run's."""
        return {}

    def prepare(self, workshop: Workshop) -> None:
        """Keep it for `begin`."""
        self._workshop = workshop

    def begin(self, now: Arrays) -> Arrays:
        """With the base model's projections, if clients are to align with them."""
        if TARGET not in now or self._workshop is None:
            return now
        return {**now, TARGET: public_base(self._workshop, self.base_epochs)}

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean of the networks, and the next dictionary."""
        weights = [update.weight for update in updates]
        merged = {**now, **rules.weighted_mean([update.arrays for update in updates], weights), SENT: now[SENT]}
        merged[DICTIONARY] = now[DICTIONARY].copy()
        for update in updates:
            block = rules.refreshed_rows(now[DICTIONARY][update.client], update.arrays[SENT], self.momentum)
            merged[DICTIONARY][update.client] = block
        return merged

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """Without the client's own rows."""
        others = now[DICTIONARY].copy()
        others[own.client] = 0
        return {**now, DICTIONARY: others}, own.memo
