"""Activation checkpointing trains the very same model in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import assert_same
from test_methods import CASES, batch_of, fit_one, job_of, model_of
from torch import Tensor, nn

from fedssl import config
from fedssl.cohort.together import train_together
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.method import Step
from fedssl.model import to_arrays
from fedssl.networks.norms import norm2d
from fedssl.networks.recompute import recomputing
from fedssl.parts import Arrays

BATCH_NORM = ("encoder.norm=batch",)


def trained(job: Job, *, checkpointing: bool) -> Arrays:
    model = model_of(job)
    fit_one(job, model, local=replace(job.local, checkpointing=checkpointing))
    assert not any("forward" in vars(module) for module in model.modules())
    return to_arrays(model)


@pytest.mark.parametrize(("name", "modality"), [case for case in CASES if case[1] == "images" or case[0] == "simclr"])
def test_every_method_trains_to_the_same_bits(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    assert_same(trained(job, checkpointing=True), trained(job, checkpointing=False))


@pytest.mark.parametrize(
    ("name", "modality", "options"),
    [
        ("byol", "images", BATCH_NORM),
        ("simclr", "timeseries", BATCH_NORM),
        ("simclr", "graphs", BATCH_NORM),
        ("simclr", "images", ("local.precision=bf16",)),
        ("vicreg", "images", ("local.decorrelation=0.1",)),
    ],
)
def test_statistics_and_roundings_are_those_of_one_pass(name: str, modality: str, options: tuple[str, ...]) -> None:
    job = job_of(name, *options, modality=modality)
    once = trained(job, checkpointing=False)
    assert_same(trained(job, checkpointing=True), once)
    counts = [key for key in once if key.startswith("encoder.") and key.endswith("num_batches_tracked")]
    assert (options == BATCH_NORM) == bool(counts)


def test_networks_of_blocks_and_of_none() -> None:
    job = config.compose(
        [
            *("data=synthetic", "data.train=60", "data.test=30", "data.size=8", "local.batch_size=8", "device=cpu"),
            *("encoder=resnet18", "encoder.width=4", "encoder.norm=batch", "method.hidden=16"),
        ]
    ).job
    assert_same(trained(job, checkpointing=True), trained(job, checkpointing=False))

    class Whole(nn.Module):
        """Neither a sequence nor a list."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), norm2d("batch", 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).relu().mean((2, 3))

    x = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    whole, found = Whole(), []
    for again in (False, True):
        whole.zero_grad()
        if again:
            with recomputing(whole):
                whole(x).square().sum().backward()
        else:
            whole(x).square().sum().backward()
        found.append({key: p.grad.numpy().copy() for key, p in whole.named_parameters() if p.grad is not None})
    assert_same(*found)
    assert len(whole.norm._pending) == 2  # one of each pass forward


def kept(job: Job, *, checkpointing: bool) -> int:
    """Bytes that the graph of a loss holds, the inputs of blocks among them."""
    model, batch, held = model_of(job), batch_of(job, 16), {}

    def note(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()  # kept, so that no place is used twice
        return x

    def note_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        note(inputs[0])

    encoder = model["encoder"]
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(note_inputs) for m in convolutions]  # each begins a block
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        if checkpointing:
            with recomputing(encoder):
                job.method.loss(model, batch, Step(1, 1, 0, 1))
        else:
            job.method.loss(model, batch, Step(1, 1, 0, 1))
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in held.values())


def test_less_is_kept() -> None:
    job = job_of("simclr", "data.size=16", "encoder.width=16")
    assert kept(job, checkpointing=True) < 0.5 * kept(job, checkpointing=False)


def test_with_gradient_caching() -> None:
    job = job_of("byol")
    model, other = model_of(job), model_of(job)
    gradient, batch, step = PlainGradient(micro_batch=3), batch_of(job, 8), Step(1, 1, 0, 1)
    gradient.backward(job.method, model, batch, step, None)  # type: ignore[arg-type]  # draws nothing
    with recomputing(other["encoder"]):
        gradient.backward(job.method, other, batch, step, None)  # type: ignore[arg-type]
    for (key, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), key  # type: ignore[arg-type]


def test_clients_that_recompute_train_one_by_one() -> None:
    from test_cohort import job_of as unequal
    from test_cohort import trainings

    job = unequal("simclr", "local.checkpointing=true")
    alone, at_once = trainings(job, precise=False), trainings(job, precise=False)
    for one in alone:
        one.begin()
        one.run()
    for one in at_once:
        one.begin()
    assert train_together(at_once) == [None] * len(at_once)
    for one, other in zip(alone, at_once, strict=True):
        assert_same(to_arrays(one.model), to_arrays(other.model))


@pytest.mark.parametrize("privacy", ["example", "groups"])
def test_gradients_of_single_records_are_refused(privacy: str) -> None:
    options = {"example": ("method=byol", "method.norm=layer"), "groups": ("method=simclr", "method.norm=layer")}
    with pytest.raises(ConfigError, match=r"local\.checkpointing=true runs layers again.*micro_batch"):
        config.compose([f"privacy={privacy}", *options[privacy], "local.checkpointing=true"]).job.check()
