"""Gradient inversion on the first step of a run, as a demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.job.setup import build_model
from fedssl.job.shards import shard_of
from fedssl.method import Batch, Step
from fedssl.networks.norms import discard_statistics
from fedssl.privacy.audit.inversion import Inversion, gradient_of, invert, judged
from simulations.audits.target import Run

LARGEST = 4
STEPS = 200  # of the search


def demonstrate(target: Run, batch_size: int) -> Inversion:
    """What a server that knows the augmentation's random numbers sees in one gradient of the first client.

    The gradient is the one that the run's own privacy would send; the model is the one that every client starts with.

    Raises:
        ConfigError: the data are no images, the method reads more than views, or the batch has not 1 to 4 examples.
    """
    job = target.job
    if not 1 <= batch_size <= LARGEST:
        raise ConfigError(f"--inversion {batch_size} is no small batch: give 1 to {LARGEST} examples")
    if job.data.augment.modality != "images" or job.method.reads_public or job.method.local_views:
        raise ConfigError(
            "--inversion shows images of methods that read plain views, which this run's are not: leave it out"
        )
    client = target.participants[0]
    shard = shard_of(job, client, target.device)
    if len(shard) < batch_size:
        raise ConfigError(f"client {client} has {len(shard)} examples, fewer than --inversion {batch_size}: give fewer")
    index = torch.arange(batch_size, device=target.device)
    records: Tensor = shard.batch(index)
    strangers: Tensor = target.data.test.batch(torch.arange(min(64, len(target.data.test)), device=target.device))
    model = build_model(job, target.data.train.shape, len(shard), client).to(target.device)

    def draw(x: Tensor) -> Sequence[Any]:
        generator = seeds.torch_stream(target.seed, "audit", "inversion", "views", device=target.device)
        return job.data.augment.views(x, generator, job.method.views)

    job.privacy.admit(job.method, model, shard, job.data.augment)
    local = job.local
    transform = job.privacy.planned(len(shard), local.batch_size, local.epochs, job.rounds_of(client))
    gradient_of(job.method, model, draw(records))  # refuses what cannot be differentiated so, before the search
    model.zero_grad(set_to_none=True)
    noise = seeds.stream(target.seed, "audit", "inversion", "noise")
    transform.backward(job.method, model, Batch(list(draw(records)), index), Step(1, 1, 0, 1), noise)
    discard_statistics(model)
    sent = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    generator = seeds.torch_stream(target.seed, "audit", "inversion", "guess", device=target.device)
    found = invert(job.method, model, sent, draw, tuple(records.shape), steps=STEPS, generator=generator)
    return judged(found, records, strangers)
