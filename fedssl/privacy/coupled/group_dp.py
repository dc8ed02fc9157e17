"""DP-SGD over disjoint groups: records meet inside their group only, whose gradient is clipped as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedssl.errors import ConfigError, PrivacyError
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling
from fedssl.privacy import contract, coupling, sampling
from fedssl.privacy.coupled import groups
from fedssl.privacy.example_dp import collected
from fedssl.privacy.noise import Noise, secure_rng
from fedssl.privacy.per_record import Records, clipped_sum, trainable
from fedssl.privacy.record_dp import Planned, RecordDP
from fedssl.privacy.statement import Declared


class Scheme(StrEnum):
    """How records come together. A shuffled sample cut into chunks is none: one record less moves all later chunks."""

    slots = auto()  # a fixed table of slots, groups of it sampled: one record moves the sum by clip_norm
    labels = auto()  # each sampled record draws a label, each step anew: by twice clip_norm


@dataclass(frozen=True)
class GroupDP(RecordDP):
    """Sum of the groups' clipped gradients plus noise: any loss that keeps nothing beyond its batch.

    A group contributes the gradient of the method's own loss over its members, times members / size, clipped to
    `clip_norm` C. How far one record moves the sum:

    - slots: the client's n slots are put into groups by a random permutation of each round, which looks at no record,
      and whole groups are sampled. Neighbours differ in one slot being empty; a group with an empty slot contributes
      nothing, all others are the same: at most C. That the table has n slots is public.
    - labels: records are sampled one by one and each draws one of round(expected records / size) labels. Given the
      labels, a record less changes one group only, from one vector of at most C to another: at most 2 C.

    The price against losses of single records is a signal that is `size` times smaller beside the same noise. After
    disjoint groups in DP-GCL (https://arxiv.org/abs/2604.26467).

    Attributes:
        size: records in a group, at least 2; with labels, on average.
        scheme: slots or labels.
        engine: vmap, or loop for networks that vmap cannot trace.
        micro_batch: records whose activations are held at once, rounded to whole groups.
    """

    size: int = 8
    scheme: str = "slots"
    engine: str = "vmap"
    ENGINES: ClassVar[tuple[str, ...]] = ("vmap", "loop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2:
            raise ConfigError(
                f"privacy.size={self.size} leaves each record alone: give at least 2, or use privacy=example"
            )
        for name, value, known in (("scheme", self.scheme, list(Scheme)), ("engine", self.engine, self.ENGINES)):
            if value not in known:
                chunks = "; a shuffled batch cut into chunks has no proof" if name == "scheme" else ""
                raise ConfigError(f"privacy.{name}={value!r} is unknown: use {' or '.join(known)}{chunks}")

    @property
    def sensitivity(self) -> float:
        """How far one record moves the sum of the groups' clipped gradients."""
        return self.clip_norm if self.scheme == Scheme.slots else 2 * self.clip_norm

    @property
    def released(self) -> str:
        """In words."""
        return (
            f"the sum of the clipped gradients of disjoint groups of {self.size} records with Gaussian noise, each "
            "step; all that is sent follows from it"
        )

    @property
    def declared(self) -> Declared:
        """What is claimed; slots have a relation and a sampler of their own."""
        base = super().declared
        if self.scheme == Scheme.labels:
            return replace(base, sampler=f"{base.sampler}, each record with a group's label of its own")
        return replace(
            base,
            relation="one record of one client there, or its slot empty",
            sampler=f"{base.sampler}, in whole groups",
            public=("the number of slots of each client, which its neighbours share",),
        )

    def check(self, method: SSLMethod) -> None:
        """Raise a PrivacyError if something of a record outlives its batch by the method's word."""
        contract.check_stateless(method, "groups")

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Raise a PrivacyError if it does so in the live network.

        That groups do not act on each other needs no probe: each loss is computed from its members alone.
        """
        contract.check_network(model, method)
        inputs = coupling.inputs(examples, augment, method)
        coupling.probe_state(method, model, inputs, augment)
        if self.scheme == Scheme.labels and not all(isinstance(view, Tensor) for view in inputs[0].views):
            raise PrivacyError(
                f"the {augment.modality} of this run can be cut but not regrouped, and labels put records together "
                "that are apart: use privacy.scheme=slots"
            )

    def planned(self, n: int, batch_size: int, epochs: int, rounds: float) -> Planned:
        """The numbers for one client; with slots it samples groups."""
        base = super().planned(n, batch_size, epochs, rounds)
        if self.scheme == Scheme.labels:
            return base
        return Slots(self, n, base.sample_rate, base.steps, base.noise_multiplier, base.divisor, base.planned_steps)

    def noisy_sum(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, planned: Planned, noise: Noise
    ) -> tuple[list[Tensor], LossOutput]:
        """Some groups at a time; `size` times the sum, so that it is on the scale of records, as the divisor is."""
        sums = [torch.zeros_like(p) for p in trainable(model)]
        seen: list[Records] = []
        for rows in self._groups(method, batch, planned, noise):
            share = rows.shape[1] / self.size
            at_once = max(1, self.micro_batch // rows.shape[1])
            for records in groups.gradients(
                method, model, batch, step, rows, share, at_once=at_once, vectorised=self.engine == "vmap"
            ):
                for total, own in zip(sums, clipped_sum(records.gradients, self.clip_norm), strict=True):
                    total += own
                seen.append(Records([], records.losses, records.features, {}))
        deviation = planned.noise_multiplier * self.sensitivity
        noisy = [(total + noise.like(total, deviation)) * self.size for total in sums]
        return noisy, replace(collected(seen, model), per_example=None)

    def _groups(self, method: SSLMethod, batch: Batch, planned: Planned, noise: Noise) -> Iterator[Tensor]:
        """(G, size) positions, for each size of groups. Alone, a record of a coupled loss has nothing to meet."""
        count = len(batch.index)
        if not count:
            return
        if self.scheme == Scheme.slots:
            yield torch.arange(count, device=batch.index.device).view(-1, self.size)
            return
        bins = max(1, round(planned.divisor / self.size))
        least = 1 if method.coupling is Coupling.none else 2
        for size, rows in groups.members(groups.labels(count, bins, noise, batch.index.device)).items():
            if size >= least:
                yield rows


@dataclass(frozen=True)
class Slots(Planned):
    """A client's numbers with groups of slots: it samples groups, and yields their members one group after another."""

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """Poisson samples of the groups of complete slots."""
        chosen = secure_rng() if self.mechanism.secure else rng
        size = self.mechanism.size if isinstance(self.mechanism, GroupDP) else 1
        table = torch.from_numpy(groups.slots(np.ones(n, dtype=bool), size, chosen))
        for sample in sampling.poisson(len(table), self.sample_rate, self.steps, chosen):
            yield table[sample].flatten()
