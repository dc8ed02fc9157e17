"""Calibre: SimCLR with prototypes of the batch, and a measure of how tight a client's clusters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import nt_xent
from fedssl.losses.similarity import cross_entropies, product, unit, wide
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.methods.common.clustering import kmeans
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.networks.keys import keys_of
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class Calibre(SSLMethod):
    """Calibre (Chen, Su & Li 2024, https://arxiv.org/abs/2412.20020), as in its authors' code.

    `loss = NT-Xent(z1, z2) + contrast * L_p + meta * L_n`. K-means divides the features of both views of the batch into
    clusters; a cluster with members in both views has a prototype in each. L_p is NT-Xent between the two views'
    prototypes, means of projections. L_n takes the prototypes of the first view's features and says for each feature of
    the second view which is its own, by a softmax of the negative squared distances at length 1. The clustering needs
    no random numbers (the authors' is seeded anew at every call).

    After training a client clusters the features of all its examples and reports `divergence`, the mean over clusters
    of the mean distance to the centroid, both of features at length 1. (The authors measure from features as they are
    to centroids at length 1, which is mostly the features' length.) The strategy of the same name weighs by it; any
    other may merge this method too. The paper then trains a linear head on each client, which is not pretraining.

    Attributes:
        temperature: of NT-Xent, above 0.
        prototype_temperature: of L_p.
        clusters: of the batch, and of a client.
        contrast, meta: weights of L_p and L_n.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float = 0.2
    prototype_temperature: float = 0.5
    clusters: int = 10
    contrast: float = 0.3
    meta: float = 0.3
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch
    summaries: ClassVar[tuple[str, ...]] = ("divergence",)

    def __post_init__(self) -> None:
        if min(self.temperature, self.prototype_temperature) <= 0 or self.clusters < 1:
            raise ConfigError("method.temperature and prototype_temperature must be above 0, and clusters at least 1")
        if min(self.contrast, self.meta) < 0:
            raise ConfigError("method.contrast and meta are weights of losses: give 0 or more")

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """NT-Xent and the two terms of prototypes."""
        h, z = embed(model, batch.views)
        chosen, _ = kmeans(unit(torch.cat(h)), self.clusters)
        members = F.one_hot(chosen, self.clusters).chunk(2)  # 2 x (B, clusters)
        loss = nt_xent(z[0], z[1], temperature=self.temperature).mean()
        both = (members[0].sum(0) > 0) & (members[1].sum(0) > 0)  # (clusters,)
        prototypes = [means(wide(x), one) for x, one in zip(z, members, strict=True)]
        contrast = prototype_contrast(prototypes[0], prototypes[1], both, self.prototype_temperature)
        meta = prototype_entropy(means(wide(h[0]), members[0]), wide(h[1]), members[1], both)
        aux = {"prototype_contrast": contrast.detach(), "prototype_entropy": meta.detach()}
        return LossOutput(loss + self.contrast * contrast + self.meta * meta, None, h[0], aux)

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Report the divergence."""
        model.eval()
        features = keys_of(model["encoder"], own, torch.arange(len(own), device=generator.device), augment)
        model.train()
        return {"divergence": divergence(features, self.clusters)}


def means(x: Tensor, members: Tensor) -> Tensor:
    """(K, D) the mean of the rows of x (N, D) in each cluster, zero for an empty one; members (N, K) is 0 or 1."""
    members = members.to(x)
    return product(members.T, x) / members.sum(0)[:, None].clamp(min=1)


def prototype_contrast(a: Tensor, b: Tensor, there: Tensor, temperature: float) -> Tensor:
    """NT-Xent between prototypes a and b (K, D), mean over those that are `there` (K,) bool; 0 without any."""
    z = unit(torch.cat([a, b]))
    present = there.repeat(2)
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (product(z, z.T) / temperature).masked_fill(alone | ~present, -torch.inf)
    # A row whose every column is out would give nan, also in its gradient: it gets one, and does not count.
    logits = torch.where(present[:, None], logits, torch.eye(len(z), dtype=z.dtype, device=z.device))
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return _mean(cross_entropies(logits, partner), present)


def prototype_entropy(prototypes: Tensor, queries: Tensor, members: Tensor, there: Tensor) -> Tensor:
    """Cross-entropy of each query's own prototype by squared distances at length 1; 0 without any prototype.

    Args:
        prototypes: (K, D).
        queries: (N, D), of which those count whose own prototype is `there` (K,) bool.
        members: (N, K), 1 at a query's own prototype.
    """
    closeness = 2 * product(unit(queries), unit(prototypes).T) - 2  # (N, K): minus the squared distance
    logits = torch.where(there, closeness, -1e4)
    own = members.argmax(1)
    return _mean(cross_entropies(logits, own), there[own])


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    """The mean of the values that count, 0 without any."""
    return torch.where(counts, x, 0.0).sum() / counts.sum().clamp(min=1)


@torch.no_grad()
def divergence(features: Tensor, clusters: int) -> Tensor:
    """() the mean over k-means clusters of the mean distance of their features (N, D) to the centroid.

    0 means that every feature is a centroid, as with fewer examples than clusters; features at length 1 give at most 1
    or so.
    """
    chosen, centroids = kmeans(features, clusters)
    distance = (features - centroids[chosen]).norm(dim=1)
    members = F.one_hot(chosen, clusters)
    return _mean(means(distance[:, None], members)[:, 0], members.sum(0) > 0)
