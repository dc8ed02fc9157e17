"""Attacks on trained models: their statistics, what they find where there is something, and that they find no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import every_case, job_of, model_of
from torch import Tensor, nn

from fedssl.datasets.base import Shard
from fedssl.datasets.digits import Digits
from fedssl.datasets.halved import Halved, coins
from fedssl.errors import ConfigError
from fedssl.job.setup import public_of
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.modalities.images import ImageViews
from fedssl.model import Model, seed_parameters, to_arrays
from fedssl.parts import Coupling, Part
from fedssl.privacy.audit.attacks import Attack, attacks, finding, paired_bound
from fedssl.privacy.audit.inversion import gradient_of, invert, judged, psnr
from fedssl.privacy.audit.membership import Attacked, cosines, statistics, trained
from fedssl.privacy.audit.roc import area, rate_at
from fedssl.privacy.audit.shadows import excess, likelihood_ratio

# Statistics of a model


def test_cosines_by_hand() -> None:
    views = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    torch.testing.assert_close(cosines(views), torch.tensor([[0.0, 0.5**0.5, 0.5**0.5]]))


@every_case
def test_every_method_can_be_attacked(name: str, modality: str) -> None:
    """All parts known: the statistics that the method allows, one row an example, and the model is as before."""
    job = job_of(name, modality=modality)
    model = model_of(job)
    public = public_of(job, torch.device("cpu")) if job.method.reads_public else None
    attacked = Attacked(job.method, model, job.data.augment, frozenset(model.keys()), public, count=4)
    before = to_arrays(model)
    table = statistics(attacked, job.data.load().train.shard(np.arange(16), 0), "members")
    for key, value in to_arrays(model).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    assert {"encoder views", "norm"} <= table.keys()
    assert ("loss" in table) == (job.method.coupling is Coupling.none)
    for key, values in table.items():
        assert values.shape == (16, 6 if key.endswith("views") else 1), key
        assert np.isfinite(values).all(), key
    again = statistics(attacked, job.data.load().train.shard(np.arange(16), 0), "members")
    np.testing.assert_array_equal(table["encoder views"], again["encoder views"])
    alone = statistics(
        Attacked(job.method, model, job.data.augment, frozenset({"encoder"}), public, count=4),
        job.data.load().train.shard(np.arange(16), 0),
        "members",
    )
    assert alone.keys() == {"encoder views", "norm"}, "what was not released is not read"


def test_the_loss_is_the_methods() -> None:
    job = job_of("byol", "method.norm=layer")
    model = model_of(job).eval()
    shard = job.data.load().train.shard(np.arange(8), 0)
    attacked = Attacked(job.method, model, job.data.augment, frozenset(model.keys()), count=2)
    from fedssl import seeds

    generator = seeds.torch_stream(0, "audit", "loss", "members")
    views = job.data.augment.views(shard.batch(torch.arange(8)), generator, 2)
    out = job.method.loss(model, Batch(views, torch.arange(8)), Step(1, 1, 0, 1))
    found = statistics(attacked, shard, "members")["loss"][:, 0]
    assert out.per_example is not None
    np.testing.assert_allclose(found, -out.per_example.detach().numpy(), rtol=1e-5)


# From scores to findings


def test_nothing_is_found_where_nothing_is() -> None:
    rng = np.random.default_rng(0)
    members, others = ({"encoder views": rng.normal(size=(n, 6)), "norm": rng.normal(size=(n, 1))} for n in (300, 200))
    bounds = []
    for attack in attacks(members, others, seed=0):
        found = finding(attack, paired_bound(attack, delta=1e-5, confidence=0.99, seed=0), seed=0)
        assert found.auc.low < 0.5 < found.auc.high, attack.name
        assert found.tpr_1.low < 0.02
        bounds.append(found.epsilon)
    assert max(bounds) == 0.0


def test_the_paired_bound_errs_at_the_stated_rate() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for i in range(80):
        null = Attack("null", rng.normal(size=150), rng.normal(size=100), "")
        wrong += paired_bound(null, delta=0.0, confidence=0.8, seed=i) > 0
    assert wrong / 80 <= 0.2 + 2 * (0.16 / 80) ** 0.5


def test_members_that_stand_out_are_found() -> None:
    rng = np.random.default_rng(2)
    attack = Attack("sharp", rng.normal(6, 1, 200), rng.normal(0, 1, 200), "")
    assert area(attack.members, attack.others).value > 0.99
    assert rate_at(attack.members, attack.others, 0.01).low > 0.9
    half, whole = (
        paired_bound(attack, delta=1e-5, confidence=0.95, seed=0, replaced=replaced) for replaced in (True, False)
    )
    assert whole > 3
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_pairs_are_of_one_class() -> None:
    """Where the division was by class, a class that is easy to tell must not count as membership."""
    inside, outside = np.repeat((0, 1), (10, 90)), np.repeat((0, 1), (90, 10))
    attack = Attack("label", inside.astype(float), outside.astype(float), "")
    assert paired_bound(attack, delta=0.0, confidence=0.95, seed=0) > 0
    assert paired_bound(attack, delta=0.0, confidence=0.95, classes=(inside, outside), seed=0) == 0.0


def test_the_trained_attack_reads_only_the_other_half() -> None:
    rng = np.random.default_rng(3)
    members, others = rng.normal(1, 1, (101, 5)), rng.normal(0, 1, (80, 5))
    inside, outside, rows = trained(members, others, seed=0)
    assert (len(inside), len(outside)) == (50, 40) == tuple(map(len, rows))
    assert area(inside, outside).low > 0.75
    with pytest.raises(ConfigError, match="4 of each"):
        trained(members[:3], others, seed=0)


# Shadow runs


def shadowed(k: int, n: int, leak: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics (k, n) whose level differs far more between examples than membership moves it."""
    rng = np.random.default_rng(seed)
    included = rng.random((k, n)) < 0.5
    return rng.normal(0, 5, n) + leak * included + 0.5 * rng.standard_normal((k, n)), included


def test_the_likelihood_ratio_takes_out_what_examples_differ_in() -> None:
    values, included = shadowed(9, 400, leak=1.0, seed=0)
    scores = likelihood_ratio(values[0], values[1:], included[1:])
    assert area(scores[included[0]], scores[~included[0]]).low > 0.8
    assert area(values[0][included[0]], values[0][~included[0]]).high < 0.65, "the plain threshold is nearly blind"
    offline = excess(values[0], values[1:], ~included[1:])
    assert area(offline[included[0]], offline[~included[0]]).low > 0.75


def test_shadow_runs_find_nothing_where_nothing_is() -> None:
    values, included = shadowed(5, 600, leak=0.0, seed=1)
    for scores in (
        likelihood_ratio(values[0], values[1:], included[1:]),
        excess(values[0], values[1:], ~included[1:]),
    ):
        found = area(scores[included[0]], scores[~included[0]])
        assert found.low < 0.5 < found.high
        assert np.isfinite(scores).all()
    with pytest.raises(ConfigError, match="do not fit"):
        likelihood_ratio(values[0], values[1:2], included[1:2])
    with pytest.raises(ConfigError, match="more of them"):
        likelihood_ratio(values[0], values[1:], np.ones_like(included[1:]))


def test_halved_data_keep_what_the_coins_say() -> None:
    source = Digits()
    whole, half = source.load(), Halved(source, seed=3, run=1, augment=source.augment).load()
    kept = np.flatnonzero(coins(len(whole.train), 3, 1))
    assert 0.45 < len(kept) / len(whole.train) < 0.55
    np.testing.assert_array_equal(half.train.targets, whole.train.targets[kept])
    assert torch.equal(half.train.images, whole.train.images[torch.from_numpy(kept)])
    assert len(half.test) == len(whole.test)
    assert not np.array_equal(coins(100, 3, 1), coins(100, 3, 2))
    with pytest.raises(ConfigError, match="at least 0"):
        Halved(source, seed=-1, run=0, augment=source.augment)


# Gradient inversion


class Linear(SSLMethod):
    """Pull a linear map of the first view towards a fixed vector: its gradient shows the image."""

    views, parts, coupling = 1, (Part("encoder"),), Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        return nn.ModuleDict({"encoder": encoder})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        features = model["encoder"](batch.views[0])
        each = (features - 1).square().sum(1)
        return LossOutput(each.mean(), each, features, {})


@pytest.mark.parametrize("size", [1, 2])
def test_images_come_back_from_a_gradient(size: int) -> None:
    data = Digits().load()
    records, strangers = data.train.batch(torch.arange(size)), data.test.batch(torch.arange(20))
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))
    method = Linear()
    model = method.init(network, Sizes(16, size, (1, 8, 8)))
    seed_parameters(model, 0)
    views = ImageViews(crop=(0.9, 1.0), flip=0.0, jitter=0.0, grey=0.0, mean=(0.3,), std=(0.4,))

    def draw(x: Tensor) -> list[Tensor]:
        return views.views(x, torch.Generator().manual_seed(1), 1)

    observed = gradient_of(method, model, draw(records))
    found = invert(method, model, observed, draw, tuple(records.shape), steps=150, generator=generator)
    shown = judged(found, records, strangers)
    assert shown.similarity > 0.99
    assert shown.psnr > shown.psnr_random + 5
    assert ((shown.images >= 0) & (shown.images <= 1)).all()


def test_images_are_matched_in_the_best_order() -> None:
    records = torch.stack([torch.full((1, 2, 2), value) for value in (0.1, 0.9)])
    shown = judged((records.flip(0), 1.0), records, torch.rand(4, 1, 2, 2))
    torch.testing.assert_close(shown.images, records)
    assert float(psnr(records + 0.1, records).mean()) == pytest.approx(20, abs=1e-3)


def test_a_gradient_of_nothing_is_refused() -> None:
    model = Linear().init(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), Sizes(2, 1, (1, 2, 2)))
    zero = [torch.zeros_like(p) for p in model.parameters()]
    with pytest.raises(ConfigError, match="nothing to match"):
        invert(Linear(), model, zero, lambda x: [x], (1, 1, 2, 2), generator=torch.Generator())


def test_too_few_augmentations_are_refused() -> None:
    job = job_of("simclr")
    with pytest.raises(ConfigError, match="at least 2"):
        Attacked(job.method, model_of(job), job.data.augment, frozenset(), count=1)


def test_views_are_drawn_alike_for_every_run() -> None:
    """Statistics of one example under two models differ by the models alone."""
    job = job_of("simclr")
    model, shard = model_of(job), Shard.of(job.data.load().train, np.arange(6))
    attacked = Attacked(job.method, model, job.data.augment, frozenset({"encoder"}), count=3)
    first = statistics(attacked, shard, "members")["encoder views"]
    assert not np.allclose(first, statistics(attacked, shard, "others")["encoder views"])
    assert F.mse_loss(torch.tensor(first), torch.tensor(statistics(attacked, shard, "members")["encoder views"])) == 0
