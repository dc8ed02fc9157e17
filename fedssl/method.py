"""The contract of a self-supervised method: declared parts, a pure loss, and one place where state changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class Batch:
    """One batch as a method sees it; the leading dimension of every tensor is the example."""

    views: Sequence[Tensor]  # each (B, ...): differently augmented versions of the same B examples
    index: Tensor  # (B,) int64: position of each example in the client's own data set


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
class LossOutput:
    """What a loss returns; it has changed nothing."""

    loss: Tensor  # () what is differentiated
    per_example: Tensor | None  # (B,) iff coupling is none; loss == per_example.mean()
    features: Tensor  # (B, D) encoder output of view 0, detached: diagnostics only
    aux: Mapping[str, Tensor]  # detached, for after_step


class SSLMethod(Protocol):
    """A frozen dataclass whose fields are the method's hyper-parameters.

    `parts` and `coupling` may depend on those fields, so they are properties; `views` is how many augmented versions
    of each example the loss reads.
    """

    @property
    def views(self) -> int: ...

    @property
    def parts(self) -> tuple[Part, ...]: ...

    @property
    def coupling(self) -> Coupling: ...

    def init(self, encoder: nn.Module, dim: int, n: int) -> Model:
        """Build the model around an encoder with `dim` outputs, for a client with `n` examples (0 on the server)."""
        ...

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The loss of one batch. Pure: `model.state_dict()` is the same before and after."""
        ...

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Change the state that follows training: teachers, queues, centres. Called after the optimiser's step."""
        ...
