"""privacy=statistics: the statistic of a batch released first, and single records' gradients given it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, tiny
from test_methods import STEP, batch_of, job_of, model_of
from torch import Tensor

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.losses import moments
from fedssl.losses.decomposed import Own
from fedssl.method import Batch
from fedssl.privacy.accountant import Release, compose, joint
from fedssl.privacy.coupled.statistics_dp import (
    Given,
    StatisticsDP,
    multipliers,
    remembered,
    shortened,
    slope_of,
    statistic_sum,
)
from fedssl.privacy.example_dp import clipped_gradients
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import Engine, singles, trainable
from fedssl.privacy.record_dp import Planned

Compose = Callable[..., Plan]
NAMES = ("vicreg", "barlow_twins", "spectral", "dino")
every = pytest.mark.parametrize("name", NAMES)
WIDE = StatisticsDP(statistic_norm=1e6, clip_norm=1e6)


class Silent(Noise):
    """No noise at all."""

    def __init__(self) -> None:
        pass

    def like(self, value: Tensor, deviation: float) -> Tensor:
        return torch.zeros_like(value)


class Remembers(Silent):
    """No noise, and the deviations that were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], float]] = []

    def like(self, value: Tensor, deviation: float) -> Tensor:
        self.asked.append((tuple(value.shape), deviation))
        return torch.zeros_like(value)


def case(name: str, n: int = 6, *overrides: str) -> tuple[Any, Any, Batch]:
    """A job, its model in float64 whose centre is not zero, and a batch."""
    options = ("method.norm=group", "encoder.norm=group", *(("method.prototypes=12",) if name == "dino" else ()))
    job = job_of(name, *options, *overrides)
    model = model_of(job).double()
    if name == "dino":
        model["center"].value.copy_(torch.linspace(-0.3, 0.3, 12))
    drawn = batch_of(job, n)
    return job, model, Batch([view.double() for view in drawn.views], drawn.index)


def planned(how: StatisticsDP, n: int, noise_multiplier: float = 1.0) -> Planned:
    return Planned(how, n, 1.0, 1, noise_multiplier, n)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("engine", list(Engine))
@every
def test_without_noise_it_is_the_gradient_of_the_batch(name: str, engine: str) -> None:
    job, model, batch = case(name)
    twin = copy.deepcopy(model)
    expected = torch.autograd.grad(job.method.loss(twin, batch, STEP).loss, trainable(twin), allow_unused=True)
    how = replace(WIDE, engine=engine, micro_batch=4)
    if (name, engine) == ("dino", Engine.hooks):  # its prototypes are no layer that opacus knows
        with pytest.raises(PrivacyError, match=r"prototypes\.weight: use privacy\.engine=vmap"):
            how.noisy_sum(job.method, model, batch, STEP, planned(how, 6), Silent())
        return
    sums, out = how.noisy_sum(job.method, model, batch, STEP, planned(how, 6), Silent())
    whole, found = flat(expected), flat(sums) / 6
    assert (found - whole).norm() <= 1e-10 * whole.norm()
    if name == "dino":
        torch.testing.assert_close(out.aux["mean"], job.method.loss(twin, batch, STEP).aux["mean"], rtol=1e-12, atol=0)


@every
def test_losses_split_as_declared(name: str) -> None:
    """The value too, not the gradient alone; and settling leaves what real records give."""
    job, model, batch = case(name)
    own: Own = job.method.own(model, batch, STEP, 6)
    assert own.statistics.shape == (6, job.method.length)
    s = own.statistics.mean(0)
    assert (own.losses.mean() + job.method.coupled(s, 6)).item() == pytest.approx(
        job.method.loss(model, batch, STEP).loss.item(), rel=1e-10
    )
    torch.testing.assert_close(job.method.settled(s), s, rtol=1e-9, atol=1e-12)
    alone = [job.method.own(model, single, STEP, 6) for single in singles(batch)]
    torch.testing.assert_close(torch.cat([each.statistics for each in alone]), own.statistics)
    torch.testing.assert_close(torch.cat([each.losses for each in alone]), own.losses)


def settings(n: int, views: list[Tensor], kind: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(n, *v.shape[1:], generator=generator, dtype=v.dtype) for v in views]
    if kind == "outlier":
        drawn = [torch.cat([v[:1].expand(n - 1, *v.shape[1:]), 50 * v[-1:]]) for v in drawn]
    return drawn


def gradient_sum(how: StatisticsDP, job: Any, model: Any, batch: Batch, slope: Tensor, n: int) -> Tensor:
    given = Given(job.method, slope, how.statistic_norm, n)
    return flat(clipped_gradients(how, Engine.vmap, given, model, batch, STEP)[0])


@pytest.mark.parametrize("kind", ["random", "outlier"])
@every
def test_a_record_moves_neither_sum_by_more_than_its_bound(name: str, kind: str) -> None:
    job, model, batch = case(name)
    how = StatisticsDP(statistic_norm=0.5, clip_norm=0.1)
    for seed in range(3):
        both = Batch(settings(6, list(batch.views), kind, seed), batch.index)
        less = Batch([v[:-1] for v in both.views], batch.index[:-1])
        sums = [statistic_sum(job.method, model, b, STEP, 6, how) for b in (both, less)]
        assert (sums[0] - sums[1]).norm() <= 0.5 * (1 + 1e-6)
        slope = slope_of(job.method, sums[0] / 6, 6)
        moved = gradient_sum(how, job, model, both, slope, 6) - gradient_sum(how, job, model, less, slope, 6)
        assert moved.norm() <= 0.1 * (1 + 1e-6)
        if kind == "outlier" and name != "dino":
            assert (sums[0] - sums[1]).norm() >= 0.499, "the bound is reached"


@every
def test_no_adversary_finds_more(name: str) -> None:
    """100 steps up the movement of both sums together, by all records of the batch."""
    job, model, batch = case(name, 4)
    how = StatisticsDP(statistic_norm=0.7, clip_norm=0.3)
    parameters = trainable(model)
    views = [v.clone().requires_grad_() for v in settings(4, list(batch.views), "random", 7)]
    climb = torch.optim.Adam(views, lr=0.05)
    slope = torch.randn(job.method.length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    worst = [0.0, 0.0]
    for at in range(100):
        own = job.method.own(model, Batch(views, batch.index), STEP, 4)
        rows = shortened(own.statistics, 0.7)
        each = own.losses[-1] + (rows[-1] * slope).sum()
        grads = torch.autograd.grad(each, parameters, create_graph=True, allow_unused=True)
        length = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
        climb.zero_grad()
        (-(length + rows[-1].norm())).backward()
        climb.step()
        if at % 10 != 9:
            continue
        both = Batch([v.detach() for v in views], batch.index)
        less = Batch([v[:-1] for v in both.views], batch.index[:-1])
        sums = [statistic_sum(job.method, model, b, STEP, 4, how) for b in (both, less)]
        moved = gradient_sum(how, job, model, both, slope, 4) - gradient_sum(how, job, model, less, slope, 4)
        worst = [max(worst[0], float((sums[0] - sums[1]).norm())), max(worst[1], float(moved.norm()))]
    assert worst[0] <= 0.7 * (1 + 1e-6)
    assert 0.29 < worst[1] <= 0.3 * (1 + 1e-6)


def test_both_releases_are_accounted_as_one() -> None:
    for share in (0.01, 0.2, 0.5):
        first, second = multipliers(1.3, share)
        assert joint(first, second) == pytest.approx(1.3, rel=1e-12)
        assert first**-2 == pytest.approx(share * 1.3**-2)
    apart = compose([Release(2.0, 0.01, 1000), Release(2.0, 0.01, 1000)], 1e-5)
    assert compose([Release(joint(2.0, 2.0), 0.01, 1000)], 1e-5) > apart, "two sampled events would claim too little"
    job, model, batch = case("vicreg")
    how = StatisticsDP(statistic_norm=3.0, clip_norm=0.5, statistic_share=0.3)
    noise = Remembers()
    how.noisy_sum(job.method, model, batch, STEP, planned(how, 6, 1.7), noise)
    (shape, first), *others = noise.asked
    assert shape == (job.method.length,)
    assert first == pytest.approx(1.7 / math.sqrt(0.3) * 3.0)
    assert [deviation for _, deviation in others] == pytest.approx([1.7 / math.sqrt(0.7) * 0.5] * len(others))
    assert [s for s, _ in others] == [tuple(p.shape) for p in trainable(model)]
    made = how.planned(100, 10, 1, 3)
    assert made.entry(1, 1, 10).release == Release(made.noise_multiplier, 0.1, 10)
    assert compose([Release(made.noise_multiplier, 0.1, 30)], 1e-5) <= 8


@every
def test_empty_and_single_and_broken_records(name: str) -> None:
    job, model, batch = case(name)
    how = StatisticsDP()

    def found(chosen: Batch, n: int) -> Tensor:
        noise = Noise(np.random.default_rng(0), False, torch.device("cpu"))
        sums, out = how.noisy_sum(job.method, model, chosen, STEP, planned(how, n), noise)
        job.method.after_step(model, out, STEP)
        return flat(sums)

    empty = Batch([], batch.index[:0])
    assert found(empty, 6).isfinite().all()
    assert found(empty, 6).std() == pytest.approx(1 / math.sqrt(0.8), rel=0.2), "noise all the same"
    one = Batch([v[:1] for v in batch.views], batch.index[:1])
    for n in (1, 6):
        assert found(one, n).isfinite().all()
    broken = Batch([torch.cat([v[:2], v[:1] * math.nan]) for v in batch.views], batch.index[:3])
    whole = Batch([v[:2] for v in batch.views], batch.index[:2])
    start = copy.deepcopy(model.state_dict())
    heard = found(broken, 6)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    model.load_state_dict(start)
    torch.testing.assert_close(heard, found(whole, 6))  # as if the broken one were not there


def test_noisy_moments_are_settled() -> None:
    generator = torch.Generator().manual_seed(0)
    for name in NAMES[:3]:
        job, _, _ = case(name)
        noisy = torch.randn(job.method.length, generator=generator, dtype=torch.float64)
        settled = job.method.settled(noisy)
        torch.testing.assert_close(job.method.settled(settled), settled)
        assert slope_of(job.method, noisy, 6).isfinite().all()
        assert job.method.coupled(settled, 6).isfinite()
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moments.positive(matrix)).min() >= -1e-12


def test_memory_is_the_mean_of_what_was_released() -> None:
    held: dict[str, Tensor] = {}
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([0.0, 1.0])]
    found = [remembered(held, value, 0.5) for value in values]
    torch.testing.assert_close(found[0], values[0])
    torch.testing.assert_close(found[2], (0.25 * values[0] + 0.5 * values[1] + values[2]) / 1.75)
    assert remembered({}, values[1], 0.0) is values[1]


@every
def test_the_live_network_is_probed(name: str) -> None:
    job, _, _ = case(name)
    model, train = model_of(job), job.data.load().train
    StatisticsDP().admit(job.method, model, train, job.data.augment)
    normed = job_of(name, "method.norm=group", "encoder.norm=batch")
    with pytest.raises(PrivacyError, match=r"encoder\.norm=group"):
        StatisticsDP().admit(normed.method, model_of(normed), train, normed.data.augment)

    class Coupled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    model["projector"] = torch.nn.Sequential(model["projector"], Coupled())
    if name == "dino":
        model["teacher"] = copy.deepcopy(torch.nn.ModuleDict({k: model[k] for k in ("encoder", "projector")}))
        model["teacher"].requires_grad_(False)
    with pytest.raises(PrivacyError, match="act on each other"):
        StatisticsDP().admit(job.method, model, train, job.data.augment)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_federation_runs(name: str, plan: Compose) -> None:
    memory = ("privacy.memory=0.5",) if name == "vicreg" else ()
    made = plan(f"method={name}", "privacy=statistics", "method.norm=group", "encoder.norm=group", *memory)
    rundir = execute(made)
    said = json.loads((rundir.path / "privacy.json").read_text())
    assert 7 < said["epsilon"] <= 8
    assert "statistics" in said["released"]
    rows = rundir.rows("clients.jsonl")
    assert all("loss" not in row for row in rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("method=simclr",), r"no finite statistic.*method\.norm=group method\.negatives=public data@public=NAME"),
        (("method=byol", "method.norm=group"), r"no finite statistic.*method=vicreg"),
        (("method=vicreg",), r"normalises over the batch in its head: set method\.norm=group"),
        (("method=vicreg", "method.norm=group", "method.balance=adaptive"), r"set method\.balance=fixed"),
        (("method=dino", "method.norm=group", "method.decay_schedule=adaptive"), "decay_schedule=constant"),
        (("method=dino", "method.norm=group", "method.center=none"), "use privacy=example"),
        (("method=vicreg", "method.norm=group", "method.out=129"), r"sqrt\(K\).*method\.out=128"),
        (("method=vicreg", "method.norm=group", "local.decorrelation=0.1"), "no finite statistic"),
        (("method=vicreg", "method.norm=group", "privacy.statistic_share=1.0"), r"in \(0, 1\)"),
        (("method=vicreg", "method.norm=group", "privacy.statistic_norm=0.0"), "no length"),
        (("method=vicreg", "method.norm=group", "privacy.memory=1.0"), r"in \[0, 1\)"),
        (("method=vicreg", "method.norm=group", "privacy.engine=jax"), "engine='jax' is unknown"),
    ],
)
def test_refusals(options: tuple[str, ...], sentence: str) -> None:
    with pytest.raises((PrivacyError, ConfigError), match=sentence):
        config.compose(tiny(*options, "privacy=statistics", "encoder.norm=group"))
