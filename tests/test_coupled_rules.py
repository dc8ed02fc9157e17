"""Rules that are a method and a strategy together: Orchestra, FedSC and Calibre; hand-computed numbers, refusals, runs.

Tests named after a number are of the defects of released codes that `ALGORITHMS` counts so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import interrupted, metrics
from torch import Tensor

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError, ProtocolError
from fedssl.flower import state_files
from fedssl.flower.rule import Own
from fedssl.job import Job
from fedssl.job.setup import build_model, shares_of
from fedssl.losses.similarity import unit
from fedssl.method import Batch, Step
from fedssl.methods.common.clustering import equal_size_clusters, global_centroids, kmeans, sinkhorn
from fedssl.methods.federated.calibre import divergence, prototype_contrast, prototype_entropy
from fedssl.methods.federated.fedsc import FedSC, shortened
from fedssl.modalities.images import quarter_turns
from fedssl.model import Model, to_arrays
from fedssl.parts import Arrays, Layout
from fedssl.privacy.release import correlation_sensitivity, gaussian_epsilon, symmetric_noise
from strategies import rules
from strategies.base import Update
from strategies.calibre import Calibre
from strategies.fedsc import CLIENTS, MATRIX
from strategies.fedsc import FedSC as FedSCRule
from strategies.orchestra import GLOBAL, LOCAL
from strategies.orchestra import Orchestra as OrchestraRule

Compose = Callable[..., Plan]
RULES = {
    "orchestra": (
        *("method=orchestra", "method.memory=24", "method.local_centroids=4", "method.centroids=6"),
        "strategy.steps=20",
    ),
    "fedsc": ("method=fedsc", "method.noise=2", "method.passes=2"),
    "calibre": ("method=calibre", "partition=iid"),  # more examples than clusters
}
STEP = Step(round=1, rounds=10, step=0, steps=5)
NOWHERE = Layout(frozenset(), frozenset(), {})


def job_of(*overrides: str, modality: str = "images") -> Job:
    return config.compose(tiny(*overrides, modality=modality)).job


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(clusters: int, each: int, dim: int, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Centres, and as many unit vectors around each, in no order."""
    g = generator(7)
    centres = unit(torch.randn(clusters, dim, generator=g))
    points = unit(centres.repeat_interleave(each, 0) + noise * torch.randn(clusters * each, dim, generator=g))
    return centres, points[torch.randperm(len(points), generator=g)]


# Clustering.


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_sinkhorn_has_its_marginals(n: int, k: int, seed: int) -> None:
    scores = torch.rand(n, k, generator=generator(seed)) * 2 - 1
    soft = sinkhorn(scores, sharpness=5, iterations=2000, tolerance=1e-9)
    assert (soft >= 0).all()
    torch.testing.assert_close(soft.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(soft.sum(0), torch.full((k,), n / k, dtype=torch.float64), rtol=1e-6, atol=0)


def test_sinkhorn_by_hand() -> None:
    """Two points and clusters: the odds of the diagonal are exp(s (a + d - b - c) / 2)."""
    a, b, c, d, s = 0.9, 0.1, 0.6, 0.2, 3.0
    odds = math.exp(s * (a + d - b - c) / 2)
    soft = sinkhorn(torch.tensor([[a, b], [c, d]]), sharpness=s, iterations=500, tolerance=1e-12)
    p = odds / (1 + odds)
    np.testing.assert_allclose(soft.numpy(), [[p, 1 - p], [1 - p, p]], rtol=1e-6)
    with pytest.raises(ConfigError, match="sharpness"):
        sinkhorn(torch.zeros(2, 2), sharpness=0)


def test_clusters_have_equal_sizes_where_kmeans_has_not() -> None:
    """Twelve points near one direction and four near another, in two clusters."""
    angles = torch.cat([torch.linspace(0, 0.4, 12), torch.linspace(1.5, 1.6, 4)])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    centroids = equal_size_clusters(points, 2, generator())
    sizes = torch.bincount(sinkhorn(points @ centroids.T).argmax(1), minlength=2)
    assert sorted(sizes.tolist()) == [8, 8]
    nearest, _ = kmeans(points, 2)
    assert sorted(torch.bincount(nearest).tolist()) == [4, 12]


def test_planted_clusters_are_found_up_to_their_order() -> None:
    centres, points = planted(6, 8, 16)
    by_size = equal_size_clusters(points, 6, generator(3))
    nearest, by_distance = kmeans(points, 6)
    assert torch.bincount(nearest).tolist() == [8] * 6
    for found in (by_size, unit(by_distance)):
        cosine, place = (centres @ found.T).max(1)
        assert sorted(place.tolist()) == list(range(6))
        assert cosine.min() > 0.98


def test_the_server_divides_the_clients_centroids() -> None:
    centres, points = planted(6, 8, 16)
    start = torch.randn(6, 16, generator=generator(1)).numpy()
    found = global_centroids(start, points.numpy(), steps=300)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert found.dtype == start.dtype
    home = (centres.numpy() @ found.T).argmax(1)
    assert sorted(home) == list(range(6)), "each planted cluster has a global centroid of its own"
    assert ((points.numpy() @ found.T).argmax(1) == home[(points @ centres.T).argmax(1).numpy()]).all()
    assert found.tobytes() == global_centroids(start, points.numpy(), steps=300).tobytes()
    still = global_centroids(start, points.numpy(), steps=0)
    np.testing.assert_allclose(still, start / np.linalg.norm(start, axis=1, keepdims=True), rtol=1e-6)


def test_fewer_points_than_clusters() -> None:
    one = unit(torch.ones(1, 4))
    torch.testing.assert_close(equal_size_clusters(one, 3, generator()), one.repeat(3, 1))
    nearest, centroids = kmeans(one, 3)
    assert nearest.tolist() == [0]
    torch.testing.assert_close(centroids, one.repeat(3, 1))


# Orchestra.


def orchestra_model(*overrides: str, modality: str = "images") -> tuple[Job, Model]:
    job = job_of(*RULES["orchestra"], *overrides, modality=modality)
    return job, build_model(job, job.data.load().train.shape, 16).train()


def batch_of(job: Job, n: int = 8) -> Batch:
    index = torch.arange(n)
    examples = job.data.load().train.shard(np.arange(n), 0).batch(index)
    return Batch(job.data.augment.views(examples, generator(), job.method.views), index)


def test_the_orchestra_loss_by_hand() -> None:
    job, model = orchestra_model("method.rotation=0")
    batch = batch_of(job)
    with torch.no_grad():
        # A teacher that starts equal to its student; batch normalisation sees one view at a time.
        z, key = (unit(model["projector"](model["encoder"](view))).double() for view in batch.views)
    centroids = unit(model["centroids"].weight).double()
    wanted, found = ((x @ centroids.T / 0.1).softmax(1) for x in (key, z))
    loss = -(wanted * found.log()).sum(1).mean()
    assert job.method.loss(model, batch, STEP).loss.item() == pytest.approx(loss.item(), rel=1e-4)


def test_rotations_are_told_apart_and_balanced() -> None:
    image = torch.arange(4.0).reshape(1, 1, 2, 2)
    turned = quarter_turns(image.expand(4, 1, 2, 2), torch.arange(4))
    assert turned[:, 0].reshape(4, 4).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    job, model = orchestra_model()
    out = job.method.loss(model, batch_of(job), STEP)
    assert out.aux["rotation_loss"].item() == pytest.approx(math.log(4), abs=0.5)
    assert out.loss.item() == pytest.approx((out.aux["cluster_loss"] + out.aux["rotation_loss"]).item(), rel=1e-6)
    half = job_of(*RULES["orchestra"], "method.rotation=0.5").method.loss(model, batch_of(job), STEP)
    assert half.loss.item() == pytest.approx(
        (out.aux["cluster_loss"] + 0.5 * out.aux["rotation_loss"]).item(), rel=1e-6
    )


def test_the_memory_is_clustered_by_what_it_holds() -> None:
    """Places that were never filled are no points: two examples seen give two directions, whatever the size."""
    job, model = orchestra_model()
    out = job.method.loss(model, batch_of(job, 2), STEP)
    job.method.after_step(model, out, STEP)
    shard = job.data.load().train.shard(np.arange(2), 0)
    assert job.method.before_upload(model, shard, None, job.data.augment, generator()) == {}
    value = model["local_centroids"].value
    torch.testing.assert_close(value.norm(dim=1), torch.ones(4))
    nearest = (value @ unit(out.aux["keys"]).T).max(1).values
    torch.testing.assert_close(nearest, torch.ones(4))


@pytest.mark.parametrize("modality", ["timeseries", "graphs"])
def test_without_rotations_orchestra_takes_other_modalities(modality: str, plan: Compose) -> None:
    with pytest.raises(ConfigError, match="makes no sense on"):
        orchestra_model(modality=modality)
    job, model = orchestra_model("method.rotation=0", modality=modality)
    assert "rotation" not in model
    out = job.method.loss(model, batch_of(job), STEP)
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_only_square_images_are_turned() -> None:
    job = job_of(*RULES["orchestra"])
    with pytest.raises(ConfigError, match="not square"):
        build_model(job, (1, 8, 12))


def orchestra_updates(steps: tuple[int, ...] = (1, 1)) -> tuple[Arrays, list[Update]]:
    now = {
        "encoder.w": np.zeros(2, np.float32),
        GLOBAL: np.eye(2, 3, dtype=np.float32),
        LOCAL: np.zeros((2, 3), np.float32),
    }
    sent = [np.eye(2, 3, dtype=np.float32), np.eye(2, 3, k=1, dtype=np.float32)]
    arrays = [{"encoder.w": np.full(2, 1.0 + 3 * i, np.float32), LOCAL: sent[i]} for i in range(2)]
    return now, [Update(a, [30.0, 10.0][i], i, {"steps": steps[i]}) for i, a in enumerate(arrays)]


def test_the_server_pools_the_centroids_of_who_came() -> None:
    now, updates = orchestra_updates()
    merged = OrchestraRule(steps=20).merge(now, updates)
    pooled = np.concatenate([update.arrays[LOCAL] for update in updates])
    np.testing.assert_array_equal(merged[GLOBAL], global_centroids(now[GLOBAL], pooled, steps=20))
    alone = OrchestraRule(steps=20).merge(now, updates[:1])
    np.testing.assert_array_equal(alone[GLOBAL], global_centroids(now[GLOBAL], updates[0].arrays[LOCAL], steps=20))
    assert not merged[LOCAL].any(), "no client receives the clusters of another"


def test_18_networks_are_weighed_by_batches() -> None:
    """So that results cannot be compared. Here by examples, and by batches if asked."""
    now, updates = orchestra_updates(steps=(1, 1))
    assert OrchestraRule(steps=0).merge(now, updates)["encoder.w"][0] == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert OrchestraRule(steps=0, weighting="batches").merge(now, updates)["encoder.w"][0] == pytest.approx(2.5)


def test_5_the_memory_of_single_examples_is_uploaded(plan: Compose) -> None:
    """With the teacher, in 49.7% of the parameters. Here neither travels, and neither can be told to."""
    rundir = execute(plan(*RULES["orchestra"], "federation.rounds=1"))
    travels = {key.partition(".")[0] for key in final_arrays(rundir)}
    assert travels == {"encoder", "projector", "rotation", "centroids", "local_centroids"}
    assert not final_arrays(rundir)["local_centroids.value"].any()
    up, down = (sum(e["bytes"] for e in rundir.read("payload.json")[way] if e["shape"]) for way in ("up", "down"))
    assert down - up == final_arrays(rundir)["centroids.weight"].nbytes, "the server's centroids do not come back"
    kept = state_files.newest(rundir.clients, 0, 1)
    assert kept is not None
    assert state_files.read(kept).local["memory.keys"].any()
    job = job_of(*RULES["orchestra"], "strategy.share.memory=merge")
    with pytest.raises(PrivacyError, match="memory"):
        shares_of(job, build_model(job, (3, 8, 8)))


# FedSC.


def test_projections_are_shortened_not_stretched() -> None:
    z = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]], requires_grad=True)
    short = shortened(z, 4.0)
    torch.testing.assert_close(short, torch.tensor([[1.2, 1.6], [0.6, 0.8], [0.0, 0.0]]))
    short.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def fedsc_model(*overrides: str) -> tuple[Job, FedSC, Model]:
    job = job_of("method=fedsc", *overrides)
    model = build_model(job, job.data.load().train.shape, 16).train()
    assert isinstance(job.method, FedSC)
    return job, job.method, model


@pytest.mark.parametrize("clients", [0, 4])
def test_the_fedsc_loss_by_hand(clients: int) -> None:
    job, method, model = fedsc_model("method.bound=0.01")
    others = np.diag(np.arange(8.0)) + 0.3
    model["correlation"].matrix.copy_(torch.from_numpy(others))
    model["correlation"].clients.fill_(clients)
    batch, step = batch_of(job), Step(round=6, rounds=10, step=0, steps=5)
    with torch.no_grad():
        z = [model["projector"](model["encoder"](view)).double().numpy() for view in batch.views]
    z = [x * np.minimum(1, 0.1 / np.linalg.norm(x, axis=1, keepdims=True)) for x in z]
    both = np.concatenate(z)
    own = both.T @ both / 16
    alpha = 1 - 0.8 * 0.5 if clients else 1.0
    loss = -2 * np.trace(z[0] @ z[1].T) / 8 + alpha * np.trace(own @ own) + 2 * (1 - alpha) * np.trace(own @ others)
    assert method.loss(model, batch, step).loss.item() == pytest.approx(loss, rel=1e-5)


def replies(matrices: Mapping[int, float], weights: Mapping[int, float]) -> list[Update]:
    """Uploads of 2 x 2 matrices `value * 1`, with a network of one number that is the client's."""
    return [
        Update(
            {
                "encoder.w": np.array([float(k)], np.float32),
                MATRIX: np.eye(2, dtype=np.float32) * v,
                CLIENTS: np.array(0),
            },
            weights[k],
            k,
            {},
        )
        for k, v in matrices.items()
    ]


def merged_by(rule: FedSCRule, updates: list[Update]) -> Arrays:
    """As the strategy's streaming mean does it: each part by its own weights."""
    parts = {}
    for key, part in (("encoder.w", "encoder"), (MATRIX, "correlation"), (CLIENTS, "correlation")):
        weights = [rule.weigh(update, part) for update in updates]
        parts |= rules.weighted_mean([{key: update.arrays[key]} for update in updates], weights)
    now = {"encoder.w": np.zeros(1), MATRIX: np.zeros((2, 2)), CLIENTS: np.array(0)}
    return rule.merge(now, [Update(parts, sum(u.weight for u in updates), None, {}, len(updates))])


def test_the_others_correlation_by_hand() -> None:
    """Three clients with C = 1, 2, 6: each gets the mean of the two others; examples weigh networks only."""
    rule, sent = FedSCRule(), {0: 1.0, 1: 2.0, 2: 6.0}
    updates = replies(sent, {0: 10, 1: 10, 2: 20})
    merged = merged_by(rule, updates)
    assert merged["encoder.w"][0] == pytest.approx((0 + 10 + 40) / 40)
    assert merged[MATRIX][0, 0] == pytest.approx(3.0)
    assert merged[CLIENTS] == 3
    for client, expected in ((0, 4.0), (1, 3.5), (2, 1.5)):
        own = Own({MATRIX: updates[client].arrays[MATRIX]}, {}, 5)
        start, _ = rule.receive(merged, own, 6, NOWHERE)
        np.testing.assert_allclose(start[MATRIX], np.eye(2) * expected, rtol=1e-6)
        assert start[CLIENTS] == 2
        assert start[MATRIX].dtype == np.float32
        absent, _ = rule.receive(merged, own, 7, NOWHERE)
        assert absent[MATRIX][0, 0] == pytest.approx(3.0), "its own is not in a mean of a round that it sat out"
        assert absent[CLIENTS] == 3
    new, _ = rule.receive(merged, Own(), 6, NOWHERE)
    assert new[CLIENTS] == 3
    alone, _ = rule.receive(merged_by(rule, updates[:1]), Own({MATRIX: updates[0].arrays[MATRIX]}, {}, 5), 6, NOWHERE)
    assert (alone[CLIENTS], alone[MATRIX].any()) == (0, False), "nobody else came: the loss is local"


def test_8_the_correlations_are_not_shared_as_released(plan: Compose) -> None:
    """`share_cov: False`. Here the first round is local, and from the second on each client reads the others'."""
    quiet = ("method=fedsc", "federation.rounds=2")
    first = final_arrays(execute(plan(*quiet[:1], "federation.rounds=1", name="one")))
    assert first["correlation.clients"] == 3
    assert np.trace(first["correlation.matrix"]) > 0
    shared = final_arrays(execute(plan(*quiet, name="shared")))
    local = final_arrays(execute(plan(*quiet, "method.alpha_end=1.0", name="local")))
    assert any((shared[k] != local[k]).any() for k in shared if k.startswith("encoder"))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999))
def test_the_sensitivity_holds(views: int, n: int, seed: int) -> None:
    """Replacing one record's projections, each of length at most sqrt(bound), moves C no further."""
    bound = 4.0
    z = shortened(torch.randn(n + 1, views, 6, generator=generator(seed)).double().flatten(0, 1) * 3, bound)
    each = torch.stack([x.T @ x / views for x in z.reshape(n + 1, views, 6)])
    before, after = each[:-1].mean(0), torch.cat([each[1:-1], each[-1:]]).mean(0)
    assert (before - after).norm().item() <= correlation_sensitivity(bound, n) * (1 + 1e-12)


def test_the_sensitivity_is_attained() -> None:
    """By two orthogonal projections of full length; adding a record to a fixed n moves C by bound / n."""
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    apart = (torch.outer(a, a) - torch.outer(b, b)) / 50
    assert apart.norm().item() == pytest.approx(correlation_sensitivity(4.0, 50), rel=1e-6)
    assert (torch.outer(a, a) / 50).norm().item() == pytest.approx(4.0 / 50)


class Replaced:
    """A shard whose first example is another."""

    def __init__(self, shard: Any, other: Tensor) -> None:
        self.shard, self.other = shard, other

    def __len__(self) -> int:
        return len(self.shard)

    def batch(self, index: Tensor) -> Tensor:
        x: Tensor = self.shard.batch(index).clone()
        x[index == 0] = self.other
        return x


def test_a_record_moves_the_matrix_by_itself_alone() -> None:
    """Even behind batch normalisation: the rest is the same, so the difference has the rank of two records' views."""
    job, method, model = fedsc_model("encoder.norm=batch", "method.norm=batch", "method.passes=1", "method.bound=0.5")
    shard = job.data.load().train.shard(np.arange(12), 0)
    other = Replaced(shard, 255 - shard.batch(torch.arange(1))[0])
    first, second = (method.matrix_of(model, x, job.data.augment, generator(3)) for x in (shard, other))
    assert 0 < (first - second).norm().item() <= correlation_sensitivity(0.5, 12)
    assert torch.linalg.matrix_rank(first - second, tol=1e-6).item() <= 4 < len(first)
    assert model.training


def test_the_noise_is_symmetric_and_of_its_size() -> None:
    noise = symmetric_noise(400, 2.0, generator())
    assert torch.equal(noise, noise.T)
    assert noise.diagonal().std().item() == pytest.approx(2.0, rel=0.15)
    off = noise[torch.triu(torch.ones(400, 400), diagonal=1) > 0]
    assert off.std().item() == pytest.approx(2.0 / math.sqrt(2), rel=0.02)


def test_15_the_noise_is_hard_coded_and_not_accounted() -> None:
    """0.00104 for every client and no epsilon. Here it is a multiple of the sensitivity, and every release counts."""
    deviations, shard = {}, job_of("method=fedsc").data.load().train
    for n in (8, 32):
        job, method, model = fedsc_model("method.noise=1.5", "method.passes=1")
        own = shard.shard(np.arange(n), 0)
        model["correlation"].matrix.zero_()
        clean = method.matrix_of(model, own, job.data.augment, generator(n))
        spent = []
        for release in (1, 2, 3):
            said = method.before_upload(model, own, None, job.data.augment, generator(n))
            assert said["correlation_epsilon"].item() == pytest.approx(gaussian_epsilon(1.5, release, 1e-5))
            spent.append(said["correlation_epsilon"].item())
        assert spent == sorted(set(spent)), "releases add up"
        noise = model["correlation"].matrix - clean
        assert torch.equal(noise, noise.T) or torch.allclose(noise, noise.T, atol=1e-6)
        deviations[n] = noise.diagonal().std().item() * n
        assert noise.norm().item() == pytest.approx(1.5 * math.sqrt(2) * 4 / n * math.sqrt(8 + 28), rel=0.5)
    assert 0.3 < deviations[8] / deviations[32] < 3, "the same after scaling by n"


def test_without_noise_nothing_is_claimed() -> None:
    job, method, model = fedsc_model()
    own = job.data.load().train.shard(np.arange(8), 0)
    assert method.before_upload(model, own, None, job.data.augment, generator()) == {}


def test_epsilon_against_opacus_and_by_hand() -> None:
    """The card of the released constants: 5.2 for one release of 5000 examples, 56 for 41, by RDP; exactly less."""
    from opacus.accountants import RDPAccountant

    multiplier = 0.0052 / 10 * 2 / correlation_sensitivity(4.0, 5000)
    assert multiplier == pytest.approx(0.919, abs=1e-3)
    for releases, by_rdp in ((1, 5.2), (41, 56.0)):
        accountant = RDPAccountant()
        for _ in range(releases):
            accountant.step(noise_multiplier=multiplier, sample_rate=1.0)
        bound = accountant.get_epsilon(1e-5)
        assert bound == pytest.approx(by_rdp, abs=0.15)
        assert 0.9 * bound < gaussian_epsilon(multiplier, releases, 1e-5) < bound
    # Known values of the Gaussian mechanism: sensitivity over deviation 1 and 2, delta 1e-5.
    assert gaussian_epsilon(1.0, 1, 1e-5) == pytest.approx(4.3772, abs=1e-4)
    assert gaussian_epsilon(0.5, 1, 1e-5) == pytest.approx(9.997, abs=1e-3)
    assert gaussian_epsilon(2.0, 16, 1e-5) == pytest.approx(gaussian_epsilon(0.5, 1, 1e-5), rel=1e-9)
    assert gaussian_epsilon(0.0, 1, 1e-5) == math.inf
    assert gaussian_epsilon(0.0, 0, 1e-5) == 0.0
    assert gaussian_epsilon(1e6, 1, 1e-2) == 0.0
    assert gaussian_epsilon(0.01, 1000, 1e-5) == pytest.approx(0.5 * 1000 / 0.01**2, rel=0.01)
    with pytest.raises(ConfigError, match="delta"):
        gaussian_epsilon(1.0, 1, 0.0)


# Calibre.


def test_calibre_weighs_by_the_inverse_divergence() -> None:
    rule = Calibre()
    updates = [Update({}, 10.0 * (i + 1), i, {"divergence": d}) for i, d in enumerate((0.1, 0.2, 0.4))]
    weights = np.array([rule.weigh(update, "encoder") for update in updates])
    np.testing.assert_allclose(weights / weights.sum(), [4 / 7, 2 / 7, 1 / 7], rtol=1e-6)
    assert (weights == np.rint(weights)).all(), "whole, so that the mean does not depend on the order"
    both = np.array([Calibre(weighting="both").weigh(update, "encoder") for update in updates])
    np.testing.assert_allclose(both / both.sum(), np.array([10 / 0.1, 20 / 0.2, 30 / 0.4]) / 275, rtol=1e-6)
    tight = rule.weigh(Update({}, 1.0, 0, {"divergence": 0.0}), "encoder")
    assert tight == rule.weigh(Update({}, 1.0, 0, {"divergence": 0.05}), "encoder"), "no client counts without bound"
    with pytest.raises(ProtocolError, match="divergence"):
        rule.weigh(Update({}, 1.0, 2, {}), "encoder")


def test_divergence_by_hand() -> None:
    """Two clusters: one with distances 1, 1 to its centroid, one with a single point."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    assert divergence(x, 2).item() == pytest.approx(0.5)
    assert divergence(x, 10).item() == 0.0


def test_the_prototype_losses_by_hand() -> None:
    a, b = torch.eye(3, dtype=torch.float32) * 2, torch.eye(3)
    there = torch.tensor([True, True, False])
    wanted = math.log(1 + 2 * math.exp(-1 / 0.5))
    assert prototype_contrast(a, b, there, 0.5).item() == pytest.approx(wanted, rel=1e-5)
    members = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    entropy = prototype_entropy(a, b, members, there).item()
    assert entropy == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    for nobody in (prototype_contrast, prototype_entropy):
        z = torch.randn(3, 4, generator=generator(), requires_grad=True)
        args: Any = (z, z, torch.zeros(3, dtype=torch.bool), 0.5) if nobody is prototype_contrast else (z, z, members)
        value = nobody(*args) if nobody is prototype_contrast else nobody(z, z, members, torch.zeros(3) > 0)
        value.backward()
        assert value.item() == 0.0
        assert z.grad is not None
        assert not z.grad.any()


# Which method goes with which strategy.


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("method=orchestra", "strategy=fedavg"), "use strategy=orchestra"),
        (("method=fedsc", "strategy=fedadam"), "use strategy=fedsc"),
        (("method=fedsc", "strategy=orchestra"), "needs 'centroids'"),
        (("method=simclr", "strategy=orchestra"), "use method=orchestra"),
        (("method=spectral", "strategy=fedsc"), "use method=fedsc"),
        (("method=simclr", "strategy=calibre"), "use method=calibre"),
        (("method=fedsc", "strategy=fedsc", "strategy.share.correlation=local"), "leave it out"),
        (("method=orchestra", "strategy=orchestra", "baselines=true"), "baselines=false"),
        (("method=orchestra", "strategy=fedavg", "local.decorrelation=0.1"), "use strategy=orchestra"),
    ],
)
def test_one_half_without_the_other_is_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(*overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_calibre_may_be_merged_by_others(plan: Compose) -> None:
    execute(plan("method=calibre", "strategy=fedavg", "federation.rounds=1"))


# Whole runs.


@pytest.mark.parametrize("name", RULES)
def test_two_rounds_and_a_kill_and_two(name: str, plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as four, on one worker and on two, with some clients absent in each round."""
    options = (*RULES[name], "federation.rounds=4", "participation.fraction=0.67", "evaluate.every=1")
    straight = execute(plan(*options, "engine.workers=1", name="straight"))
    broken = interrupted(plan(*options, name="broken"), 2, monkeypatch)
    assert not broken.done
    resumed = execute(plan(*options, name="broken"))
    assert_same(final_arrays(straight), final_arrays(resumed))
    assert metrics(straight) == metrics(resumed)
    rows = resumed.rows("clients.jsonl")
    assert [{k: v for k, v in r.items() if "seconds" not in k} for r in rows] == [
        {k: v for k, v in r.items() if "seconds" not in k} for r in straight.rows("clients.jsonl")
    ]
    if name == "fedsc":
        for client in range(3):
            spent = [row["correlation_epsilon"] for row in rows if row["client"] == client]
            expected = [gaussian_epsilon(2.0, i + 1, 1e-5) for i in range(len(spent))]
            np.testing.assert_allclose(spent, expected, rtol=1e-6)  # across rounds, absences and the kill
    if name == "calibre":
        assert all(row["divergence"] > 0 for row in rows)


def test_drift_is_of_weights(plan: Compose) -> None:
    """Centroids of length 1 that come from nowhere are no drift."""
    rows = execute(plan(*RULES["orchestra"], "method.norm=layer", "federation.rounds=1", "local.lr=1e-9")).rows()
    assert rows[0]["drift"] < 1e-3


def test_the_upload_is_the_summary_of_this_client() -> None:
    """Not the others' matrix that it trained with."""
    job, method, model = fedsc_model()
    model["correlation"].matrix.fill_(7.0)
    model["correlation"].clients.fill_(2)
    own = job.data.load().train.shard(np.arange(8), 0)
    method.before_upload(model, own, None, job.data.augment, generator())
    sent = to_arrays(model)
    expected = method.matrix_of(model, own, job.data.augment, generator())
    np.testing.assert_array_equal(sent["correlation.matrix"], expected.numpy())
    assert np.trace(sent["correlation.matrix"]) <= method.bound
    assert sent["correlation.clients"] == 0
