"""How a batch becomes a gradient: the seam where example-level privacy enters, and plain training as its identity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedssl.method import Batch, LossOutput, SSLMethod, Step
from fedssl.model import Model


class GradientTransform(Protocol):
    """Sampling and gradients belong to one proof, so one object owns both."""

    def admit(self, method: SSLMethod, model: Model) -> None:
        """Raise a PrivacyError if this method and network are outside the transform's proof."""
        ...

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """Yield index tensors (B,) int64 into a client's `n` examples."""
        ...

    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput:
        """Leave the gradient to be applied in `p.grad` of every trainable parameter."""
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
    """No privacy: the gradient of the mean loss over shuffled epochs."""

    def admit(self, method: SSLMethod, model: Model) -> None:
        """Admit everything; nothing is claimed."""

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """See `balanced_batches`."""
        return balanced_batches(n, batch_size, epochs, rng)

    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput:
        """Differentiate the batch's loss."""
        out = method.loss(model, batch, step)
        out.loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        return out
