"""What this project's strategies add to Flower's: a client side, and a statement of what they read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fedssl.flower.codec import Memo
from fedssl.parts import Arrays


@runtime_checkable
class PartRule(Protocol):
    """A strategy that consumes replies one by one in any order, and says how merged arrays meet a client's own."""

    reads: str  # "mean", of each array over the clients that sent it, or "each", every client's, all arrays
    keeps: bool  # whether `receive` gets the client's last trained parts

    def receive(self, now: Arrays, mine: Arrays, memo: Memo) -> tuple[Arrays, Memo]:
        """On the client: the values to start from, and what to remember."""
        ...
