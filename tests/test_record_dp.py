"""Record-level DP: each record's own gradient, a sum that one record moves by C at most, and what has no proof."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import interrupted
from torch import Tensor, nn

from fedssl import config, seeds
from fedssl.aggregation.noise import Noise as ClientNoise
from fedssl.client import Training
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.job.setup import build_model, data_of
from fedssl.job.shards import shard_of
from fedssl.method import Batch, SSLMethod, Step
from fedssl.methods.byol import BYOL
from fedssl.methods.dino import DINO
from fedssl.methods.mae import MaskedAutoencoder
from fedssl.methods.simclr import SimCLR
from fedssl.methods.simsiam import SimSiam
from fedssl.methods.vicreg import VICReg
from fedssl.model import Model
from fedssl.privacy import contract, coupling, per_record, sampling
from fedssl.privacy.accountant import epsilon
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.noise import Noise, secure_normal
from fedssl.privacy.per_record import clipped_sum, dense, norms
from fedssl.privacy.spending import agree, pay

STEP = Step(1, 2, 0, 2)
Compose = Callable[..., Plan]
ALONE: dict[str, SSLMethod] = {
    "byol": BYOL(norm="group", hidden=16, out=8),
    "simsiam": SimSiam(norm="layer", hidden=16, out=8),
    "mae": MaskedAutoencoder(norm="group", hidden=16),
    "dino": DINO(norm="group", hidden=16, out=8, center="none", local_views=2),
}


def made(method: SSLMethod, seed: int = 0) -> Model:
    """A small network of a method in float64."""
    name = {"MaskedAutoencoder": "mae"}.get(type(method).__name__, type(method).__name__.lower())
    job = config.compose([*tiny(f"method={name}")]).job
    job.__dict__["method"] = method
    model = build_model(job, (1, 8, 8), 20).double().train()
    with torch.no_grad():  # a student that has left its teacher
        for p in per_record.trainable(model):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    return model


def drawn(method: SSLMethod, n: int, seed: int = 0) -> Batch:
    """Random views, small crops among them where the method wants them."""
    generator = torch.Generator().manual_seed(seed)
    sides = [8] * (method.views + method.local_views)
    views = [torch.rand((n, 1, side, side), generator=generator, dtype=torch.float64) for side in sides]
    return Batch(views, torch.arange(n))


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("engine", ["ghost", "vmap", "hooks"])
def test_every_engine_finds_the_gradients_of_records_alone(name: str, engine: str) -> None:
    method, n = ALONE[name], 5
    model, batch = made(method), drawn(method, n)
    if (name, engine) == ("dino", "hooks"):
        with pytest.raises(PrivacyError, match="no gradient for each record at projector.prototypes"):
            per_record.by_hooks(method, model, batch, STEP)
        return
    expected = per_record.by_loop(method, model, batch, STEP)
    found = per_record.by_engine(per_record.Engine(engine), method, model, batch, STEP)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(dense(one), other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms(found.gradients), norms(expected.gradients), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-10, atol=1e-12)
    assert any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU)), "hooks put it back"


@pytest.mark.parametrize("name", ALONE)
def test_the_sum_of_the_records_is_the_gradient_of_the_batch(name: str) -> None:
    method = ALONE[name]
    model, batch = made(method), drawn(method, 4)
    total = [g.sum(0) for g in per_record.by_vmap(method, model, batch, STEP).gradients]
    (method.loss(model, batch, STEP).loss * 4).backward()
    for parameter, own in zip(per_record.trainable(model), total, strict=True):
        torch.testing.assert_close(torch.zeros_like(own) if parameter.grad is None else parameter.grad, own)


class OneScalar(SSLMethod):
    """A loss with a learnable scalar, whose gradient can be as long as an input says."""

    views = 1
    parts = BYOL().parts[:1]
    coupling = BYOL(norm="group").coupling

    def init(self, encoder: nn.Module, sizes: Any) -> Model:
        scale = nn.Module()
        scale.register_parameter("scale", nn.Parameter(torch.ones(())))
        return nn.ModuleDict({"encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "head": scale})

    def loss(self, model: Model, batch: Batch, step: Step) -> Any:
        from fedssl.method import LossOutput

        h = model["encoder"](batch.views[0])
        each = (model["head"].scale * h).square().sum(1)
        return LossOutput(each.mean(), each, h, {})


def moved(method: SSLMethod, model: Model, batch: Batch, clip: float, engine: str = "ghost") -> float:
    """How far the clipped sum moves when the last record goes."""
    whole, rest = (
        clipped_sum(per_record.by_engine(per_record.Engine(engine), method, model, each, STEP).gradients, clip)
        for each in (batch, Batch([view[:-1] for view in batch.views], batch.index[:-1]))
    )
    return float(torch.stack([(a - b).square().sum() for a, b in zip(whole, rest, strict=True)]).sum().sqrt())


def outlier(batch: Batch) -> Batch:
    """Equal records beside one that is unlike them: where coupled losses move most."""
    n = len(batch.index)
    views = [torch.cat([view[:1].expand(n - 1, *view.shape[1:]), 40 * view[-1:] - 20]) for view in batch.views]
    return replace(batch, views=views)


@pytest.mark.parametrize("name", [*ALONE, "scalar"])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("engine", ["ghost", "vmap"])
def test_a_record_moves_the_sum_by_the_clip_norm_at_most(name: str, clip: float, engine: str) -> None:
    method = OneScalar() if name == "scalar" else ALONE[name]
    model = method.init(nn.Identity(), None).double() if name == "scalar" else made(method)  # type: ignore[arg-type]
    for seed in range(3):
        batch = drawn(method, 8, seed)
        for each in (batch, outlier(batch)):
            assert moved(method, model, each, clip, engine) <= clip * (1 + 1e-6)


def test_a_record_that_is_searched_for_moves_the_sum_no_further() -> None:
    method = ALONE["byol"]
    model, batch = made(method), drawn(ALONE["byol"], 6)
    views = [view.clone().requires_grad_() for view in batch.views]
    optimizer = torch.optim.Adam(views, lr=0.1)
    furthest = 0.0
    for _ in range(40):
        now = replace(batch, views=views)
        furthest = max(furthest, moved(method, model, replace(batch, views=[v.detach() for v in views]), 0.5))
        lengths = norms(per_record.by_vmap(method, model, now, STEP).gradients)
        optimizer.zero_grad()
        (-lengths[-1]).backward()  # the longest gradient there is
        optimizer.step()
    assert 0.49 < furthest <= 0.5 * (1 + 1e-6), "the bound is reached and holds"


def test_views_are_clipped_together_and_not_each() -> None:
    """The broken mode: two views as two records let one record move the sum by nearly twice the clip norm."""
    method, clip = ALONE["byol"], 1e-3
    model, batch = made(method), drawn(ALONE["byol"], 4)

    def half(k: int) -> Callable[[Batch], Tensor]:
        def loss(alone: Batch) -> Tensor:
            _, z = (
                [model["encoder"](v) for v in alone.views],
                [model["projector"](model["encoder"](v)) for v in alone.views],
            )
            p = model["predictor"](z[k])
            t = model["teacher"]["projector"](model["teacher"]["encoder"](alone.views[1 - k]))  # type: ignore[index]
            return -nn.functional.cosine_similarity(p, t.detach()).sum()

        return loss

    def per_view(batch: Batch) -> list[Tensor]:
        total: list[Tensor] = []
        for alone in per_record.singles(batch):
            for k in (0, 1):
                parameters = per_record.trainable(model)
                own = torch.autograd.grad(half(k)(alone), parameters)
                clipped = clipped_sum([g[None] for g in own], clip)
                total = clipped if not total else [a + b for a, b in zip(total, clipped, strict=True)]
        return total

    same = replace(batch, views=[batch.views[0], batch.views[0]])  # two equal views pull the same way
    whole, rest = per_view(same), per_view(Batch([v[:-1] for v in same.views], same.index[:-1]))
    broken = float(torch.stack([(a - b).square().sum() for a, b in zip(whole, rest, strict=True)]).sum().sqrt())
    assert broken > 1.9 * clip
    assert moved(method, model, same, clip) <= clip * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_a_record_that_is_no_number_counts_as_none(n: int, clip: float, bad: float) -> None:
    generator = torch.Generator().manual_seed(n)
    gradients = [torch.randn(n, 3, 2, generator=generator), torch.randn(n, generator=generator)]
    broken = [torch.cat([g, torch.full_like(g[:1], bad)]) for g in gradients]
    clean, summed = clipped_sum(gradients, clip), clipped_sum(broken, clip)
    moved = float(torch.stack([(a - b).square().sum() for a, b in zip(clean, summed, strict=True)]).sum().sqrt())
    assert all(total.isfinite().all() for total in summed)
    assert moved <= clip * (1 + 1e-5)


def planned(**options: Any) -> Any:
    dp = ExampleDP(**{"epsilon": None, "noise_multiplier": 1.0, **options})
    return dp.planned(20, 5, 1, 2)


def test_an_empty_sample_is_a_step_of_noise() -> None:
    method, model = ALONE["byol"], made(ALONE["byol"])
    transform = planned(clip_norm=2.0)
    empty = Batch([], torch.zeros(0, dtype=torch.int64))
    out = transform.backward(method, model, empty, STEP, seeds.stream(0, "noise"))
    values = torch.cat([p.grad.flatten() for p in per_record.trainable(model) if p.grad is not None])
    assert len(values) == sum(p.numel() for p in per_record.trainable(model)), "noise on all that is trained"
    deviation = 1.0 * 2.0 / 5  # multiplier * clip norm / public divisor
    chi = float((values / deviation).square().sum())
    assert abs(chi - len(values)) < 5 * (2 * len(values)) ** 0.5
    assert (len(out.features), float(out.loss)) == (0, 0.0)


@pytest.mark.parametrize(
    ("privacy", "method"), [("example", "byol"), ("pairs", "simclr"), ("groups", "simclr"), ("statistics", "vicreg")]
)
def test_a_client_whose_last_sample_is_empty_ends_its_round(privacy: str, method: str) -> None:
    few = ("method.norm=layer", "privacy.noise_multiplier=1", "privacy.sample_rate=0.02", "federation.clients=1")
    job = config.compose(tiny(f"method={method}", f"privacy={privacy}", *few)).job
    cpu = torch.device("cpu")
    shard = shard_of(job, 0, cpu)
    ends: set[bool] = set()
    for seed in range(40):
        model = build_model(job, data_of(job, cpu).train.shape, len(shard))
        gradient = job.privacy.planned(len(shard), 8, 1, 2)
        training = Training(
            job.method, model, shard, job.data.augment, job.local, gradient=gradient, round=1, rounds=2, seed=seed,
            client=0,
        )  # fmt: skip
        empty = not len(training.batches[-1])
        if empty not in ends:
            training.begin()
            training.run()
            assert math.isfinite(training.result().feature_std)
            ends.add(empty)
        if len(ends) == 2:
            break
    assert ends == {True, False}


@pytest.mark.parametrize(
    "options",
    [
        ("method=simclr", "privacy=groups"),
        ("method=byol", "privacy=example", "privacy.engine=vmap"),
        ("method=vicreg", "privacy=statistics", "privacy.engine=vmap"),
    ],
    ids=lambda options: options[1],
)
def test_gradients_of_single_records_are_found_in_half_precision(options: tuple[str, ...], plan: Compose) -> None:
    """Torch's own layer normalisation mixes types there."""
    half = ("method.norm=layer", "local.precision=bf16", "privacy.noise_multiplier=1", "federation.rounds=1")
    assert execute(plan(*options, *half)).rows()[0]["failures"] == 0


def test_noise_is_never_used_twice() -> None:
    like = torch.zeros(50)
    rng = seeds.stream(0, "client", 0)
    first, second = Noise(rng, False, torch.device("cpu")), Noise(rng, False, torch.device("cpu"))
    drawn = [first.like(like, 1.0), first.like(like, 1.0), second.like(like, 1.0), second.like(like, 1.0)]
    others = Noise(seeds.stream(0, "client", 1), False, torch.device("cpu")).like(like, 1.0)
    again = Noise(seeds.stream(0, "client", 0), False, torch.device("cpu")).like(like, 1.0)
    assert torch.equal(again, drawn[0]), "a seeded run repeats"
    values = torch.stack([*drawn, others])
    assert (values.corrcoef() - torch.eye(5)).abs().max() < 0.5
    assert len({tuple(row.tolist()) for row in values}) == 5
    secure = [Noise(seeds.stream(0, "client", 0), True, torch.device("cpu")).like(torch.zeros(4000), 2.0) for _ in "ab"]
    assert not torch.equal(*secure)
    assert 1.9 < float(secure[0].std()) < 2.1
    assert abs(float(np.mean(secure_normal(4000)))) < 0.1
    assert 0.95 < float(np.std(secure_normal(4000))) < 1.05


def test_every_secure_value_is_the_sum_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of records and of clients: a single one would show how floating-point numbers are spaced around the secret."""
    calls: list[bytes] = []
    genuine = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: calls.append(genuine(count)) or calls[-1])
    for draw in (
        lambda: (
            Noise(seeds.stream(0, "client", 0), True, torch.device("cpu"))
            .like(torch.zeros(5, dtype=torch.float64), 1.0)
            .numpy()
        ),
        lambda: ClientNoise(0, secure=True).normal((5,), "round", 1),
    ):
        calls.clear()
        value = draw()
        assert len(calls) == 4
        words = [np.frombuffer(call, np.uint64).reshape(2, 5) for call in calls]
        uniform = [((word >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53 for word in words]
        each = [np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v) for u, v in uniform]
        np.testing.assert_allclose(value, np.sum(each, 0) / 2, rtol=1e-12)


def test_samples_are_poisson_and_their_number_is_public() -> None:
    n, rate, count = 40, 0.25, 2000
    counts = np.zeros((count, n))
    for i, index in enumerate(sampling.poisson(n, rate, count, seeds.stream(0, "order"))):
        counts[i, index.numpy()] = 1
    assert abs(counts.mean() - rate) < 0.01
    assert np.abs(np.corrcoef(counts.T) - np.eye(n)).max() < 0.12, "records come independently"
    assert counts.sum(1).std() == pytest.approx((n * rate * (1 - rate)) ** 0.5, rel=0.1), "no fixed size"
    assert any(len(index) == 0 for index in sampling.poisson(2, 0.1, 50, seeds.stream(0, "order")))
    public = ExampleDP(sample_rate=0.2, epsilon=None, noise_multiplier=1.0)
    assert [(p.steps, p.divisor, p.weight) for p in (public.planned(n, 8, 2, 1) for n in (1, 7, 1000))] == [
        (10, 8, 1)
    ] * 3
    own = ExampleDP(epsilon=None, noise_multiplier=1.0)
    few, many = own.planned(3, 8, 2, 1), own.planned(1000, 8, 2, 1)
    assert (few.sample_rate, few.steps, few.divisor, few.weight) == (1.0, 2, 3, 3)
    assert (many.sample_rate, many.steps, many.divisor, many.weight) == (0.008, 250, 8, 1000)


CASES: dict[str, tuple[SSLMethod, tuple[str, ...] | None]] = {
    "byol": (BYOL(), ("method.norm=group",)),
    "byol, group": (BYOL(norm="group"), ()),
    "adaptive": (BYOL(norm="layer", decay_schedule="adaptive"), ("method.decay_schedule=constant",)),
    "dino": (DINO(), None),
    "vicreg": (VICReg(norm="group"), None),
}


def test_the_contract_names_what_makes_a_method_admissible() -> None:
    for name, (method, changes) in CASES.items():
        found = contract.changes(method)
        if name == "dino":
            assert found is not None
            assert "method.center=public" in found
            continue
        assert found == changes, name
        assert (contract.alone(method) == "") == (changes == ())
    with pytest.raises(PrivacyError, match=r"no proof for BYOL.* act on each other: set method.norm=group, or use"):
        ExampleDP().check(BYOL())


@dataclass(frozen=True)
class Sly(BYOL):
    """A user's own loss that says it is alone and is not."""

    trick: str = "mean"
    norm: str = "group"
    hidden: int = 16
    out: int = 8

    def loss(self, model: Model, batch: Batch, step: Step) -> Any:
        out = super().loss(model, batch, step)
        p = model["projector"](out.features)
        extra = p.mean(0).square().sum() if self.trick == "mean" else p.sum() * 0
        if self.trick == "hidden":  # equal in value, coupled in its gradient
            extra = (p.mean(0) * (p - p.detach()).sum(0)).sum()
        return replace(out, loss=out.loss + extra)


class HandWritten(nn.Module):
    """Batch statistics that no list of layers knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) < 2 else (x - x.mean(0)) / (x.std(0) + 1e-5)


class Remembering(nn.Module):
    """A queue in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + 0.1 * self.seen[-1] if self.seen else x
        self.seen.append(x.detach().mean(0))
        return shifted


def probes(method: SSLMethod, model: Model) -> None:
    inputs = [drawn(method, 6, seed) for seed in range(2)]
    batches = [*inputs, outlier(inputs[0])]
    augment = config.compose(tiny()).job.data.augment
    coupling.probe_alone(method, model, batches)
    coupling.probe_state(method, model, batches, augment)


@pytest.mark.parametrize("name", ALONE)
def test_the_probes_pass_what_is_alone(name: str) -> None:
    probes(ALONE[name], made(ALONE[name]))


def _inside(model: Model, module: nn.Module) -> Model:
    model = copy.deepcopy(model)
    model["predictor"] = nn.Sequential(model["predictor"], module.double())
    return model


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("mean", "act on each other"),
        ("hidden", "act on each other"),
        ("handwritten", "act on each other"),
        ("unaffine", "cannot tell what a record contributes alone"),
        ("queue", "keeps|depends on which batch"),
        ("simclr", "act on each other"),
        ("vicreg", "act on each other|contributes alone"),
    ],
)
def test_the_probes_find_what_no_declaration_shows(case: str, sentence: str) -> None:
    method: SSLMethod = ALONE["byol"]
    model = made(method)
    if case in ("mean", "hidden"):
        method = Sly(trick=case)
    elif case == "handwritten":
        model = _inside(model, HandWritten())
    elif case == "unaffine":
        model = _inside(model, nn.BatchNorm1d(8, affine=False, track_running_stats=False))
    elif case == "queue":
        model = _inside(model, Remembering())
        with pytest.raises(PrivacyError, match="act on each other"):
            coupling.probe_alone(method, model, [drawn(method, 6)])
        with pytest.raises(PrivacyError, match=sentence):
            inputs = [drawn(method, 6, seed) for seed in range(2)]
            coupling.probe_state(
                method, _inside(made(method), Remembering()), inputs, config.compose(tiny()).job.data.augment
            )
        return
    elif case == "simclr":
        method = SimCLR(norm="group", hidden=16, out=8)
        model = made(method)
    elif case == "vicreg":
        method = VICReg(norm="group", hidden=16, out=8)
        model = made(method)
    with pytest.raises(PrivacyError, match=sentence):
        probes(method, model)


def test_batch_normalisation_is_found_in_every_part() -> None:
    model = made(ALONE["byol"])
    model["predictor"] = nn.BatchNorm1d(8, affine=False)
    with pytest.raises(PrivacyError, match="the predictor of BYOL has batch normalisation"):
        contract.check_network(model, ALONE["byol"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": None}, "are both null"),
        ({"epsilon": 0.0}, "protects nothing"),
        ({"noise_multiplier": -1.0}, "protects nothing"),
        ({"clip_norm": float("inf")}, "is no length"),
        ({"delta": 0.0}, "is no probability"),
        ({"sample_rate": 1.5}, "is no probability"),
        ({"micro_batch": 0}, "holds no record"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExampleDP(**options)
    with pytest.raises(ConfigError, match="is unknown: use ghost, vmap, hooks, loop"):
        ExampleDP(engine="jax").check(BYOL(norm="group"))


PRIVATE = (
    *("method=byol", "method.norm=group", "privacy=example", "privacy.epsilon=null", "privacy.noise_multiplier=2.0"),
    *("federation.rounds=4", "federation.clients=2", "partition=iid"),
)


def spent(text: str) -> int:
    return sum(entry.count for entry in Ledger.read(text).entries)


def test_a_round_is_paid_before_it_is_trained_and_a_lost_one_in_full() -> None:
    transform = ExampleDP(epsilon=3.0).planned(40, 8, 1, 4)
    assert transform.steps == 5
    one = pay(transform, "", 1, 1, 1.0, {})
    assert (one.work, one.public["spent"]) == (1.0, 5)
    lost = pay(transform, one.ledger.text(), 2, 2, 1.0, {(2, 1): 1.0})
    assert (lost.public["spent"], spent(lost.ledger.text())) == (15, 15)
    later = pay(transform, lost.ledger.text(), 3, 1, 1.0, {(2, 1): 1.0, (2, 2): 1.0})
    assert spent(later.ledger.text()) == 20, "what is lost is written once"


def test_noise_that_was_paid_for_is_not_drawn_again() -> None:
    """A server that repeats an attempt with another model would learn the difference under equal noise."""
    transform = ExampleDP(epsilon=3.0).planned(40, 8, 1, 4)
    one = pay(transform, "", 1, 1, 1.0, {})
    with pytest.raises(PrivacyError, match="a second time for attempt 1"):
        pay(transform, one.ledger.text(), 1, 1, 1.0, {})


def test_training_stops_before_a_step_would_exceed_the_budget() -> None:
    transform = ExampleDP(epsilon=3.0).planned(40, 8, 1, 2)
    text, works = "", []
    for at in range(1, 6):
        paid = pay(transform, text, at, 1, 1.0, {})
        text = paid.ledger.text()
        works.append(paid.work)
        assert Ledger.read(text).epsilon(1e-5) <= 3.0
    assert works[:2] == [1.0, 1.0], "what was planned is there"
    assert works[-1] == 0.0
    assert epsilon(transform.noise_multiplier, transform.sample_rate, spent(text) + 1, 1e-5) > 2.9


def test_a_node_refuses_a_job_that_protects_less_than_it_demands() -> None:
    from fedssl.gradient import PlainGradient

    transform = ExampleDP(epsilon=8.0).planned(40, 8, 1, 2)
    agree(transform, {"partition-id": 0})
    agree(transform, {"max-epsilon": 8.0, "max-delta": 1e-5})
    for floor, sentence in (
        ({"max-epsilon": 4.0}, "allows epsilon 4.0 and the job asks for 8.0"),
        ({"max-delta": 1e-6}, "allows delta 1e-06"),
        ({"secure-noise": True}, "wants noise from its own operating system"),
    ):
        with pytest.raises(PrivacyError, match=sentence):
            agree(transform, floor)
    with pytest.raises(PrivacyError, match="takes part in private training only"):
        agree(PlainGradient(), {"max-epsilon": 4.0})


def test_a_private_run_says_what_it_has_cost_and_nothing_of_its_examples(plan: Compose) -> None:
    rundir = execute(plan(*PRIVATE, "privacy.epsilon=8", "privacy.noise_multiplier=null", "evaluate.every=2"))
    claim, rows = json.loads((rundir.path / "privacy.json").read_text()), rundir.rows("clients.jsonl")
    worst = claim["worst"]
    assert claim["epsilon"] == pytest.approx(
        epsilon(worst["noise_multiplier"], worst["sample_rate"], worst["count"], 1e-5), abs=1e-6
    )
    assert 7.5 < claim["epsilon"] <= 8.0
    assert (claim["unit"], claim["delta"], claim["seeded"]) == ("record", 1e-5, True)
    assert claim["accountants"]["pld"] <= claim["accountants"]["prv"] <= claim["accountants"]["rdp"]
    assert any("seed of the run" in hole for hole in claim["not_covered"])
    assert json.loads((rundir.path / "summary.json").read_text())["epsilon"] == claim["epsilon"]
    assert not {"loss", "feature_std"} & {key for row in [*rows, *rundir.rows()] for key in row if key != "feature_std"}
    assert all("feature_std" not in row and "loss" not in row for row in rows)
    manifest = json.loads((rundir.path / "payload.json").read_text())["up"]
    assert all(entry["differentially_private"] for entry in manifest)
    assert not {"loss", "feature_std"} & {entry["name"] for entry in manifest}


def test_a_kill_never_lowers_what_was_spent_nor_uses_noise_again(
    plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = execute(plan(*PRIVATE, name="straight"))
    broken = interrupted(plan(*PRIVATE, name="broken"), 2, monkeypatch)
    resumed = execute(plan(*PRIVATE, name="broken"))
    claims = [json.loads((run.path / "privacy.json").read_text()) for run in (straight, resumed)]
    assert claims[1]["worst"]["count"] > claims[0]["worst"]["count"] or claims[1]["epsilon"] >= claims[0]["epsilon"]
    assert broken.lost() == [(3, 1)]
    at = [row for row in resumed.rows("clients.jsonl") if row["round"] == 3]
    before = [row for row in straight.rows("clients.jsonl") if row["round"] == 3]
    assert all(new["spent"] > old["spent"] for new, old in zip(at, before, strict=True)), "the lost round is paid"
    one, other = final_arrays(straight), final_arrays(resumed)
    assert any(not np.array_equal(one[key], other[key]) for key in one), "its noise was drawn anew"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("method=simclr", "method.norm=group"), "no proof for SimCLR, which has a loss in which the examples"),
        (("method=byol",), "set method.norm=group"),
        (("method=moco",), "keeps what it has seen of examples in its part 'queue'"),
        (("method=byol", "method.norm=group", "local.decorrelation=0.1"), "act on each other"),
        (("method=fedsc",), "uploads a summary of its examples"),
    ],
)
def test_what_has_no_proof_is_refused_before_anything_runs(
    overrides: Sequence[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=sentence):
        config.compose([*tiny(*overrides, "privacy=example")])


def test_batch_normalisation_in_the_encoder_is_refused_by_the_client(plan: Compose) -> None:
    with pytest.raises(Exception, match="the encoder of BYOL has batch normalisation.*use encoder.norm=group"):
        execute(plan(*PRIVATE, "encoder.norm=batch"))


def test_private_runs_are_the_same_with_any_number_of_workers(plan: Compose) -> None:
    one, two = (execute(plan(*PRIVATE, f"engine.workers={k}", name=f"w{k}")) for k in (1, 3))
    for key, value in final_arrays(one).items():
        assert np.array_equal(value, final_arrays(two)[key])
