"""Faster steps are the same steps within rounding; what needs a GPU is looked at where there is one."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from conftest import tiny
from test_cohort import job_of, trainings

from fedssl import config
from fedssl.client import Training, fit
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.job.setup import build_model, data_of
from fedssl.job.shards import shard_of
from fedssl.model import tensors
from fedssl.networks.acceleration import accelerate

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")


def trained(job: Job) -> tuple[Training, dict[str, torch.Tensor]]:
    """The first client of a job after its steps, in float64."""
    first = trainings(job)[0]
    first.run()
    assert math.isfinite(first.result().loss)
    return first, {name: value.detach() for name, value in tensors(first.model)}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("method", "encoder"), [("dino", "conv4"), ("byol", "resnet18")])
def test_channels_last_moves_bytes_and_no_values(method: str, encoder: str) -> None:
    options = (f"encoder={encoder}", "encoder.norm=batch") if encoder == "resnet18" else ()
    _, expected = trained(job_of(method, *options))
    training, found = trained(job_of(method, *options, "local.channels_last=true"))
    kernels = [p for p in training.model["encoder"].parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert_close(found, expected, 1e-10)


@needs_compiler
@pytest.mark.filterwarnings("default")  # those of torch's own compiler
@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps() -> None:
    options = ("partition=iid", "federation.clients=4", "method.norm=layer", "local.epochs=1")  # compiled once
    _, expected = trained(job_of("simclr", *options))
    training, found = trained(job_of("simclr", *options, "local.compiled=true"))
    assert training.model["encoder"]._compiled_call_impl is not None
    assert_close(found, expected, 1e-7)
    accelerate(training.model)
    assert training.model["encoder"]._compiled_call_impl is None


def test_without_a_compiler_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"there is none here: install g\+\+"):
        trainings(job_of("simclr", "local.compiled=true"))


def test_gradients_of_single_records_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="gradients of single records are not compiled"):
        config.compose(tiny("method=simclr", "privacy=example", "local.compiled=true")).job.check()


def test_what_is_compiled_is_not_checkpointed() -> None:
    with pytest.raises(ConfigError, match="use one of them"):
        config.compose(tiny("method=simclr", "local.checkpointing=true", "local.compiled=true")).job.check()


def on_gpu(job: Job, **options: Any) -> Training:
    """The first client of a job on the GPU, one epoch taken, so that nothing is done for the first time any more."""
    device = torch.device("cuda")
    data, shard = data_of(job, device), shard_of(job, 0, device)
    model = build_model(job, data.train.shape, len(shard)).to(device)
    own = {"gradient": PlainGradient(), "round": 1, "rounds": 2, "seed": 0, "client": 0, **options}
    fit(job.method, model, shard, job.data.augment, job.local, **own)
    return Training(job.method, model, shard, job.data.augment, job.local, **own)


@needs_gpu
@pytest.mark.parametrize("method", ["simclr", "byol", "moco", "dino"])
def test_nothing_waits_for_the_gpu_inside_an_epoch(method: str) -> None:
    training = on_gpu(config.compose(tiny(f"method={method}", "device=cuda")).job)
    training.begin()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(training.result().loss)


@needs_gpu
@pytest.mark.parametrize("option", ["local.channels_last=true", "local.precision=bf16", "local.compiled=true"])
def test_faster_steps_on_the_gpu_end_near_the_plain_ones(option: str) -> None:
    results = []
    for options in ((), (option,)):
        training = on_gpu(config.compose(tiny("method=simclr", "device=cuda", "local.optimizer=sgd", *options)).job)
        training.begin()
        training.run()
        results.append(training.result().loss)
    assert results[1] == pytest.approx(results[0], rel=0.05)
