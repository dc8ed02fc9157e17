"""VICReg: invariance of the two views, variance and decorrelation of the features; no negatives, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import moments, vicreg
from fedssl.losses.decomposed import BATCH_NORM, Own
from fedssl.losses.similarity import wide
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part, Share

_FAST, _SLOW = 0.1, 0.01  # steps of the two running means: about 10 and 100 steps of memory
_RATE = 0.02  # a weight changes by 2 % a step at most


class Balance(nn.Module):
    """VICReg's weights, adapted: where the views drift apart while the variance falls, ask for more invariance.

    The rule is that of the theory's text (T10), made exact: "drift apart" and "falls" mean that the mean of the last 10
    steps lies above that of the last 100, for the invariance term and for the variance hinge. While both hold, the
    weight of invariance grows by 2 % a step, up to `limit` times its base; otherwise it returns to it at the same pace.
    The weight of variance is never below that of invariance, and that of covariance grows with the square root.

    Attributes:
        weights: (3,) float32 of invariance, variance and covariance.
        fast, slow: (2,) float32 running means of invariance and hinge.
        seen: () int64, steps so far.
    """

    weights: Tensor
    fast: Tensor
    slow: Tensor
    seen: Tensor

    def __init__(self, base: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([base[0], max(base[:2]), base[2]]))
        self.register_buffer("fast", torch.zeros(2))
        self.register_buffer("slow", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, invariance: Tensor, hinge: Tensor, base: tuple[float, float, float], limit: float) -> None:
        """One step of the rule, from the unweighted terms ()."""
        self.seen.add_(1)
        now = torch.stack([invariance, hinge]).to(self.fast)
        for mean, step in ((self.fast, _FAST), (self.slow, _SLOW)):
            mean.lerp_(now, torch.clamp(1 / self.seen, min=step))
        worse = (self.fast > self.slow).all()
        moved = torch.where(worse, self.weights[0] * (1 + _RATE), self.weights[0] / (1 + _RATE))
        first = moved.clamp(base[0], base[0] * limit)
        growth = (first / max(base[0], 1e-12)).clamp(min=1)
        self.weights.copy_(torch.stack([first, first.clamp(min=base[1]), base[2] * growth.sqrt()]))


@dataclass(frozen=True)
class VICReg(SSLMethod):
    """VICReg (Bardes et al. 2022, https://arxiv.org/abs/2105.04906) with a three-layer expander.

    The terms are reported, unweighted. An example's loss depends on its batch through the variances and covariances, so
    a batch of one example is refused.

    Attributes:
        invariance, variance, covariance: weights of the terms.
        balance: fixed, or adaptive: see `Balance`, whose state stays on the client.
        limit: the adaptive weights' largest factor.
        hidden, out, layers, norm: of the expander.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    balance: str = "fixed"
    limit: float = 4.0
    hidden: int = 128
    out: int = 128
    layers: int = 3
    norm: str = "batch"
    views: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.balance not in ("fixed", "adaptive"):
            raise ConfigError(f"method.balance={self.balance!r} is unknown: use fixed or adaptive")
        if self.limit < 1:
            raise ConfigError(f"method.limit={self.limit} is the largest factor of a weight: give at least 1")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder and expander, and adaptive weights."""
        adaptive = (Part("balance", trainable=False, share=Share.local),) if self.balance == "adaptive" else ()
        return (Part("encoder"), Part("projector"), *adaptive)

    @property
    def coupling(self) -> Coupling:
        """`batch`; `history` with adaptive weights."""
        return Coupling.history if self.balance == "adaptive" else Coupling.batch

    @property
    def _base(self) -> tuple[float, float, float]:
        return self.invariance, self.variance, self.covariance

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and expander."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        model = nn.ModuleDict({"encoder": encoder, "projector": projector})
        if self.balance == "adaptive":
            model["balance"] = Balance(self._base)
        return model

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The weighted sum of the three terms."""
        h, (first, second) = embed(model, batch.views)
        terms = vicreg(first, second, invariance=self.invariance, variance=self.variance, covariance=self.covariance)
        aux = {name: value.detach() for name, value in terms._asdict().items() if name != "total"}
        if self.balance == "fixed":
            return LossOutput(terms.total, None, h[0], aux)
        weights = cast(Balance, model["balance"]).weights.clone()
        total = (weights * torch.stack([terms.invariance, terms.variance, terms.covariance])).sum()
        return LossOutput(total, None, h[0], {**aux, "invariance_weight": weights[0]})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Adapt the weights."""
        if self.balance == "adaptive":
            balance = cast(Balance, model["balance"])
            balance.update(out.aux["invariance"], out.aux["variance"], self._base, self.limit)

    @property
    def length(self) -> int:
        """Two means and two second moments."""
        return 2 * self.out * (1 + self.out)

    @property
    def matrix(self) -> int:
        """The covariances are out x out."""
        return self.out

    @property
    def undecomposed(self) -> str:
        """Adaptive weights, and batch normalisation."""
        if self.balance == "adaptive":
            return "adapts its weights to the terms of past batches: set method.balance=fixed"
        return BATCH_NORM if self.norm == "batch" else ""

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """Invariance, and the moments of both projections."""
        h, (first, second) = embed(model, batch.views)
        distances = (wide(first) - wide(second)).square().mean(1)  # (B,)
        return Own(self.invariance * distances, moments.vicreg_moments(first, second), h[0])

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """Variance and covariance."""
        return moments.vicreg_of(s, n, variance=self.variance, covariance=self.covariance)

    def settled(self, s: Tensor) -> Tensor:
        """With covariances that are positive semi-definite."""
        return moments.vicreg_settled(s)

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}
