"""Contrastive losses under pair-wise clipping: the Gram trick, the bounds and who tries to break them, whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays
from test_methods import job_of
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fedssl.config import Plan
from fedssl.errors import PrivacyError
from fedssl.losses.similarity import unit
from fedssl.method import Batch, Sizes, SSLMethod, Step
from fedssl.methods.sigmoid import SigmoidPairs
from fedssl.methods.simclr import SimCLR
from fedssl.privacy.coupled import pair_dp
from fedssl.privacy.coupled.pair_dp import PairDP, noise_over_signal, pair_sum, rule_of, temperature_at
from fedssl.privacy.coupled.pair_gradients import Seen, bounds, cotangents, directions, look, scores_of
from fedssl.privacy.coupled.pair_rules import (
    NTXentPairs,
    PairRule,
    SigmoidRule,
    nt_xent_sensitivity,
    softmax_sensitivity,
)
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import trainable

Compose = Callable[..., Plan]
STEP = Step(1, 2, 0, 2)
RULES = {"simclr": NTXentPairs(), "sigmoid": SigmoidRule(), "biased": SigmoidRule(-3.0)}
TEMPERATURES = (1.0, 0.5, 0.2)
WIDTH = 3  # of the examples
every_rule = pytest.mark.parametrize("name", RULES)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def method_of(name: str, temperature: float = 0.5) -> SSLMethod:
    sizes: dict[str, Any] = {"temperature": temperature, "hidden": 5, "out": 4, "norm": "layer"}
    return SimCLR(**sizes) if name == "simclr" else SigmoidPairs(**sizes, bias=-3.0 if name == "biased" else 0.0)


def model_of(method: SSLMethod, seed: int = 0) -> nn.ModuleDict:
    """A net of about 90 parameters, in float64."""
    encoder = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh())
    model = method.init(encoder, Sizes(6, 0, (WIDTH,))).double().train()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch_of(n: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Batch(views, torch.arange(n))


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values])


def summed(rule: PairRule, model: nn.ModuleDict, batch: Batch, temperature: float, clip: float) -> Tensor:
    if not len(batch.index):
        return torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return flat(pair_sum(rule, model, batch, temperature, clip, 7)[0])


def without(batch: Batch, i: int) -> Batch:
    kept = [j for j in range(len(batch.index)) if j != i]
    return Batch([v[kept] for v in batch.views], batch.index[kept])


def half(model: nn.ModuleDict, a: Tensor, b: Tensor) -> Tensor:
    """The gradient of the cosine of two views through the first of them."""
    one, other = (model["projector"](model["encoder"](v[None]))[0] for v in (a, b))
    return flat([g.detach() for g in torch.autograd.grad(unit(one) @ unit(other).detach(), trainable(model))])


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e9])
@every_rule
def test_gram_trick_is_the_explicit_sum_over_pairs(name: str, clip: float) -> None:
    rule, batch = RULES[name], batch_of(5)
    model = model_of(method_of(name))
    views = torch.cat(list(batch.views))
    halves = torch.stack([torch.stack([half(model, a, b) for b in views]) for a in views])  # (2 n, 2 n, P)
    weights = rule.weights(scores_of(look(model, batch.views, 100)), 0.5)
    lengths = halves.norm(dim=2) + halves.norm(dim=2).T
    factors = (clip / lengths).nan_to_num(posinf=1.0).clamp(max=1.0)
    explicit = torch.einsum("ab,abp->p", weights * factors, halves + halves.transpose(0, 1))
    assert (summed(rule, model, batch, 0.5, clip) - explicit).norm() <= 1e-10 * max(1.0, float(explicit.norm()))
    whole = (halves + halves.transpose(0, 1)).norm(dim=2)
    assert (bounds(look(model, batch.views, 100)) >= whole - 1e-12).all(), "never shorter than a pair's gradient"


@every_temperature
@every_rule
def test_without_clipping_it_is_the_gradient_of_the_methods_loss(name: str, temperature: float) -> None:
    method, batch = method_of(name, temperature), batch_of(6)
    model = model_of(method)
    out = method.loss(model, batch, STEP)
    expected = flat(list(torch.autograd.grad(out.loss * 6, trainable(model))))
    rule = rule_of(method)
    sums, said = pair_sum(rule, model, batch, temperature, 1e12, 7)
    torch.testing.assert_close(flat(sums), expected, rtol=1e-10, atol=1e-12)
    assert said.loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    assert said.per_example is None


def differentiable(rule: PairRule, model: nn.ModuleDict, views: Tensor, temperature: float, clip: float) -> Tensor:
    """The same sum as a function of the inputs (2 n, WIDTH), for those who search."""
    values = dict(model.named_parameters())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.projector = model["encoder"], model["projector"]

        def forward(self, view: Tensor) -> Tensor:
            return self.projector(self.encoder(view[None]))[0]

    net = Net()

    def both(parameters: dict[str, Tensor], view: Tensor) -> tuple[Tensor, Tensor]:
        found = functional_call(net, parameters, (view,))
        return found, found

    jacobians, projections = vmap(jacrev(both, has_aux=True), in_dims=(None, 0))(values, views)
    flat_rows = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)  # (2 n, K, P)
    seen = Seen(projections, flat_rows @ flat_rows.mT)
    weights = rule.weights(scores_of(seen), temperature)
    return torch.einsum("ak,akp->p", cotangents(seen, weights, clip), flat_rows)


def search(rule: PairRule, model: nn.ModuleDict, temperature: float, clip: float, n: int, start: Tensor) -> Batch:
    """100 steps of Adam on the inputs, for the record whose absence moves the sum most."""
    inputs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([inputs], lr=0.1)
    rest = [i for i in range(2 * n) if i % n != n - 1]
    best, found = -1.0, start
    for _ in range(100):
        moved = differentiable(rule, model, inputs, temperature, clip) - differentiable(
            rule, model, inputs[rest], temperature, clip
        )
        length = moved.norm()
        if length.item() > best:
            best, found = length.item(), inputs.detach().clone()
        optimizer.zero_grad()
        (-length).backward()
        inputs.grad.nan_to_num_()
        optimizer.step()
    return Batch([found[:n], found[n:]], torch.arange(n))


def duplicates(n: int) -> Batch:
    """Equal records and one that is unlike them, where naive clipping moves by 2 (n - 1) + 1."""
    batch = batch_of(n)
    views = [torch.cat([batch.views[0][:1].expand(n - 1, WIDTH), -3 * v[-1:]]) for v in batch.views]
    return Batch(views, batch.index)


@every_temperature
@every_rule
def test_a_record_less_moves_the_sum_by_no_more_than_the_bound(name: str, temperature: float) -> None:
    """Random batches, duplicates beside an outlier, and an adversary who optimises the inputs."""
    rule, clip, n = RULES[name], 0.02, 7
    model = model_of(method_of(name))
    bound = rule.sensitivity(temperature) * clip
    batches = [batch_of(size, seed) for seed, size in enumerate((1, 2, 7))] + [duplicates(7), duplicates(12)]
    batches.append(search(rule, model, temperature, clip, n, torch.cat(list(batch_of(n).views))))
    shifts = []
    for batch in batches:
        whole = summed(rule, model, batch, temperature, clip)
        shifts.append(
            float((whole - summed(rule, model, without(batch, len(batch.index) - 1), temperature, clip)).norm())
        )
    assert max(shifts) <= bound * (1 + 1e-6)
    assert shifts[-1] > 1.2 * shifts[2], "the adversary finds more than chance does"


def masses(rows: Tensor, one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """() the softmax mass of two views, summed over all other rows."""
    own = torch.exp(rows @ one / temperature) + torch.exp(rows @ other / temperature)
    others = torch.exp(rows @ rows.T / temperature)
    return (own / (own + others.sum(1) - others.diagonal())).sum()


@every_temperature
@pytest.mark.parametrize("rows", [2, 4, 10, 40])
def test_the_mass_that_a_record_can_draw_is_bounded(rows: int, temperature: float) -> None:
    """The lemma behind NT-Xent's bound, attacked on the sphere itself, where an encoder might put its projections."""
    allowed = nt_xent_sensitivity(temperature) * temperature - 2
    generator = torch.Generator().manual_seed(rows)
    for dim in (2, 24):
        free = torch.randn(rows + 2, dim, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(150):
            points = unit(free)
            mass = masses(points[2:], points[0], points[1], temperature)
            assert mass.item() <= allowed
            optimizer.zero_grad()
            (-mass).backward()
            optimizer.step()
    centre = torch.zeros(rows + 2, dtype=torch.float64)
    centre[0] = 1.0
    for angle in np.linspace(0, math.pi, 25):  # a star: rows that are far from each other and near the record
        star = torch.eye(rows + 2, dtype=torch.float64)[2:] * math.sin(angle) + centre * math.cos(angle)
        assert masses(star, centre, centre, temperature).item() <= allowed


def test_bounds_by_hand() -> None:
    assert softmax_sensitivity(1.0) == pytest.approx(2 + 2 * math.e**2)
    for n in (2, 24, 256):  # half of the published form, which sums both directions
        e = math.exp(-2 / 0.5)
        published = (4 + 2 * (2 * n - 2) * 2 / (2 + (2 * n - 3) * e)) / 0.5
        assert softmax_sensitivity(0.5, n) == pytest.approx(published / 2)
        assert softmax_sensitivity(0.5, n) < softmax_sensitivity(0.5)
    assert nt_xent_sensitivity(1.0) == pytest.approx(5.09, abs=0.01)
    assert nt_xent_sensitivity(0.5) == pytest.approx(24.45, abs=0.01)
    for temperature in (0.05, 0.2, 0.5, 1.0, 3.0, 10.0, 100.0):
        assert 2 / temperature < nt_xent_sensitivity(temperature) <= softmax_sensitivity(temperature)
        for bias in (0.0, -10.0, 4.0):
            assert SigmoidRule(bias).sensitivity(temperature) < 4 / temperature
    assert nt_xent_sensitivity(1e-3) == math.inf
    assert noise_over_signal(SigmoidRule(), 0.2, 256) == pytest.approx(0.0078, abs=1e-4)


def noisy(method: SSLMethod, model: nn.ModuleDict, batch: Batch, multiplier: float = 1e-12) -> list[Tensor]:
    mechanism = PairDP(epsilon=None, noise_multiplier=multiplier, clip_norm=0.1)
    planned = mechanism.planned(10, 5, 1, 1)
    noise = Noise(np.random.default_rng(0), False, torch.device("cpu"))
    return mechanism.noisy_sum(method, model, batch, STEP, planned, noise)[0]


@every_rule
def test_empty_samples_single_records_and_records_that_are_no_numbers(name: str) -> None:
    method, batch = method_of(name), batch_of(5)
    model = model_of(method)
    empty = noisy(method, model, Batch([], torch.arange(0)))
    assert flat(empty).norm() < 1e-9
    one = flat(noisy(method, model, without(batch_of(2), 1)))
    if name == "simclr":
        assert one.norm() < 1e-9, "nothing to contrast with"
    else:
        assert one.norm() > 1e-3, "its positive pair"
    for bad in (math.nan, math.inf, 1e308):
        broken = [v.clone() for v in batch.views]
        broken[1][2] = bad
        found = flat(noisy(method, model, replace(batch, views=broken)))
        if bad != 1e308:  # which saturates, so it is a record like others
            torch.testing.assert_close(found, flat(noisy(method, model, without(batch, 2))), rtol=0, atol=1e-9)
        assert found.isfinite().all()
    nobody = flat(noisy(method, model, Batch([torch.full_like(v, math.nan) for v in batch.views], batch.index)))
    assert nobody.norm() < 1e-9


@every_rule
def test_noise_is_relative_to_the_sensitivity(name: str) -> None:
    method = method_of(name, 0.5)
    model = model_of(method)
    model["encoder"].append(nn.Linear(200, 200))  # many parameters, for many draws
    drawn = flat(noisy(method, model, Batch([], torch.arange(0)), 1.5))
    expected = 1.5 * rule_of(method).sensitivity(0.5) * 0.1
    assert drawn.std().item() == pytest.approx(expected, rel=0.03)


def test_zero_projections_have_no_direction_and_do_no_harm() -> None:
    projections = torch.zeros(4, 3, dtype=torch.float64)
    projections[0, 0] = 2.0
    seen = Seen(projections, torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    units, _, valid = directions(projections)
    assert torch.equal(units, unit(projections))
    assert valid.flatten().tolist() == [1, 0, 0, 0]
    assert cotangents(seen, NTXentPairs().weights(scores_of(seen), 0.5), 1.0).isfinite().all()


def test_a_schedule_is_public_and_what_a_batch_decides_is_refused() -> None:
    method = job_of("sigmoid", "method.norm=group", "method.temperature=cosine").method
    assert [temperature_at(method, p) for p in (0.0, 1.0)] == pytest.approx([0.5, 0.1])
    PairDP().check(method)
    for word in ("max_snr", "target_probability"):
        with pytest.raises(PrivacyError, match="read off the batch.*use a number, or cosine"):
            PairDP().check(job_of("sigmoid", "method.norm=group", f"method.temperature={word}").method)


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(PrivacyError, match=r"reaches 0.2.* % of the largest sum that 256 .*privacy\.force=true"):
        PairDP().check(job_of("simclr", "method.norm=group", "method.temperature=0.2").method)
    with pytest.raises(PrivacyError, match=r"reaches 0.1"):
        PairDP().check(job_of("simclr", "method.norm=group", "method.temperature=cosine").method)
    PairDP(force=True).check(job_of("simclr", "method.norm=group", "method.temperature=0.2").method)
    with pytest.raises(PrivacyError, match="can be written down"):
        PairDP(force=True).check(job_of("simclr", "method.norm=group", "method.temperature=0.001").method)
    with pytest.raises(PrivacyError, match=r"similarity=dot has no bound.*similarity=cosine"):
        PairDP().check(job_of("simclr", "method.norm=group", "method.similarity=dot").method)
    with pytest.raises(PrivacyError, match=r"none for that of VICReg.*privacy=groups method\.norm=group"):
        PairDP().check(job_of("vicreg").method)
    with pytest.raises(PrivacyError, match="BYOL contrasts no pairs of records.*use privacy=example"):
        PairDP().check(job_of("byol", "method.norm=group").method)
    with pytest.raises(PrivacyError, match="none for that of Decorrelated"):
        PairDP().check(job_of("simclr", "method.norm=group", "local.decorrelation=0.1").method)


@dataclass(frozen=True)
class Weighted(SigmoidPairs):
    """A loss that is not what its bound is of."""

    def loss(self, model: nn.ModuleDict, batch: Batch, step: Step) -> Any:
        out = super().loss(model, batch, step)
        return replace(out, loss=1.01 * out.loss)


def test_a_loss_that_is_not_the_sum_of_its_pairs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its type; and should the method itself change, by its gradient."""
    with pytest.raises(PrivacyError, match="none for that of Weighted"):
        rule_of(Weighted())
    method = method_of("sigmoid")
    pair_dp.probe_pairs(method, model_of(method), batch_of(6))
    monkeypatch.setattr(pair_dp, "rule_of", lambda _: SigmoidRule(0.1))
    with pytest.raises(PrivacyError, match=r"differs by .* from the sum of pairs whose bound is known"):
        pair_dp.probe_pairs(method, model_of(method), batch_of(6))


def test_the_live_network_is_looked_at(plan: Compose) -> None:
    with pytest.raises(
        PrivacyError,
        match=r"SimCLR, which has batch normalisation in its heads: set method\.norm=group, "
        r"or use privacy=groups method\.norm=group, privacy=example with method=byol method\.norm=group, "
        r"method=mae, or aggregation=client_dp, under which every method is valid$",
    ):
        plan("privacy=pairs")

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    job = job_of("simclr", "method.norm=group")
    shard = job.data.load().train.shard(np.arange(8), 0)
    from fedssl.job.setup import build_model

    model = build_model(job, job.data.load().train.shape)
    PairDP().admit(job.method, model, shard, job.data.augment)
    for module, why in ((nn.Dropout(0.5), "dropout"), (Centred(), "act on each other")):
        changed = build_model(job, job.data.load().train.shape)
        changed["projector"].append(module)
        with pytest.raises(PrivacyError, match=why):
            PairDP().admit(job.method, changed, shard, job.data.augment)
    graphs = job_of("simclr", "method.norm=group", modality="graphs")
    data = graphs.data.load().train
    with pytest.raises(PrivacyError, match="no vectorised form for graphs: use privacy=groups"):
        PairDP().admit(graphs.method, build_model(graphs, data.shape), data.shard(np.arange(8), 0), graphs.data.augment)


@pytest.mark.parametrize("method", ["simclr", "sigmoid"])
def test_a_federation_trains_pair_by_pair(method: str, plan: Compose) -> None:
    options = (f"method={method}", "method.norm=group", "privacy=pairs", "privacy.delta=0.001")
    rundir = execute(plan(*options))
    assert all(np.isfinite(value).all() for value in final_arrays(rundir).values())
    said = rundir.read("privacy.json")
    assert 0 < said["epsilon"] <= 8.0
    assert "pairs' clipped similarity gradients" in said["released"]
    assert {"loss", "feature_std"}.isdisjoint(rundir.rows("clients.jsonl")[0])


def test_a_simclr_user_under_example_is_told_of_pairs_and_groups(plan: Compose) -> None:
    with pytest.raises(
        PrivacyError,
        match=r"set method\.norm=group method\.negatives=public data@public=NAME, "
        r"or use privacy=pairs method\.norm=group, privacy=groups method\.norm=group",
    ):
        plan("privacy=example")
