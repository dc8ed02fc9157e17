"""The same training without a federation: one client that holds everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedssl.client import FitResult, fit
from fedssl.job import Job
from fedssl.job.setup import initial_model, public_of
from fedssl.job.shards import parts_of, union_of
from fedssl.model import to_arrays
from fedssl.partition import sizes_of
from fedssl.parts import Arrays


def central(job: Job, train: Any, device: torch.device, tick: Callable[[int, int, FitResult], None]) -> Arrays:
    """Pretrain on the union of all clients' data: same method, initial values and schedule, equal steps and examples.

    One epoch takes as many gradient steps as all clients of the federation together, so its batches are as large as
    theirs on average, and there are as many epochs as a client of the federation has on average: lost turns count for
    nothing, short ones for their share. Both up to rounding. `tick` is called with each finished round, their number,
    and the result.

    Raises:
        PrivacyError: what the job claims of single examples does not hold for this model, as a client would say.
    """
    steps = int((-(-sizes_of(parts_of(job, device)) // job.local.batch_size)).sum())
    local = replace(job.local, batch_size=-(-len(train) // steps))
    turns = (turn for at in range(1, job.federation.rounds + 1) for turn in job.attendance(at).arriving)
    rounds = max(1, round(sum(turn.work for turn in turns) / job.federation.clients))
    model = initial_model(job, train.shape, len(train)).to(device)
    data = union_of(job, device)
    job.privacy.admit(job.method, model, data, job.data.augment)
    gradient = job.privacy.planned(len(train), local.batch_size, local.epochs, rounds)
    for at in range(1, rounds + 1):
        result = fit(
            job.method,
            model,
            data,
            job.data.augment,
            local,
            gradient=gradient,
            round=at,
            rounds=rounds,
            seed=job.seed,
            client=-1,
            public=public_of(job, device),
        )
        tick(at, rounds, result)
    return to_arrays(model)
