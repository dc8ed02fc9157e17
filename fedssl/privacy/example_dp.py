"""DP-SGD for losses of single records: every record's gradient, of all its views together, clipped and noised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step
from fedssl.model import Model
from fedssl.privacy import contract, coupling
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import Engine, Records, by_engine, check_engine, clipped_sum, pieces, trainable
from fedssl.privacy.record_dp import Planned, RecordDP, nothing


@dataclass(frozen=True)
class ExampleDP(RecordDP):
    """Sum of the records' clipped gradients plus noise (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, alg. 1).

    The views of a record are one record: the gradient of its whole loss is clipped once, so the sum moves by at most
    the clip norm when it goes, and more views cost nothing (De et al. 2022, https://arxiv.org/abs/2204.13650). That
    needs a loss of each record alone, which `contract` checks in the configuration and `coupling` in the live network.

    Attributes:
        engine: how the gradients of records are found; see `Engine`.
    """

    engine: str = "ghost"

    @property
    def released(self) -> str:
        """In words."""
        return (
            "the sum of the records' clipped gradients with Gaussian noise, each step; all that is sent follows from it"
        )

    def check(self, method: SSLMethod) -> None:
        """Raise a PrivacyError unless each record's loss is its own by the method's word, and seen so by the engine."""
        check_engine(self.engine, method)
        contract.check_alone(method, "example")

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Raise a PrivacyError unless it is so in the live network, and nothing of a record outlives its step."""
        contract.check_network(model, method)
        inputs = coupling.inputs(examples, augment, method)
        coupling.probe_alone(method, model, inputs)
        coupling.probe_state(method, model, inputs, augment)
        coupling.probe_engine(Engine(self.engine), method, model, inputs[0])

    def noisy_sum(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, planned: Planned, noise: Noise
    ) -> tuple[list[Tensor], LossOutput]:
        """Micro-batch by micro-batch: only the sum is kept."""
        sums, out = clipped_gradients(self, Engine(self.engine), method, model, batch, step)
        deviation = planned.noise_multiplier * self.clip_norm
        return [total + noise.like(total, deviation) for total in sums], out


def clipped_gradients(
    mechanism: RecordDP, engine: Engine, method: SSLMethod, model: Model, batch: Batch, step: Step
) -> tuple[list[Tensor], LossOutput]:
    """The sum of the records' clipped gradients, for each trainable parameter, and what the loss returned."""
    sums: list[Tensor] = []
    seen: list[Records] = []
    for piece in pieces(batch, mechanism.micro_batch) if len(batch.index) else ():
        records = by_engine(engine, method, model, piece, step)
        own = clipped_sum(records.gradients, mechanism.clip_norm)
        sums = [total + more for total, more in zip(sums, own, strict=True)] if sums else own
        seen.append(Records([], records.losses, records.features, records.aux))
    return sums or [torch.zeros_like(p) for p in trainable(model)], collected(seen, model)


def collected(seen: Iterable[Records], model: Model) -> LossOutput:
    """What micro-batches returned, as the output of one loss."""
    rows = list(seen)
    if not rows:
        return nothing(model)
    losses = torch.cat([each.losses for each in rows])
    aux: dict[str, Any] = {
        key: torch.cat([each.aux[key] for each in rows]) for key in rows[0].aux if rows[0].aux[key].dim()
    }
    scalars = {key: value.double().mean() for key, value in aux.items() if value.dim() == 1}
    return LossOutput(losses.mean(), losses, torch.cat([each.features for each in rows]), scalars)
