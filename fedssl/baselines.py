"""The same training without a federation: one client that holds everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedssl.client import fit
from fedssl.job import Job
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from fedssl.setup import build_model


@dataclass(frozen=True)
class _Everything:
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> Tensor:
        images: Tensor = self.data.batch(index)
        return images


def central(job: Job, train: Any, device: torch.device, tick: Callable[[int], None]) -> Arrays:
    """Pretrain on the union of all clients' data with the same method, epochs, schedule and initial values.

    It takes as many gradient steps as all clients of the federation together (up to each client's rounding of its last
    batch, and times the fraction of clients that takes part). `tick` is called with each finished round.
    """
    model = build_model(job, train.channels, len(train)).to(device)
    rounds = job.federation.rounds
    for round in range(1, rounds + 1):
        fit(
            job.method,
            model,
            _Everything(train),
            job.data.augment,
            job.local,
            gradient=job.gradient,
            round=round,
            rounds=rounds,
            seed=job.seed,
            client=-1,
        )
        tick(round)
    return to_arrays(model)
