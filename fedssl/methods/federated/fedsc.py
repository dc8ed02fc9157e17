"""FedSC: spectral contrast of a client's examples with each other and with other clients' correlation matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses.similarity import product, wide
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part, Share
from fedssl.privacy.release import correlation_sensitivity, gaussian_epsilon, symmetric_noise

_PIECE = 512  # examples encoded at a time


class Correlation(nn.Module):
    """A correlation matrix of projections, and whose it is.

    Attributes:
        matrix: (D, D) float32; while a client trains the mean of other clients', in its upload its own.
        clients: () int64, of how many others it is the mean; 0 where it is nobody's, or its own.
    """

    matrix: Tensor
    clients: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(dim, dim))
        self.register_buffer("clients", torch.zeros((), dtype=torch.int64))


class Releases(nn.Module):
    """How often a client has released its matrix.

    Attributes:
        count: () int64.
    """

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def shortened(z: Tensor, bound: float) -> Tensor:
    """Rows (B, D) no longer than sqrt(bound): longer ones are scaled down to it."""
    z = wide(z)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    short: Tensor = z * (bound**0.5 / norm.clamp(min=bound**0.5))
    return short


def correlation(z: Tensor) -> Tensor:
    """(D, D) `Z^T Z / N` of embeddings (N, D)."""
    return product(z.T, z) / len(z)


@dataclass(frozen=True)
class FedSC(SSLMethod):
    """FedSC (Jing et al. 2024, https://arxiv.org/abs/2405.03949); the other half is the strategy of that name.

    With projections of length at most sqrt(bound), R the correlation matrix of both views of the batch and R_ext the
    mean of the other clients' matrices,

        loss = -2 tr(Z1 Z2^T) / B + alpha tr(R R) + 2 (1 - alpha) tr(R R_ext).

    Alpha falls linearly over the run. Where no other client has sent a matrix yet it counts as 1, and the loss is
    local. After training a client computes its matrix over some augmented passes, the running statistics of
    normalisation layers held, and uploads it. (The authors compute it at the start of a round with the merged model and
    exchange it at once, a second trip to the server in each round.)

    **Privacy.** `noise` adds a Gaussian matrix to each upload, of a standard deviation of so many times the sensitivity
    sqrt(2) bound / n against replacing one of the client's n records (`privacy.release`); the epsilon of all uploads so
    far, at `delta`, is reported as `correlation_epsilon`. Noise 0 is no claim, and nothing is reported. That epsilon is
    of the matrices, given the weights: **the update of the model is not covered**, and is not private. The noise comes
    from the job's seed, so it protects from those who do not know that.

    Attributes:
        bound: mu, squared length of the longest projection, above 0.
        alpha, alpha_end: where alpha starts and where it would be after the last round, in [0, 1].
        passes: augmented passes over the data for a matrix.
        noise: noise multiplier, 0 or more.
        delta: of the reported epsilon, in (0, 1).
        hidden, out, layers, norm: of the projector; the authors' has no normalisation, `norm=none`.
    """

    bound: float = 4.0
    alpha: float = 1.0
    alpha_end: float = 0.2
    passes: int = 5
    noise: float = 0.0
    delta: float = 1e-5
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (
        Part("encoder"),
        Part("projector"),
        Part("correlation", trainable=False),
        Part("releases", trainable=False, share=Share.local),
    )
    coupling: ClassVar[Coupling] = Coupling.batch  # R_ext is of others' examples
    summaries: ClassVar[tuple[str, ...]] = ("correlation",)

    def __post_init__(self) -> None:
        if not (self.bound > 0 and self.passes >= 1):
            raise ConfigError("method.bound is a squared length, above 0, and method.passes at least 1")
        if not (0 <= self.alpha <= 1 and 0 <= self.alpha_end <= 1):
            raise ConfigError("method.alpha and alpha_end are shares of two terms: give them in [0, 1]")
        gaussian_epsilon(self.noise, 1, self.delta)  # refuses what has no epsilon

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, no correlation yet and no release."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        own = {"correlation": Correlation(self.out), "releases": Releases()}
        return nn.ModuleDict({"encoder": encoder, "projector": projector, **own})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Attraction of the views, contraction within the batch, contrast with the other clients."""
        h, z = embed(model, batch.views)
        first, second = (shortened(x, self.bound) for x in z)
        own = correlation(torch.cat([first, second]))
        others = cast(Correlation, model["correlation"])
        alpha = torch.where(others.clients > 0, self.alpha + (self.alpha_end - self.alpha) * step.progress, 1.0)
        loss = -2 * (first * second).sum(1).mean() + alpha * own.square().sum()
        loss = loss + 2 * (1 - alpha) * (own * others.matrix).sum()
        return LossOutput(loss, None, h[0], {})

    @torch.no_grad()
    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Release this client's matrix; reports `correlation_epsilon` if there is noise."""
        summary = cast(Correlation, model["correlation"])
        summary.matrix.copy_(self.matrix_of(model, own, augment, generator))
        summary.clients.zero_()
        count = cast(Releases, model["releases"]).count.add_(1)
        if not self.noise:
            return {}
        deviation = self.noise * correlation_sensitivity(self.bound, len(own))
        summary.matrix.add_(symmetric_noise(self.out, deviation, generator))
        return {"correlation_epsilon": torch.tensor(gaussian_epsilon(self.noise, int(count), self.delta))}

    @torch.no_grad()
    def matrix_of(self, model: Model, own: Examples, augment: Augment, generator: torch.Generator) -> Tensor:
        """(D, D) the correlation matrix of all own examples, without noise.

        Layers are in evaluation mode, so that each record's part in it is that of the record alone.
        """
        model.eval()
        index = torch.arange(len(own), device=generator.device)
        total = torch.zeros_like(cast(Correlation, model["correlation"]).matrix)
        for _ in range(self.passes):
            for piece in torch.tensor_split(index, max(1, -(-len(own) // _PIECE))):
                _, z = embed(model, augment.views(own.batch(piece), generator, 2))
                short = torch.cat([shortened(x, self.bound) for x in z])
                total += product(short.T, short) / (2 * len(own) * self.passes)
        model.train()
        return total
