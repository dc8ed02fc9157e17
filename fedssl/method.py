"""The contract of a self-supervised method: declared parts, a pure loss, and two places where state changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedssl.draws import Source
from fedssl.model import Model
from fedssl.parts import Coupling, Part

View = Any  # what the encoder takes: (B, C, H, W) images, (B, C, T) signals, a batch of graphs, one side of a pair


@dataclass(frozen=True)
class Batch:
    """One batch as a method sees it; the leading dimension of every tensor is the example."""

    views: Sequence[View]  # differently augmented versions of the same B examples
    index: Tensor  # (B,) int64: position of each example in the client's own data set
    public: View | None = None  # public examples without augmentation, as many as the method's `public_batch`
    public_index: Tensor | None = None  # int64: their positions among the public examples, each at most once


@dataclass(frozen=True)
class Step:
    """Where training stands in the whole run, for schedules."""

    round: int  # 1 .. rounds
    rounds: int
    step: int  # 0 .. steps - 1, within this client's round
    steps: int

    @property
    def progress(self) -> float:
        """Share of the whole run that lies behind, in [0, 1)."""
        return (self.round - 1 + self.step / max(1, self.steps)) / max(1, self.rounds)


@dataclass(frozen=True)
class Sizes:
    """What a model is built for."""

    dim: int  # of the encoder's features
    examples: int  # of this client, for parts with one entry an example; 0 on the server
    shape: tuple[Any, ...]  # of one example: (C, H, W), (C, T), (F,) for graphs; two of them for pairs
    clients: int = 1  # of the federation
    public: int = 0  # public examples that the method reads


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns; it has changed nothing."""

    loss: Tensor  # () what is differentiated
    per_example: Tensor | None  # (B,) iff coupling is none; loss == per_example.mean()
    features: Tensor  # (B, D) encoder output of view 0, with its gradient: regularisers read it
    aux: Mapping[str, Tensor]  # detached, for after_step; those of shape () are reported as the round's means


def report(**values: float | Tensor) -> dict[str, Tensor]:
    """Scalars for `aux` that a batch has decided; numbers, which the configuration has decided, are left out."""
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


class Examples(Protocol):
    """A client's unlabelled examples, already on the device that trains."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Any:
        """The examples at these positions."""
        ...


class Augment(Protocol):
    """Batched, seeded, per-example independent augmentation on the device."""

    @property
    def modality(self) -> str:
        """images, timeseries, graphs or pairs: encoders and methods say which they take."""
        ...

    def views(self, x: Any, generator: torch.Generator, count: int) -> Sequence[View]:
        """`count` independent views of each of the B examples; `generator` is the only source of randomness."""
        ...

    def plain(self, x: Any) -> View:
        """The examples as they are measured: normalised, nothing else."""
        ...


@runtime_checkable
class MultiCrop(Augment, Protocol):
    """An augmentation that can also draw small crops."""

    def local_views(self, x: Any, generator: torch.Generator, count: int) -> Sequence[View]:
        """`count` independent views of small crops of each example."""
        ...


@runtime_checkable
class JointDraw(Protocol):
    """An augmentation whose `views` and `local_views` also take the `Streams` of several clients' examples."""

    joint: ClassVar[bool]

    def views(self, x: Any, generator: Source, count: int) -> Sequence[View]:
        """As `Augment.views`; each client's examples draw from its own stream."""
        ...

    def local_views(self, x: Any, generator: Source, count: int) -> Sequence[View]:
        """As `MultiCrop.local_views`; each client's examples draw from its own stream."""
        ...


class SSLMethod(Protocol):
    """A frozen dataclass whose fields are the method's hyper-parameters; inherit it for the defaults.

    `views`, `parts` and `coupling` may depend on those fields, so they are properties.
    """

    modalities: ClassVar[tuple[str, ...]] = ("images", "timeseries", "graphs", "pairs")

    @property
    def local_views(self) -> int:
        """How many views of small crops follow the others (multi-crop); 0 unless a method asks for them."""
        return 0

    @property
    def reads_public(self) -> bool:
        """Whether it needs public examples, which are none of a client's own."""
        return False

    @property
    def summaries(self) -> tuple[str, ...]:
        """What `before_upload` makes for the strategy that needs it: names of parts, and of scalars that it returns.

        A part among them is no mean of weights: only a strategy that says it needs it may merge it.
        """
        return ()

    @property
    def public_limit(self) -> int | None:
        """How many public examples it reads at most, spread evenly over all that there are; None: all."""
        return None

    @property
    def public_batch(self) -> int:
        """How many of them the loss of each batch reads; 0: none."""
        return 0

    @property
    def views(self) -> int:
        """How many augmented versions of each example the loss reads."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the model is made of: the keys of the `nn.ModuleDict` that `init` returns."""
        ...

    @property
    def coupling(self) -> Coupling:
        """What one example's loss may depend on besides itself; privacy reads it, and probes whether it is true."""
        ...

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Build the model around an encoder."""
        ...

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The loss of one batch. Pure: `model.state_dict()` is the same before and after."""
        ...

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Change the state that follows training: teachers, queues, centres. Called after the optimiser's step."""

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """Bring state of earlier rounds up to the merged weights. Called before a client's first step of a round."""

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Fill the parts that summarise a client's data, such as centroids; returns scalars () to report.

        Called after the last step of a round, with the model in training mode.
        """
        return {}


def views_of(method: SSLMethod, augment: Augment, examples: Any, generator: torch.Generator) -> list[View]:
    """The views of some examples that a method's loss reads, those of small crops last."""
    views = [*augment.views(examples, generator, method.views)]
    if method.local_views and isinstance(augment, MultiCrop):
        views += augment.local_views(examples, generator, method.local_views)
    return views
