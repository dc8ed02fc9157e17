"""FedU: clients take the server's encoder, and its predictor only if their own model has not moved far."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedssl import tree
from fedssl.errors import ConfigError
from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout, Part
from strategies import rules
from strategies.base import PartStrategy, Update
from strategies.fedema import kernel_drift

DIVERGENCE = "divergence"


@dataclass
class FedU(PartStrategy):
    """FedU (Zhuang et al. 2021, https://arxiv.org/abs/2108.06492); the server averages as FedAvg.

    The divergence-aware predictor update (DAPU): after its last training a client moved its online encoder by
    `||theta_k - theta_g||^2` from what it had received; below `threshold` it takes the server's predictor, else it
    keeps its own. The encoder is always the server's, the teacher stays at home. A client that has never trained takes
    everything from the server.

    Attributes:
        threshold: of the divergence, at least 0. It depends on the size of the encoder and on the learning rate: the
            authors' 0.4 belongs to `variant=reference`, their ResNet and their rate.
        variant: `paper`, the squared distance; `reference`, the mean over convolution kernels of the distance, as in
            the authors' released code.
    """

    threshold: float = 0.4
    variant: str = "paper"

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "reference"):
            raise ConfigError(f"strategy.variant={self.variant!r} is unknown: use paper or reference")
        if self.threshold < 0:
            raise ConfigError(f"strategy.threshold={self.threshold} is below every divergence: give 0 or more")

    @property
    def keeps(self) -> Collection[str]:
        """The predictor."""
        return ("predictor",)

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """A teacher stays at home."""
        return {part.name: "local" for part in parts if part.teaches}

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean of the clients."""
        return updates[0].arrays

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """The server's parts, but the client's predictor if its last training went far."""
        far = own.memo.get(DIVERGENCE, 0.0) >= self.threshold
        return ({**now, **own.arrays} if far else now), own.memo

    def remember(self, start: Arrays, trained: Arrays, memo: Memo, layout: Layout) -> Memo:
        """How far training moved the encoder."""
        if self.variant == "reference":
            return {**memo, DIVERGENCE: kernel_drift(start, trained, layout)}
        online = {k: v for k, v in rules.of_parts(trained, ("encoder",)).items() if k in layout.parameters}
        return {**memo, DIVERGENCE: tree.squared_distance(online, start)}
