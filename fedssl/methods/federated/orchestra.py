"""Orchestra: agree with a teacher on which of the federation's clusters an example belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses.similarity import product, unit
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.methods.common.clustering import equal_size_clusters
from fedssl.modalities.images import quarter_turns
from fedssl.model import Model
from fedssl.networks.heads import mlp
from fedssl.networks.keys import KeyQueue, check_on_merge
from fedssl.networks.teacher import Target, check_decay, follow, teacher_modules, teacher_parts
from fedssl.parts import Coupling, Part, Share


class LocalCentroids(nn.Module):
    """A client's clusters, for the server; the server's own value stays zero, so no client sees another's.

    Attributes:
        value: (K, D) float32, of length 1.
    """

    value: Tensor

    def __init__(self, clusters: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(clusters, dim))


@dataclass(frozen=True)
class Orchestra(SSLMethod):
    """Orchestra (Lubana et al. 2022, https://arxiv.org/abs/2205.11506); the other half is the strategy of that name.

    With global centroids C, a student z of one view and an EMA teacher z' of the other, all of length 1,

        loss = -softmax(z' C^T / T) . log softmax(z C^T / T) + rotation * CE(by how many quarter turns is it rotated).

    The first term alone is lowest when all examples share one cluster; the rotations are what keeps the features apart.
    After training a client divides its memory, the teacher's last projections, into clusters of equal size and uploads
    their centroids; from those of all clients of the round the server moves C. C starts at seeded random directions.
    The authors' first round trains nothing and only clusters; here it trains, against those directions.

    The memory holds embeddings of single examples: it stays at home (the released code uploads it). That does not make
    the centroids private: a cluster of memory / local_centroids projections may be of few examples, or of one.

    Attributes:
        centroids: global clusters, for all clients; the paper has 128 for 50 clients a round, which suits CIFAR-10.
        local_centroids: clusters of one client.
        memory: projections that a client keeps.
        temperature: T, above 0; tell the strategy of another one.
        rotation: weight of the rotation loss, of square images only; 0 drops its head and takes other modalities.
        sharpness, iterations: of the local clustering, see `clustering.equal_size_clusters`.
        on_merge: what happens to the memory at a round's start: keep, clear or reencode.
        decay, decay_schedule: of the teacher: constant, cosine (to 1) or adaptive.
        hidden, out, layers, norm: of the projector.
    """

    centroids: int = 32
    local_centroids: int = 16
    memory: int = 128
    temperature: float = 0.1
    rotation: float = 1.0
    sharpness: float = 25.0
    iterations: int = 5
    on_merge: str = "keep"
    decay: float = 0.996
    decay_schedule: str = "constant"
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    coupling: ClassVar[Coupling] = Coupling.history  # through the memory and the centroids
    summaries: ClassVar[tuple[str, ...]] = ("centroids", "local_centroids")

    def __post_init__(self) -> None:
        check_decay(self.decay, self.decay_schedule)
        check_on_merge(self.on_merge)
        if min(self.centroids, self.local_centroids, self.memory, self.iterations) < 1:
            raise ConfigError("method.centroids, local_centroids, memory and iterations must each be at least 1")
        if not (self.temperature > 0 and self.rotation >= 0 and self.sharpness > 0):
            raise ConfigError("method.temperature and sharpness must be above 0, and rotation at least 0")

    @property
    def modalities(self) -> tuple[str, ...]:  # type: ignore[override]  # rotations decide it
        """Images, and without rotations also time series and graphs; of a pair it would remember one side only."""
        return ("images",) if self.rotation else ("images", "timeseries", "graphs")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The student with its rotation head, the teacher, the memory at home, and the two kinds of centroids."""
        return (
            Part("encoder"),
            Part("projector"),
            *((Part("rotation"),) if self.rotation else ()),
            *teacher_parts(self.decay_schedule),
            Part("memory", trainable=False, share=Share.local, holds_examples=True),
            Part("centroids", trainable=False, share=Share.received),
            Part("local_centroids", trainable=False),
        )

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """All parts; the memory is empty."""
        if self.rotation and len(set(sizes.shape[1:])) != 1:
            raise ConfigError(
                f"method.rotation={self.rotation} turns images by 90 degrees, and examples of shape {sizes.shape} are "
                "not square: use method.rotation=0"
            )
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        student: dict[str, nn.Module] = {"encoder": encoder, "projector": projector}
        rotation = {"rotation": nn.Linear(self.out, 4)} if self.rotation else {}
        return nn.ModuleDict(
            {
                **student,
                **rotation,
                **teacher_modules(student, self.decay_schedule),
                "memory": KeyQueue(self.memory, self.out),
                "centroids": nn.Linear(self.out, self.centroids, bias=False).requires_grad_(False),
                "local_centroids": LocalCentroids(self.local_centroids, self.out),
            }
        )

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Cross-entropy of the cluster assignments, and of the rotations."""
        view, other = batch.views
        centroids = unit(cast(nn.Linear, model["centroids"]).weight)  # (K, out)
        h = model["encoder"](view)  # (B, dim)
        key = Target(model)(other)  # (B, out)
        wanted = F.softmax(product(unit(key), centroids.T) / self.temperature, dim=1)  # (B, K)
        found = F.log_softmax(product(unit(model["projector"](h)), centroids.T) / self.temperature, dim=1)
        loss = -(wanted * found).sum(1).mean()
        aux = {"keys": key, "index": batch.index, "cluster_loss": loss.detach()}
        if self.rotation:
            turns = (batch.index + step.round + step.step) % 4  # balanced, changing, and a function of the batch
            z = model["projector"](model["encoder"](quarter_turns(view, turns)))
            term = F.cross_entropy(model["rotation"](z).float(), turns)
            loss, aux = loss + self.rotation * term, {**aux, "rotation_loss": term.detach()}
        return LossOutput(loss, None, h, aux)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher, and remember its projections."""
        follow(model, step, self.decay, self.decay_schedule)
        cast(KeyQueue, model["memory"]).push(out.aux["keys"], out.aux["index"])

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """Keep, clear or reencode the memory."""
        cast(KeyQueue, model["memory"]).refresh(self.on_merge, Target(model), own, augment)

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Cluster what the memory holds."""
        memory = cast(KeyQueue, model["memory"])
        centroids = equal_size_clusters(
            memory.keys[memory.index >= 0],
            self.local_centroids,
            generator,
            sharpness=self.sharpness,
            iterations=self.iterations,
        )
        cast(LocalCentroids, model["local_centroids"]).value.copy_(centroids)
        return {}
