"""How a batch becomes a gradient: the seam where example-level privacy enters, and plain training as its identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step, View
from fedssl.model import Model
from fedssl.networks.norms import has_batch_norm


class GradientTransform(Protocol):
    """Sampling and gradients belong to one proof, so one object owns both, with the numbers of one client."""

    @property
    def private(self) -> bool:
        """Whether nothing but noisy steps may leave the client: no loss, no measure of its features."""
        ...

    @property
    def weight(self) -> int | None:
        """What to tell of the client's number of examples instead of it; None: the number itself."""
        ...

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """Yield index tensors (B,) int64 into a client's `n` examples; B may be 0."""
        ...

    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput:
        """Leave the gradient to be applied in `p.grad` of every trainable parameter."""
        ...


class Privacy(Protocol):
    """The configuration of example-level privacy: it refuses what has no proof, and plans a client's numbers."""

    @property
    def private(self) -> bool:
        """Whether it claims anything."""
        ...

    def check(self, method: SSLMethod) -> None:
        """Raise a PrivacyError if there is no proof for this method; before any data is read."""
        ...

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Raise a PrivacyError if the live loss or network breaks the proof; before any training."""
        ...

    def planned(self, n: int, batch_size: int, epochs: int, rounds: float) -> GradientTransform:
        """For a client with `n` examples that will take part in so many rounds."""
        ...


def balanced_batches(n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Shuffled epochs, each cut into ceil(n / batch_size) batches whose sizes differ by at most one.

    No example is dropped and no batch is a tiny remainder: 33 examples at batch size 32 give 17 and 16, not 32 and 1,
    which matters to losses that contrast within the batch. A client with fewer examples than a batch trains on one
    batch of what it has.
    """
    steps = -(-n // batch_size)
    for _ in range(epochs):
        for part in np.array_split(rng.permutation(n), steps):
            yield torch.from_numpy(part)


@dataclass(frozen=True)
class PlainGradient:
    """No privacy: the gradient of the mean loss over shuffled epochs.

    Attributes:
        micro_batch: examples whose activations the encoder holds at once, or null for the whole batch. The gradient is
            the same: see `cached_backward`.
    """

    micro_batch: int | None = None
    private: ClassVar[bool] = False
    weight: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"privacy.micro_batch={self.micro_batch} holds no example: give at least 1, or null")

    def check(self, method: SSLMethod) -> None:
        """Nothing is claimed, so nothing is refused."""

    def planned(self, n: int, batch_size: int, epochs: int, rounds: float) -> PlainGradient:
        """The same for every client."""
        return self

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Admit everything, for nothing is claimed; but micro-batches need an encoder that reads example by example.

        Raises:
            ConfigError: micro-batches with batch normalisation in the encoder.
        """
        if self.micro_batch is not None and has_batch_norm(model["encoder"]):
            raise ConfigError(
                "privacy.micro_batch cuts batches for the encoder, whose batch normalisation needs them whole: "
                "use encoder.norm=group or layer, or privacy.micro_batch=null"
            )

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """See `balanced_batches`."""
        return balanced_batches(n, batch_size, epochs, rng)

    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput:
        """Differentiate the batch's loss."""
        if self.micro_batch is not None:
            return cached_backward(method, model, batch, step, self.micro_batch)
        out = method.loss(model, batch, step)
        out.loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        return out


def cached_backward(method: SSLMethod, model: Model, batch: Batch, step: Step, size: int) -> LossOutput:
    """Differentiate a loss over the whole batch with the encoder's activations of `size` examples at a time.

    Gradient caching (Gao et al. 2021, https://arxiv.org/abs/2101.06983): features without a graph, the loss and its
    gradient at the features, then the encoder again, piece by piece, with those gradients. Contrastive losses keep all
    their negatives; the price is one more forward pass of the encoder. The heads see the whole batch.
    """
    student = _Cached(model["encoder"], size)
    parts: dict[str, nn.Module] = {**dict(model.items()), "encoder": student}
    for part in method.parts:
        if "encoder" in part.follows:
            follower = model[part.name]
            pieces = {name: follower.get_submodule(name) for name in part.follows}
            parts[part.name] = nn.ModuleDict({**pieces, "encoder": _Cached(pieces["encoder"], size)})
    out = method.loss(nn.ModuleDict(parts), batch, step)
    out.loss.backward()  # type: ignore[no-untyped-call]
    for view, features in student.seen:
        if features.grad is not None:
            for piece, gradient in zip(split(view, size), split(features.grad, size), strict=True):
                model["encoder"](piece).backward(gradient)
    return out


class _Cached(nn.Module):
    """An encoder that runs in pieces without a graph and remembers its features as leaves."""

    def __init__(self, encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size
        self.seen: list[tuple[View, Tensor]] = []

    def forward(self, view: View) -> Tensor:
        with torch.no_grad():
            features = torch.cat([self.encoder(piece) for piece in split(view, self.size)])
        if torch.is_grad_enabled():
            self.seen.append((view, features.requires_grad_()))
        return features


def split(view: View, size: int) -> Sequence[View]:
    """Consecutive pieces of at most `size` examples; what is not a tensor splits itself."""
    pieces: Sequence[View] = view.split(size)
    return pieces
