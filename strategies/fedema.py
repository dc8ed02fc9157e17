"""FedEMA: a client blends the server's model into its own, by how far they are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedssl.errors import ConfigError
from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout, Part, part_of
from strategies import rules
from strategies.base import PartStrategy, Update

PARTS = ("encoder", "projector", "predictor")  # the online network and what predicts from it
SCALE, DRIFT = "scale", "drift"  # keys of the memo: lambda_k, and how far the last training went


@dataclass
class FedEMA(PartStrategy):
    """FedEMA (Zhuang, Wen & Zhang 2022, https://arxiv.org/abs/2204.04385); the server averages as FedAvg.

    On the client `theta <- mu theta_k + (1 - mu) theta_g` for the online network and the predictor alike, with
    `mu = min(lambda_k d, cap)`. A client that has never trained takes the server's model. At its second round, or the
    first after it with `d > 0`, it sets `lambda_k = tau / d` once, so that there `mu = tau`. The teacher stays at home.

    The paper's d is the distance of the client's online network from the server's (`variant=paper`). The authors'
    released code takes the mean over convolution kernels of how far the client's *own last training* moved them, which
    falls to 0 with the learning rate, and blends parameters only (`variant=reference`).

    Attributes:
        tau: the share of itself that a client keeps at its second round.
        scale: a fixed lambda instead, or null for the autoscaler. The paper's ablation has 0.8; above 1 it collapses.
        cap: the largest mu, in [0, 1]: what keeps the blend convex.
        selective: whether a client that sat out the round before takes the server's model, for its teacher as well
            (partial participation; the released code's `selective_ema`). Otherwise it blends with its older model.
        variant: paper or reference.
    """

    tau: float = 0.7
    scale: float | None = None
    cap: float = 1.0
    selective: bool = False
    variant: str = "paper"

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "reference"):
            raise ConfigError(f"strategy.variant={self.variant!r} is unknown: use paper or reference")
        if not (0 <= self.cap <= 1 and self.tau >= 0 and (self.scale is None or self.scale >= 0)):
            raise ConfigError(
                f"strategy.cap={self.cap} must be in [0, 1], and tau={self.tau} and scale={self.scale} not below 0: "
                "else the blend leaves the line between the two models"
            )

    @property
    def keeps(self) -> Collection[str]:
        """The online network and the predictor."""
        return PARTS

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """A teacher stays at home."""
        return {part.name: "local" for part in parts if part.teaches}

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean of the clients."""
        return updates[0].arrays

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """Blend; see the class."""
        if not own.arrays:
            return now, own.memo
        if self.selective and own.round != at - 1:
            return {**now, **refreshed_teachers(now, layout)}, own.memo
        divergence = self._divergence(now, own, layout)
        memo = dict(own.memo)
        if divergence > 0:  # one client alone gets its own model back, and a scale of 0 / 0 would last for ever
            memo.setdefault(SCALE, self.tau / divergence)
        mu = rules.fedema_share(divergence, memo.get(SCALE, 0.0) if self.scale is None else self.scale, self.cap)
        kept = own.arrays
        if self.variant == "reference":
            kept = {key: value for key, value in kept.items() if key in layout.parameters}
        return {**now, **rules.blend(now, kept, mu)}, memo

    def remember(self, start: Arrays, trained: Arrays, memo: Memo, layout: Layout) -> Memo:
        """How far training moved the kernels of the encoder, for the reference's d."""
        return {**memo, DRIFT: kernel_drift(start, trained, layout)} if self.variant == "reference" else memo

    def _divergence(self, now: Arrays, own: Own, layout: Layout) -> float:
        if self.variant == "reference":
            return own.memo.get(DRIFT, 0.0)
        online = rules.of_parts(own.arrays, ("encoder", "projector"))
        return rules.distance({key: value for key, value in online.items() if key in layout.parameters}, now)


def kernel_drift(start: Arrays, trained: Arrays, layout: Layout) -> float:
    """The mean over the encoder's convolution kernels of `||after - before||_2`."""
    moved = {k: v for k, v in trained.items() if part_of(k) == "encoder" and k in layout.kernels}
    return rules.mean_distance(moved, start)


def refreshed_teachers(now: Arrays, layout: Layout) -> Arrays:
    """Every teacher as the copy of the server's parts that it follows."""
    return {
        f"{teacher}.{key}": value
        for teacher, follows in layout.follows.items()
        for key, value in rules.of_parts(now, follows).items()
    }
