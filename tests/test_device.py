"""Training on another device than the CPU: the same values, everything in its place, and no step that waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, tiny
from second_device import THERE, Distant, second_device
from test_methods import every_case

from fedssl import config
from fedssl.client import Training
from fedssl.cohort.together import train_together
from fedssl.job import Job
from fedssl.job.setup import build_model, data_of, public_of
from fedssl.job.shards import shard_of
from fedssl.model import load_arrays, tensors, to_arrays

CPU = torch.device("cpu")
SHAPES = ("aten.index.Tensor in graphs.py", "aten.repeat_interleave.Tensor in table.py")  # how many nodes are chosen
PUBLIC = ("method.negatives=public", "method.public_batch=4", "data@public=synthetic", "public.size=8")


def job_of(method: str, *options: str, modality: str = "images") -> Job:
    return config.compose(tiny(f"method={method}", *options, modality=modality)).job


def begun(job: Job, device: torch.device, clients: int = 1) -> list[Training]:
    """Clients of a job before their first step."""
    found = []
    for client in range(clients):
        shard = shard_of(job, client, device)
        model = build_model(job, data_of(job, device).train.shape, len(shard), client).to(device)
        public = public_of(job, device) if job.method.reads_public else None
        gradient = job.privacy.planned(len(shard), job.local.batch_size, job.local.epochs, 2)
        training = Training(
            job.method, model, shard, job.data.augment, job.local, gradient=gradient, round=1, rounds=2, seed=job.seed,
            client=client, public=public,
        )  # fmt: skip
        training.begin()
        found.append(training)
    return found


def one_by_one(trainings: list[Training]) -> None:
    for training in trainings:
        training.run()


def at_once(trainings: list[Training]) -> None:
    assert train_together(trainings) == [None] * len(trainings)


def run_there(job: Job, run: Callable[[list[Training]], None] = one_by_one, clients: int = 1) -> list[str]:
    """Where the CPU waits in the steps of an epoch, the second of its kind; its values are those of the CPU's."""
    with second_device() as device:
        run(begun(job, THERE, clients))  # what is sent to the device once is there now
        trainings = begun(job, THERE, clients)
        with device.watched():
            run(trainings)
        states = [{name: value.cpu() for name, value in tensors(one.model)} for one in trainings]
    alike = begun(job, CPU, clients)
    run(alike)
    for one, state in zip(alike, states, strict=True):
        for name, value in tensors(one.model):
            assert torch.equal(state[name], value.detach()), name
        assert math.isfinite(one.result().loss)
    return list(device.waits)


@every_case
def test_no_step_of_any_method_waits_for_the_device(name: str, modality: str) -> None:
    waits = run_there(job_of(name, modality=modality))
    assert [line for line in waits if modality != "graphs" or not line.startswith(SHAPES)] == []


@pytest.mark.parametrize(
    ("method", "options", "modality"),
    [
        ("simclr", ("local.optimizer=sgd", "local.clip_norm=1", "local.checkpointing=true"), "images"),
        ("simclr", ("privacy.micro_batch=2", "local.decorrelation=0.1"), "images"),
        ("simclr", PUBLIC, "images"),
        ("dino", ("method.local_views=2", "data.augment.blur=0.5", "data.augment.noise=0.1"), "images"),
        ("byol", ("method.decay_schedule=adaptive", "data.augment.rotation=20", "encoder.norm=batch"), "images"),
        (
            "simclr",
            (
                *("data.augment.permutation=0.5", "data.augment.warp=0.2", "data.augment.frequency_mask=0.2"),
                *("data.augment.time_mask=0.2", "data.augment.normalise=constants", "data.augment.flip=0.5"),
            ),
            "timeseries",
        ),
    ],
)  # fmt: skip
def test_no_option_makes_a_step_wait(method: str, options: tuple[str, ...], modality: str) -> None:
    assert run_there(job_of(method, *options, modality=modality)) == []


@pytest.mark.parametrize("method", ["simclr", "byol", "moco", "dino", "instance", "calibre", "flesd"])
def test_no_step_of_a_cohort_waits(method: str) -> None:
    """Its clients take 2, 3 and 3 steps, so some steps are those of some clients."""
    assert run_there(job_of(method, "local.optimizer=adamw"), at_once, clients=3) == []


def test_private_steps_run_there_and_wait_for_the_lengths_of_gradients_alone() -> None:
    job = job_of("byol", "privacy=example", "method.norm=layer", "privacy.noise_multiplier=1")
    assert all("per_record.py" in line and "bool(" in line for line in run_there(job))


def test_a_model_comes_and_goes_with_two_waits_for_each_type_of_its_arrays() -> None:
    """Parameters in float32, counters of batch normalisation in int64."""
    model = build_model(job_of("byol"), (1, 8, 8))
    arrays = {name: np.asarray(value * 3 + 1) for name, value in to_arrays(model).items()}
    with second_device() as device:
        there = build_model(job_of("byol"), (1, 8, 8)).to(THERE)
        with device.watched():
            load_arrays(there, arrays)
            back = to_arrays(there)
        some = to_arrays(there, ["encoder.0.weight"])
    assert sum(device.waits.values()) == 4
    assert list(back) == list(arrays)
    assert_same(back, arrays)
    assert_same(some, {"encoder.0.weight": arrays["encoder.0.weight"]})


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x[x.argmax()],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.ones(3).to(x),
        lambda x: torch.linalg.inv(torch.diag(x)),
    ],
)
def test_the_device_notices_whoever_waits(wait: Callable[[torch.Tensor], Any]) -> None:
    with second_device() as device:
        x = torch.rand(3, device=THERE)
        with device.watched():
            torch.ones_like(x).mul_(x).sum()
        assert not device.waits
        with device.watched():
            wait(x)
        assert device.waits


def test_the_device_computes_and_refuses_tensors_of_another() -> None:
    with second_device():
        x = torch.arange(3.0).to(THERE).requires_grad_()
        (x * x).sum().backward()
        assert isinstance(x.grad, Distant)
        assert x.grad.device == THERE
        assert torch.equal(x.grad.cpu(), torch.tensor([0.0, 2.0, 4.0]))
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)
