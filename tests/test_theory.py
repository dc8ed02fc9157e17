"""Theory: every closed form against a computation of another kind: brute force, autograd, simulation, Monte Carlo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fedssl import losses, theory
from fedssl.errors import ConfigError
from fedssl.theory import LinearSimSiam, linear_simsiam, simulate_linear_simsiam

property_test = settings(max_examples=25, deadline=None, derandomize=True)
seeded = st.integers(0, 10_000)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def distribution(*shape: int, seed: int = 0) -> np.ndarray:
    p = np.random.default_rng(seed).gamma(0.7, size=shape) + 1e-3
    return p / p.sum()


def tensor(x: np.ndarray) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# T1, T2: InfoNCE is a softmax classifier


@property_test
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.floats(0.05, 5), st.booleans(), seeded)
def test_info_nce_is_a_cross_entropy(b: int, k: int, d: int, t: float, cosine: bool, seed: int) -> None:
    a, p, n = normal(b, d, seed=seed), normal(b, d, seed=seed + 1), normal(k, d, seed=seed + 2)
    kind = "cosine" if cosine else "dot"
    logits = theory.info_nce_logits(a, p, n, t, similarity=kind)
    found = theory.cross_entropy(logits, 0)
    np.testing.assert_allclose(found, F.cross_entropy(tensor(logits), torch.zeros(b).long(), reduction="none"))
    loss = losses.info_nce(tensor(a), tensor(p), tensor(n), temperature=t, similarity=kind)
    np.testing.assert_allclose(found, loss, rtol=1e-9, atol=1e-12)
    i, j = seed % b, seed % k
    size = np.linalg.norm(a[i]) * np.linalg.norm(n[j]) if cosine else 1
    assert logits[i, 1 + j] == pytest.approx(float(a[i] @ n[j]) / size / t)


def test_instance_discrimination_is_a_linear_layer_of_keys() -> None:
    keys, t = normal(9, 5), 0.2
    weight, bias = theory.instance_classifier(keys, t)
    layer = torch.nn.Linear(5, 9, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(tensor(weight))
        layer.bias.copy_(tensor(bias))
    assert not bias.any()
    for i in range(9):
        query = F.normalize(tensor(normal(1, 5, seed=i + 1)), dim=1).requires_grad_()
        linear = F.cross_entropy(layer(query), torch.tensor([i]))
        others = tensor(np.delete(keys, i, axis=0))
        contrast = losses.info_nce(query, tensor(keys[i : i + 1]), others, temperature=t, similarity="cosine").sum()
        torch.testing.assert_close(linear, contrast)
        tangent = torch.eye(5, dtype=torch.float64) - query.T @ query  # the cosine ignores the query's length
        (one,), (other,) = torch.autograd.grad(linear, query), torch.autograd.grad(contrast, query)
        torch.testing.assert_close((one @ tangent).detach(), other)


def test_imprinting_is_the_mean_of_unit_keys_and_classifies() -> None:
    centres = 1.5 * normal(4, 10)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 300)
    keys = centres[labels] + normal(300, 10, seed=2)
    weight = theory.imprint_classifier(keys, labels, 6)
    for c in range(4):
        mean = np.mean([k / np.linalg.norm(k) for k in keys[labels == c]], axis=0)
        np.testing.assert_allclose(weight[c], mean / np.linalg.norm(mean), rtol=1e-12)
    assert not weight[4:].any()
    scale = rng.uniform(1e-200, 1e200, size=(300, 1))
    np.testing.assert_allclose(theory.imprint_classifier(scale * keys, labels, 6), weight, rtol=1e-9, atol=1e-12)

    test = rng.integers(0, 4, 500)
    x = centres[test] + normal(500, 10, seed=3)
    trained = LogisticRegression(max_iter=500).fit(keys, labels).score(x, test)
    imprinted = float(((x @ weight[:4].T).argmax(1) == test).mean())
    assert trained > 0.9
    assert imprinted > trained - 0.05


def test_imprints_of_clients_do_not_average_to_the_imprint_of_all() -> None:
    keys, labels = normal(40, 6), np.zeros(40, dtype=int)
    keys[20:] += 3  # the second client's keys agree, the first one's do not
    parts = [theory.imprint_classifier(keys[rows], labels[rows], 1) for rows in (slice(20), slice(20, 40))]
    mean = np.mean(parts, axis=0)
    whole = theory.imprint_classifier(keys, labels, 1)
    assert float((mean / np.linalg.norm(mean) * whole).sum()) < 0.98
    assert not theory.imprint_classifier(np.array([[1.0, 2.0], [-3.0, -6.0]]), np.array([0, 0]), 1).any()


# T3: what the optimal critic is


def every_tuple(critic: np.ndarray, joint: np.ndarray, noise: np.ndarray, k: int) -> float:
    """The expected loss by its definition, one tuple of negatives after the other."""
    loss = 0.0
    for x, y in itertools.product(*map(range, joint.shape)):
        for drawn in itertools.product(range(len(noise)), repeat=k):
            scores = [critic[x, y], *(critic[x, j] for j in drawn)]
            chance = joint[x, y] * math.prod(noise[j] for j in drawn)
            loss += chance * (math.log(sum(math.exp(s) for s in scores)) - scores[0])
    return loss


@property_test
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 4), seeded)
def test_expected_loss_sums_over_every_tuple(xs: int, ys: int, k: int, seed: int) -> None:
    joint, noise = distribution(xs, ys, seed=seed), distribution(ys, seed=seed + 1)
    critic = normal(xs, ys, seed=seed)
    found = theory.expected_info_nce(critic, joint, noise, k)
    assert found == pytest.approx(every_tuple(critic, joint, noise, k), rel=1e-9, abs=1e-12)
    least = theory.optimal_info_nce(joint, noise, k)
    best = theory.optimal_critic(joint, noise)
    assert least == pytest.approx(every_tuple(best, joint, noise, k), rel=1e-9, abs=1e-12)
    assert least <= found + 1e-12
    for size in (1e-2, 0.3):
        assert least <= theory.expected_info_nce(best + size * critic, joint, noise, k) + 1e-12
    shifted = theory.optimal_critic(joint, noise, offset=normal(xs, seed=seed))
    assert theory.expected_info_nce(shifted, joint, noise, k) == pytest.approx(least)


def trained_critic(joint: np.ndarray, noise: np.ndarray, k: int) -> np.ndarray:
    """Minimises the enumerated loss from 0 with a quasi-Newton method."""
    drawn = torch.tensor(list(itertools.product(range(len(noise)), repeat=k)))  # (T, K)
    chance = tensor(noise)[drawn].prod(1)
    p = tensor(joint)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        s = tensor(flat).reshape(p.shape).requires_grad_()
        against = s[:, drawn].logsumexp(2)  # (X, T)
        each = torch.logaddexp(s[:, :, None], against[:, None]) - s[:, :, None]  # (X, Y, T)
        value = (p * (each @ chance)).sum()
        return float(value.detach()), torch.autograd.grad(value, s)[0].flatten().numpy()

    found = optimize.minimize(loss, np.zeros(p.numel()), jac=True, method="BFGS", options={"gtol": 1e-9})
    return np.asarray(found.x).reshape(joint.shape)


def test_a_trained_critic_recovers_the_ratio_for_any_noise() -> None:
    joint = distribution(3, 4, seed=5)
    for noise in (joint.sum(0), distribution(4, seed=6)):
        trained, best = trained_critic(joint, noise, 2), theory.optimal_critic(joint, noise)
        np.testing.assert_allclose(
            trained - trained.mean(1, keepdims=True), best - best.mean(1, keepdims=True), atol=1e-4
        )
        value = theory.expected_info_nce(trained, joint, noise, 2)
        assert value == pytest.approx(theory.optimal_info_nce(joint, noise, 2), abs=1e-9)


def test_bound_of_the_optimal_critic_rises_to_the_mutual_information() -> None:
    joint = distribution(3, 4, seed=5)
    true = float(stats.entropy(joint.flatten(), np.outer(joint.sum(1), joint.sum(0)).flatten()))
    assert theory.mutual_information(joint) == pytest.approx(true)
    gaps = [true - math.log(1 + k) + theory.optimal_info_nce(joint, joint.sum(0), k) for k in (0, 1, 2, 4, 8, 16, 32)]
    assert gaps[0] == pytest.approx(true)
    assert min(gaps) > 0
    assert np.all(np.diff(gaps) < 0)
    assert gaps[-1] * 33 == pytest.approx(gaps[-2] * 17, rel=0.1)  # falls like 1 / N


def test_critics_where_a_probability_is_zero() -> None:
    joint = np.array([[0.3, 0.2, 0.0], [0.0, 0.25, 0.25]])
    noise = np.array([0.5, 0.5, 0.0])
    critic = theory.optimal_critic(joint, noise)
    assert critic[0, 2] == critic[1, 0] == -math.inf
    assert critic[1, 2] == math.inf
    loss = theory.expected_info_nce(critic, joint, noise, 1)
    sure = np.where(np.isinf(critic), np.sign(critic) * 200, critic)
    assert loss == pytest.approx(every_tuple(sure, joint, noise, 1))
    assert theory.expected_info_nce(-critic, joint, noise, 1) == math.inf
    assert theory.optimal_info_nce(np.array([[0.0, 0.5], [0.0, 0.5]]), np.array([1.0, 0.0]), 3) == 0


@property_test
@given(st.integers(1, 4), st.integers(1, 5), seeded)
def test_average_of_local_critics_is_biased_by_the_mean_of_log_ratios(m: int, ys: int, seed: int) -> None:
    joint, noises = distribution(3, ys, seed=seed), np.stack([distribution(ys, seed=seed + i) for i in range(m)])
    weights = np.random.default_rng(seed).uniform(0.1, 1, m)
    share = weights / weights.sum()
    local = np.stack([theory.optimal_critic(joint, q) for q in noises])
    centre = theory.optimal_critic(joint, share @ noises)
    bias = theory.critic_bias(noises, weights)
    average = np.tensordot(share, local, axes=1)
    np.testing.assert_allclose(average - centre, np.broadcast_to(bias, (3, ys)), atol=1e-12)
    assert np.all(bias >= 0)
    divergence = share @ [stats.entropy(share @ noises, q) for q in noises]
    assert share @ noises @ bias == pytest.approx(divergence, abs=1e-12)


def test_label_skew_costs_the_average_of_critics_loss() -> None:
    joint, excess, spread = distribution(3, 4, seed=5), [], []
    q = joint.sum(0)
    for skew in (0.0, 0.5, 0.9, 0.99):  # each of four clients draws more of its own outcome; their mean stays q
        noises = (1 - skew) * q + skew * np.eye(4)
        average = np.tensordot(q, np.stack([theory.optimal_critic(joint, n) for n in noises]), axes=1)
        excess.append(theory.expected_info_nce(average, joint, q, 3) - theory.optimal_info_nce(joint, q, 3))
        spread.append(np.ptp(theory.critic_bias(noises, q)))
    assert excess[0] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(excess) > 0)
    assert np.all(np.diff(spread) > 0)
    one_sided = theory.critic_bias([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert one_sided[0] == pytest.approx(math.log(0.75) - math.log(0.5) / 2)
    assert one_sided[1] == math.inf
    assert math.isnan(one_sided[2])


# T4: the bound and its bias


@property_test
@given(st.floats(-0.99, 0.99), st.integers(1, 6))
def test_gaussian_information_is_that_of_the_covariance(rho: float, d: int) -> None:
    cov = np.block([[np.eye(d), rho * np.eye(d)], [rho * np.eye(d), np.eye(d)]])
    found = theory.gaussian_mutual_information(rho, d)
    assert found == pytest.approx(-np.linalg.slogdet(cov)[1] / 2, rel=1e-9, abs=1e-12)
    assert theory.gaussian_correlation(found, d) == pytest.approx(abs(rho), rel=1e-6, abs=1e-7)


def log_ratio(x: np.ndarray, y: np.ndarray, rho: float) -> np.ndarray:
    return stats.norm.logpdf(y, rho * x, math.sqrt(1 - rho**2)) - stats.norm.logpdf(y)


def test_bias_for_two_candidates_matches_quadrature() -> None:
    rho = 0.6
    u, weight = np.polynomial.hermite_e.hermegauss(48)
    weight = weight / weight.sum()
    x, e, n = np.meshgrid(u, u, u, indexing="ij")
    y = rho * x + math.sqrt(1 - rho**2) * e
    mean = np.logaddexp(log_ratio(x, y, rho), log_ratio(x, n, rho)) - math.log(2)
    exact = float(np.einsum("i,j,k,ijk", weight, weight, weight, mean))
    found = theory.info_nce_bias(rho, 1, 2, trials=40_000)
    assert found.error < 3e-3
    assert found.value == pytest.approx(exact, abs=4 * found.error)


def test_bound_matches_a_plain_monte_carlo_of_the_loss() -> None:
    rho, dims, n, trials = 0.8, 2, 16, 20_000
    rng = np.random.default_rng(3)
    x = rng.normal(size=(trials, 1, dims))
    y = rng.normal(size=(trials, n, dims))
    y[:, :1] = rho * x + math.sqrt(1 - rho**2) * y[:, :1]
    scores = log_ratio(x, y, rho).sum(2)
    loss = theory.cross_entropy(scores, 0)
    plain, error = math.log(n) - loss.mean(), loss.std() / math.sqrt(trials)
    found = theory.info_nce_bound(rho, dims, n, trials=trials)
    assert found.value == pytest.approx(plain, abs=4 * math.hypot(error, found.error))
    assert found.value < min(theory.gaussian_mutual_information(rho, dims), math.log(n))
    assert found == theory.info_nce_bound(rho, dims, n, trials=trials)  # seeded
    assert found != theory.info_nce_bound(rho, dims, n, trials=trials, seed=1)


def test_bias_falls_like_one_over_n_only_beyond_exp_of_twice_the_information() -> None:
    rho = 0.5
    nats = theory.gaussian_mutual_information(rho)
    one = theory.info_nce_bias(rho, 1, 1, trials=20_000)
    assert one.value == pytest.approx(nats, abs=4 * one.error)
    sizes = [16, 64, 256]
    biases = [theory.info_nce_bias(rho, 1, n, trials=10_000) for n in sizes]
    assert theory.log_log_slope(sizes, [b.value for b in biases]) == pytest.approx(-1, abs=0.1)
    assert biases[-1].value == pytest.approx(theory.asymptotic_bias(nats, 256), abs=4 * biases[-1].error + 0.03 / 256)

    rho, dims = 0.9, 3  # exp(I) = 12, exp(2 I) = 146
    nats = theory.gaussian_mutual_information(rho, dims)
    sizes = [2, 4, 8, 16]
    early = [theory.info_nce_bias(rho, dims, n, trials=4000) for n in sizes]
    assert all(b.value > nats - math.log(n) - 4 * b.error for b, n in zip(early, sizes, strict=True))
    assert theory.log_log_slope(sizes, [b.value for b in early]) > -0.7


def test_asymptotic_bias_is_half_the_variance_of_a_ratio() -> None:
    rho = 0.6
    grid = np.linspace(-9, 9, 1201)
    x, y = np.meshgrid(grid, grid)
    flat = stats.norm.pdf(x) * stats.norm.pdf(y)
    ratio = np.exp(log_ratio(x, y, rho))
    variance = (flat * (ratio - 1) ** 2).sum() * (grid[1] - grid[0]) ** 2
    assert theory.asymptotic_bias(theory.gaussian_mutual_information(rho), 10) == pytest.approx(variance / 20, rel=1e-6)


@property_test
@given(st.floats(-3, 3), st.floats(0.1, 10), seeded)
def test_log_log_slope_finds_the_exponent(a: float, c: float, seed: int) -> None:
    x = np.random.default_rng(seed).uniform(1, 100, 8)
    assert theory.log_log_slope(x, c * x**a) == pytest.approx(a, abs=1e-9)
    noisy = c * x**a * np.exp(normal(8, seed=seed))
    assert theory.log_log_slope(x, noisy) == pytest.approx(np.polyfit(np.log(x), np.log(noisy), 1)[0], abs=1e-9)


# T5: augmentation defines the invariance


def by_enumeration(c: int, b: int, keep_s: list[float], keep_b: list[float], w: list[float]) -> tuple[float, ...]:
    """The numbers of `TwoFactors` from the full joint of (y, b, s1, b1, s2, b2), summed over clients."""

    def channel(size: int, keep: float) -> np.ndarray:
        return keep * np.eye(size) + (1 - keep) / size

    full = sum(
        share
        / (c * b)
        * np.einsum("yi,yk,bj,bl->ybijkl", channel(c, ks), channel(c, ks), channel(b, kb), channel(b, kb))
        for ks, kb, share in zip(keep_s, keep_b, w, strict=True)
    )
    views = full.sum((0, 1)).reshape(c * b, c * b)  # v1 by v2
    given_first = views / views.sum(1, keepdims=True)
    keys = {tuple(np.round(row, 9)) for row in given_first}
    names = {key: i for i, key in enumerate(sorted(keys))}
    z = np.array([names[tuple(np.round(row, 9))] for row in given_first]).reshape(c, b)  # minimal statistic of v1
    one_hot = np.eye(len(names))[z]  # (c, b, Z)
    information = theory.mutual_information
    return (
        information(views),
        information(full.sum((0, 1, 3, 5))),
        information(full.sum((0, 1, 2, 4))),
        information(one_hot.sum(1)),  # of an example that is not augmented: y and b are uniform
        information(one_hot.sum(0)),
        information(np.einsum("yij,ijz->yz", full.sum((1, 4, 5)), one_hot)),
        information(np.einsum("bij,ijz->bz", full.sum((0, 4, 5)), one_hot)),
    )


chances = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])


@property_test
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.tuples(chances, chances, st.integers(1, 3)), min_size=1, max_size=3),
)
def test_two_factors_match_enumeration(c: int, b: int, clients: list[tuple[float, float, int]]) -> None:
    keep_s, keep_b, weight = (list(column) for column in zip(*clients, strict=True))
    share = [w / sum(weight) for w in weight]
    found = theory.two_factor_information(c, b, keep_s, keep_b, weight)
    np.testing.assert_allclose(found, by_enumeration(c, b, keep_s, keep_b, share), atol=1e-9)
    assert found.views >= found.signal_views + found.background_views - 1e-9


def test_a_crop_that_removes_the_signal_leaves_the_background() -> None:
    crop = theory.two_factor_information(10, 50, 0.0, 1.0)
    assert crop.label == crop.label_view == 0
    assert crop.views == pytest.approx(math.log(50))
    assert crop.background == pytest.approx(math.log(50))
    weak = [theory.two_factor_information(10, 50, k, 1.0) for k in (0.02, 0.04)]
    assert weak[0].label == pytest.approx(math.log(10))  # the best z has the label as soon as views share any of it
    assert weak[1].signal_views / weak[0].signal_views == pytest.approx(16, rel=0.02)  # ... which is next to nothing
    mixed = theory.two_factor_information(10, 50, [0.0, 1.0], [1.0, 0.0])  # two clients with opposite augmentations
    assert mixed.label == pytest.approx(math.log(10))
    assert mixed.background == pytest.approx(math.log(50))


def test_samples_of_the_two_factor_model_have_its_information() -> None:
    factors, views = theory.sample_two_factors(3, 2, 0.6, 0.9, 40_000, seed=0)
    exact = theory.two_factor_information(3, 2, 0.6, 0.9)

    def information(a: np.ndarray, b: np.ndarray) -> float:
        counts = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(counts, (a, b), 1)
        return theory.mutual_information(counts)

    joint = views[..., 0] * 2 + views[..., 1]
    assert information(joint[:, 0], joint[:, 1]) == pytest.approx(exact.views, abs=0.012)
    assert information(factors[:, 0], views[:, 0, 0]) == pytest.approx(exact.label_view, abs=0.012)
    assert information(factors[:, 1], views[:, 1, 1]) == pytest.approx(exact.background_view, abs=0.012)
    assert information(factors[:, 0], views[:, 0, 1]) < 1e-3
    np.testing.assert_array_equal(theory.sample_two_factors(3, 2, 0.6, 0.9, 40_000, seed=0)[1], views)


# T6: gradients and norms


def gradient_of_info_nce(similarity: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    z = tensor(3 * normal(12, 6, seed=seed)).requires_grad_()
    others = tensor(normal(12, 6, seed=seed + 1)), tensor(normal(20, 6, seed=seed + 2))
    losses.info_nce(z, *others, temperature=0.3, similarity=similarity).sum().backward()
    return z.detach().numpy(), z.grad.numpy()


def test_gradients_are_orthogonal_for_cosine_and_not_for_dot() -> None:
    for seed in range(5):
        assert np.abs(theory.radial_component(*gradient_of_info_nce("cosine", seed))).max() < 1e-14
    z, g = gradient_of_info_nce("dot")
    found = theory.radial_component(z, g)
    np.testing.assert_allclose(
        found, [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(z, g, strict=True)]
    )
    assert np.abs(found).max() > 0.1
    np.testing.assert_array_equal(theory.radial_component(np.zeros((2, 3)), np.ones((2, 3))), 0)
    np.testing.assert_allclose(theory.radial_component([[1e300, 0.0]], [[-1e-300, 0.0]]), -1)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_norm_after_a_step(similarity: str) -> None:
    z, g = gradient_of_info_nce(similarity)
    radial = theory.radial_component(z, g)
    for rate in (1e-3, 0.5, 10.0):
        for i, after in enumerate(np.linalg.norm(z - rate * g, axis=1)):
            size, step = float(np.linalg.norm(z[i])), float(np.linalg.norm(g[i]))
            assert theory.norm_after_step(size, step, rate, radial=float(radial[i])) == pytest.approx(after, rel=1e-9)
            if similarity == "cosine":
                assert after > size  # orthogonal steps of any size lengthen


def test_norm_growth_of_descent_on_the_angle() -> None:
    z, c, rate = torch.tensor([1.5, 0.0], dtype=torch.float64), 0.7, 0.3
    lengths = [float(z.norm())]
    for _ in range(200):
        z.requires_grad_()
        (g,) = torch.autograd.grad(c * torch.atan2(z[1], z[0]), z)  # |gradient| = c / |z|
        z = (z - rate * g).detach()
        lengths.append(float(z.norm()))
    found = theory.norm_growth(1.5, c, rate, 200)
    np.testing.assert_allclose(found, lengths, rtol=1e-12)
    long = theory.norm_growth(1.0, 1.0, 0.1, 5000)
    assert long[-1] == pytest.approx((1 + 2 * 0.01 * 5000) ** 0.25, rel=1e-3)
    np.testing.assert_array_equal(theory.norm_growth(2.0, 0.0, 1.0, 3), [2, 2, 2, 2])


# T7: temperature


@property_test
@given(st.integers(1, 6), st.floats(0.01, 10), seeded)
def test_negative_weights_are_shares_of_the_gradient(k: int, t: float, seed: int) -> None:
    scores = tensor(normal(4, 1 + k, seed=seed)).requires_grad_()
    F.cross_entropy(scores / t, torch.zeros(4).long(), reduction="sum").backward()
    pull = scores.grad[:, 1:].numpy()
    assume(np.all(pull.sum(1) > 1e-12))
    found = theory.negative_weights(scores.detach().numpy()[:, 1:], t)
    np.testing.assert_allclose(found, pull / pull.sum(1, keepdims=True), rtol=1e-6, atol=1e-12)


def test_negative_weights_in_the_limits() -> None:
    scores = [0.3, 0.9, -1.0, 0.9]
    np.testing.assert_allclose(theory.negative_weights(scores, 1e-4), [0, 0.5, 0, 0.5], atol=1e-12)
    np.testing.assert_allclose(theory.negative_weights(scores, 1e6), 0.25, atol=1e-6)
    np.testing.assert_allclose(theory.negative_weights([1e5, -1e5], 0.01), [1, 0])


SCORES = [(0.6, 0.2, 0.0, 0.2, 15), (0.1, 0.0, 0.0, 0.5, 3), (0.5, 0.3, 0.2, 0.0, 7), (-0.3, 0.1, 0.2, 0.4, 1)]


@pytest.mark.parametrize("case", SCORES)
def test_moments_of_the_probability_match_monte_carlo(case: tuple[float, float, float, float, int]) -> None:
    mu_p, sd_p, mu_n, sd_n, k = case
    rng = np.random.default_rng(0)
    n = 40_000
    own = mu_p + sd_p * rng.normal(size=(n, 1))
    scores = np.concatenate([own, mu_n + sd_n * rng.normal(size=(n, k))], axis=1)
    for t in (0.02, 0.1, 0.5, 5.0):
        wrong = 1 - np.exp(-theory.cross_entropy(scores / t, 0))
        found = theory.probability_moments(t, *case)
        assert found.missing == pytest.approx(wrong.mean(), abs=4 * wrong.std() / math.sqrt(n))
        square = (wrong - wrong.mean()) ** 2
        assert found.variance == pytest.approx(square.mean(), abs=4 * square.std() / math.sqrt(n))
        snr = theory.gradient_snr(t, *case, 0.5)
        gradient = -wrong / t
        noisy = gradient + 0.5 * rng.normal(size=n)
        assert snr == pytest.approx(abs(gradient.mean()) / noisy.std(), rel=0.05)
        assert theory.positive_probability(t, *case) == pytest.approx(1 - found.missing)


def test_moments_match_adaptive_quadrature_for_one_negative() -> None:
    for t, spread in ((0.5, 0.3), (0.1, 0.8), (0.05, 0.03)):
        width = spread * math.sqrt(2) / t  # p is the sigmoid of one Gaussian difference
        gap = 0.4 / t

        def mean(f: Callable[[float], float], gap: float = gap, width: float = width) -> float:
            marks = [-10.0, -gap / width, 10.0] if abs(gap / width) < 10 else [-10.0, 0.0, 10.0]
            parts = [
                integrate.quad(lambda z: f(gap + width * z) * stats.norm.pdf(z), a, b, epsabs=1e-14, limit=200)[0]
                for a, b in itertools.pairwise(marks)
            ]
            return float(sum(parts))

        missing = mean(lambda v: 1 / (1 + math.exp(min(v, 700))))
        square = mean(lambda v: 1 / (1 + math.exp(min(v, 350))) ** 2)
        found = theory.probability_moments(t, 0.4, spread, 0.0, spread, 1)
        assert found.missing == pytest.approx(missing, rel=1e-8)
        assert found.variance == pytest.approx(square - missing**2, rel=1e-6, abs=1e-13)


def test_signal_to_noise_grows_without_end_unless_there_is_a_floor() -> None:
    case = (0.6, 0.2, 0.0, 0.2, 15)
    grid = np.geomspace(0.05, 100, 60)
    bare = [theory.gradient_snr(t, *case, 0.0) for t in grid]
    assert np.all(np.diff(bare)[grid[1:] > 0.2] > 0)
    law = 16 / math.sqrt(0.2**2 + 0.2**2 / 15)
    assert bare[-1] / grid[-1] == pytest.approx(law, rel=0.01)
    floored = [theory.gradient_snr(t, *case, 1.0) for t in grid]
    best = int(np.argmax(floored))
    assert 0 < best < len(grid) - 1
    assert floored[-1] * grid[-1] == pytest.approx(15 / 16, rel=0.01)  # E[g] / floor
    assert theory.gradient_snr(0.2, 0.5, 0.0, 0.1, 0.0, 3, 0.0) == math.inf
    assert theory.gradient_snr(0.2, 0.5, 0.0, 0.1, 0.0, 3, 2.0) == pytest.approx(3 / (3 + math.exp(2)) / 0.2 / 2)


# T8: the linear SimSiam


def by_autograd(m: LinearSimSiam, w: float, p: float) -> tuple[float, float]:
    """The flow from the loss on eight examples that have the model's second moments exactly."""
    x, n1, n2 = (
        torch.tensor(column, dtype=torch.float64)
        for column in zip(*itertools.product([-1.0, 1.0], repeat=3), strict=True)
    )
    x, n1, n2 = x * math.sqrt(m.signal), n1 * math.sqrt(m.noise), n2 * math.sqrt(m.noise)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (w, p))
    z1, z2 = a * (x + n1), a * (x + n2)
    sides = []
    for mine, target in ((z1, z2), (z2, z1)):
        target = target.detach() if m.stop_gradient else target
        sides.append(((b * mine - target) ** 2 / 2 if m.loss == "mse" else -b * mine * target).mean())
    loss = sum(sides) / 2 + m.weight_decay / 2 * (a**2 + b**2)
    dw, dp = torch.autograd.grad(loss, (a, b))
    return -float(dw), -m.predictor_rate * float(dp)


linear_models = st.builds(
    LinearSimSiam,
    signal=st.floats(0.2, 3),
    noise=st.floats(0, 2),
    weight_decay=st.sampled_from([0.0, 0.05, 0.3]),
    stop_gradient=st.booleans(),
    predictor_rate=st.floats(0, 3),
    loss=st.sampled_from(["mse", "dot"]),
)


@property_test
@given(linear_models, st.floats(-2, 2), st.floats(-2, 2))
def test_flow_is_the_gradient_and_the_jacobian_its_derivative(m: LinearSimSiam, w: float, p: float) -> None:
    np.testing.assert_allclose(np.array(m.flow(w, p)), by_autograd(m, w, p), rtol=1e-9, atol=1e-9)
    h = 1e-5
    columns = [
        (np.array(m.flow(w + a, p + b)) - np.array(m.flow(w - a, p - b))) / (2 * h) for a, b in ((h, 0.0), (0.0, h))
    ]
    np.testing.assert_allclose(m.jacobian(w, p), np.stack(columns, axis=1), rtol=1e-6, atol=1e-7)


@property_test
@given(linear_models, st.floats(-2, 2))
def test_fixed_points_rest_and_say_their_eigenvalues(m: LinearSimSiam, p: float) -> None:
    points = linear_simsiam(p, m)
    assert (points[0].encoder, points[0].predictor) == (0, p)
    for point in points[1:] if m.weight_decay else points:
        np.testing.assert_allclose(m.flow(point.encoder, point.predictor), 0, atol=1e-12)
    for point in points:
        first, second = point.eigenvalues
        assert first.real >= second.real
        assert first + second == pytest.approx(np.trace(point.jacobian), abs=1e-9)
        assert first * second == pytest.approx(np.linalg.det(point.jacobian), abs=1e-9)


def test_collapse_is_unstable_exactly_for_small_positive_predictors_with_stop_gradient() -> None:
    m = LinearSimSiam(signal=1.0, noise=0.5)
    plain = LinearSimSiam(signal=1.0, noise=0.5, stop_gradient=False)
    kappa = 2 / 3
    assert m.correlation == pytest.approx(kappa)
    for p in np.linspace(-1.5, 1.5, 31):
        rate = linear_simsiam(float(p), m)[0].encoder_rate
        assert (rate > 0) == (0 < p < kappa - 1e-9), p
        without = linear_simsiam(float(p), plain)[0].encoder_rate
        assert without < 0, p  # never unstable without stop-gradient, against the text
        # A small encoder grows or shrinks at that rate.
        for model, expected in ((m, rate), (plain, without)):
            w = simulate_linear_simsiam(1e-6, p, model, rate=1e-3, steps=200)[:, 0, 0]
            assert w[-1] / w[0] == pytest.approx((1 + 1e-3 * expected) ** 200, rel=1e-6)
    assert linear_simsiam(1.0, LinearSimSiam(noise=0.0, stop_gradient=False))[0].encoder_rate == 0
    assert [linear_simsiam(p, m)[0].stability for p in (0.3, 1.0)] == ["unstable", "marginal"]


def test_dot_product_collapse_is_unstable_either_way_and_grows_without_bound() -> None:
    for stop, rate in ((True, 0.3), (False, 0.6)):
        m = LinearSimSiam(loss="dot", stop_gradient=stop)
        assert linear_simsiam(0.3, m)[0].encoder_rate == pytest.approx(rate)
        assert linear_simsiam(-0.3, m)[0].encoder_rate == pytest.approx(-rate)
        assert np.nanmax(np.abs(simulate_linear_simsiam(0.01, 0.3, m, rate=0.1, steps=200))) > 1e6
        decayed = LinearSimSiam(loss="dot", stop_gradient=stop, weight_decay=0.1)
        origin, saddle = linear_simsiam(0.0, decayed)
        assert origin.stability == "stable"
        assert saddle.stability == "unstable"
        assert saddle.eigenvalues[1].real < 0


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_without_decay_an_invariant_decides_the_end(beta: float) -> None:
    m = LinearSimSiam(predictor_rate=beta)
    rng = np.random.default_rng(0)
    w, p = rng.uniform(0.05, 1.5, 200), rng.uniform(-1.2, 1.5, 200)
    invariant = w * w - p * p / beta
    end = invariant + m.correlation**2 / beta  # w^2 where the predictor is right
    clear = (np.abs(end) > 0.1) & (np.abs(invariant) > 0.05)
    path = simulate_linear_simsiam(w, p, m, rate=0.01, steps=12_000)[:-1]  # (T, M, 2), before they are averaged
    np.testing.assert_allclose(path[..., 0] ** 2 - path[..., 1] ** 2 / beta, np.tile(invariant, (12_000, 1)), atol=0.06)
    lost = (end < 0) | ((invariant < 0) & (p < 0))
    assert 20 < (lost & clear).sum() < (clear.sum() - 20)
    last = path[-1]
    assert np.abs(last[lost & clear, 0]).max() < 0.05
    np.testing.assert_allclose(last[~lost & clear, 0] ** 2, end[~lost & clear], atol=0.06)
    np.testing.assert_allclose(last[~lost & clear, 1], m.correlation, atol=0.01)


def test_weight_decay_makes_collapse_an_attractor_beside_another_one() -> None:
    m = LinearSimSiam(weight_decay=0.05)
    origin, good, saddle = linear_simsiam(0.0, m)
    assert [x.stability for x in (origin, good, saddle)] == ["stable", "stable", "unstable"]
    assert good.encoder == good.predictor > saddle.predictor > 0
    for scale, end in ((0.9, 0.0), (1.1, good.encoder)):  # the saddle is on the border of the two basins
        path = simulate_linear_simsiam(scale * saddle.encoder, scale * saddle.predictor, m, rate=0.1, steps=8000)
        np.testing.assert_allclose(path[-1, 0], [end, end], atol=1e-6)
    limit = 1 / (4 * 1.5)
    assert len(linear_simsiam(0.0, LinearSimSiam(weight_decay=limit * 0.999))) == 3
    assert len(linear_simsiam(0.0, LinearSimSiam(weight_decay=limit * 1.001))) == 1
    assert len(linear_simsiam(0.0, LinearSimSiam(weight_decay=0.05, stop_gradient=False))) == 1
    for start in ((1.0, 0.6), (0.3, 1.0), (2.0, -1.0)):
        lost = LinearSimSiam(weight_decay=0.05, stop_gradient=False)
        np.testing.assert_allclose(simulate_linear_simsiam(*start, lost, rate=0.05, steps=4000)[-1], 0, atol=1e-3)


def test_simulation_follows_the_flow() -> None:
    m = LinearSimSiam(weight_decay=0.02, predictor_rate=2.0)
    flow = integrate.solve_ivp(lambda _, y: np.array(m.flow(*y)), (0, 10), [0.2, 0.3], rtol=1e-9, atol=1e-12)
    path = simulate_linear_simsiam(0.2, 0.3, m, rate=1e-3, steps=10_000)
    np.testing.assert_allclose(path[-1, 0], flow.y[:, -1], atol=1e-3)


def test_averaging_clients() -> None:
    noises = (0.0, 0.5, 2.0)
    models = [LinearSimSiam(noise=s, predictor_rate=0.0) for s in noises]
    rates = [linear_simsiam(0.6, m)[0].encoder_rate for m in models]
    assert min(rates) < 0 < max(rates)  # alone, the noisy client would collapse
    share = np.array([1.0, 2.0, 3.0]) / 6
    growths = []
    for steps in (1, 100, 1000):
        path = simulate_linear_simsiam(1e-6, 0.6, models, rate=0.01, steps=steps, rounds=2, weights=[1, 2, 3])
        assert path.shape == (1 + 2 * steps, 3, 2)
        assert np.ptp(path[steps], axis=0).max() == 0
        found = math.log(path[-1, 0, 0] / 1e-6) / (0.01 * 2 * steps)
        growths.append(theory.averaged_rate(rates, 0.01 * steps, [1, 2, 3]))
        assert found == pytest.approx(growths[-1], abs=2e-3)
    assert share @ rates <= growths[0] < growths[1] < growths[2] <= max(rates)
    assert theory.averaged_rate(rates, 1.0, [0, 1, 0]) == pytest.approx(rates[1])

    mirrored = simulate_linear_simsiam([1.0, -1.0], 0.5, LinearSimSiam(), rate=0.01, steps=50, rounds=3)
    np.testing.assert_allclose(mirrored[-1, :, 0], 0, atol=1e-12)  # equally good encoders average to collapse
    single = simulate_linear_simsiam(0.4, 0.3, LinearSimSiam(), rate=0.01, steps=30)
    alike = simulate_linear_simsiam(0.4, 0.3, [LinearSimSiam()] * 2, rate=0.01, steps=10, rounds=3)
    np.testing.assert_allclose(alike, np.repeat(single, 2, axis=1), rtol=1e-12)


# T9: the EMA teacher


@property_test
@given(st.floats(0, 1), st.integers(0, 30), seeded)
def test_ema_closed_form_is_the_loop(decay: float, steps: int, seed: int) -> None:
    students, initial = normal(steps, 3, 2, seed=seed), normal(3, 2, seed=seed + 1)
    teacher = initial
    for student in students:
        teacher = decay * teacher + (1 - decay) * student
    np.testing.assert_allclose(theory.ema_teacher(students, initial, decay), teacher, atol=1e-12)
    weights = theory.ema_weights(decay, steps)
    assert weights.shape == (steps + 1,)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(theory.ema_weights_scheduled(np.full(steps, decay)), weights, atol=1e-12)
    if decay < 1:
        assert theory.ema_lag(decay, steps) == pytest.approx(weights @ np.arange(steps + 1), abs=1e-9)


@property_test
@given(st.lists(st.floats(0, 1), max_size=12))
def test_scheduled_ema_weights_are_the_loop(decays: list[float]) -> None:
    teacher = np.zeros(len(decays) + 1)  # the weight of each student as it comes, the initial teacher first
    teacher[0] = 1
    for step, m in enumerate(decays, start=1):
        teacher *= m
        teacher[step] += 1 - m
    np.testing.assert_allclose(theory.ema_weights_scheduled(decays), teacher[::-1], atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_ema_lag_window_and_effective_count(decay: float) -> None:
    steps = 4000
    teacher, history = 0.0, []
    noise = normal(steps)
    quiet = 0.0
    for t in range(1, steps + 1):
        teacher = decay * teacher + (1 - decay) * 3.0 * t  # a student that moves by 3 a step
        quiet = decay * quiet + (1 - decay) * noise[t - 1]
        history.append(quiet)
    assert 3.0 * steps - teacher == pytest.approx(3 * theory.ema_lag(decay), abs=1e-6)
    assert theory.ema_lag(decay) == pytest.approx(theory.ema_window(decay) - 1)
    variance = np.var(history[500:])
    assert variance == pytest.approx(1 / theory.ema_effective_count(decay), rel=0.3)
    weights = theory.ema_weights(decay, steps)[:-1]
    assert theory.ema_effective_count(decay) == pytest.approx(1 / (weights**2).sum(), rel=1e-9)
    if decay == 0.99:
        assert weights[: round(theory.ema_window(decay))].sum() == pytest.approx(1 - math.exp(-1), abs=0.01)


# Refusals

PAIR = np.eye(2)
HALVES = [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.info_nce_logits(PAIR, PAIR, np.eye(3), 1.0), "compared"),
        (lambda: theory.info_nce_logits(PAIR, PAIR, PAIR, 0.0), "temperature"),
        (lambda: theory.info_nce_logits(PAIR, PAIR, PAIR, 1.0, similarity="l2"), "l2"),
        (lambda: theory.cross_entropy(PAIR, 2), "0 to 1"),
        (lambda: theory.cross_entropy([1.0, 2.0], 0), "matrix"),
        (lambda: theory.imprint_classifier(PAIR, [0, -1], 2), "-1"),
        (lambda: theory.imprint_classifier(PAIR, [0.0, 1.0], 2), "float64"),
        (lambda: theory.imprint_classifier(PAIR, [0], 2), "1 labels"),
        (lambda: theory.optimal_critic(PAIR, HALVES), "sums to 2"),
        (lambda: theory.optimal_critic(PAIR / 2, [1.0]), "column"),
        (lambda: theory.optimal_critic([[0.5, 0.5], [0, 0]], HALVES), "row without mass"),
        (lambda: theory.expected_info_nce(PAIR * math.nan, PAIR / 2, HALVES, 1), "nan"),
        (lambda: theory.optimal_info_nce(np.full((8, 8), 1 / 64), np.full(8, 1 / 8), 40), "too many"),
        (lambda: theory.critic_bias([[0.5, 0.6]]), "client 0"),
        (lambda: theory.critic_bias([HALVES, HALVES], [1.0]), "weights"),
        (lambda: theory.gaussian_mutual_information(1.0), "correlation"),
        (lambda: theory.gaussian_mutual_information(0.5, 0), "dims"),
        (lambda: theory.info_nce_bias(math.nan, 1, 2), "correlation"),
        (lambda: theory.info_nce_bias(0.5, 1, 0), "candidates"),
        (lambda: theory.asymptotic_bias(-1.0, 2), "information"),
        (lambda: theory.log_log_slope([1, 1], [1, 2]), "two or more"),
        (lambda: theory.log_log_slope([1, 2], [1, -2]), "above 0"),
        (lambda: theory.two_factor_information(2, 2, 1.1, 0.5), "keep_signal"),
        (lambda: theory.two_factor_information(2, 2, [0.1, 0.2], [0.1, 0.2, 0.3]), "each client"),
        (lambda: theory.two_factor_information(0, 2, 0.1, 0.2), "classes"),
        (lambda: theory.sample_two_factors(2, 2, 0.5, -0.1, 5, seed=0), "keep_background"),
        (lambda: theory.mutual_information([[-1.0, 2.0]]), "values >= 0"),
        (lambda: theory.radial_component(PAIR, np.eye(3)), "gradient"),
        (lambda: theory.norm_after_step(1.0, 1.0, 1.0, radial=2.0), "cosine"),
        (lambda: theory.norm_growth(0.0, 1.0, 1.0, 1), "norm"),
        (lambda: theory.negative_weights([], 1.0), "score"),
        (lambda: theory.negative_weights([math.inf], 1.0), "finite"),
        (lambda: theory.gradient_snr(0.1, 0.5, -0.1, 0.0, 0.1, 5, 1.0), "positive_std"),
        (lambda: theory.gradient_snr(0.1, 0.5, 0.1, 0.0, 0.1, 0, 1.0), "negatives"),
        (lambda: theory.gradient_snr(1e-5, 0.5, 0.1, 0.0, 0.1, 5, 1.0), "quadrature"),
        (lambda: theory.gradient_snr(0.1, math.nan, 0.1, 0.0, 0.1, 5, 1.0), "finite"),
        (lambda: LinearSimSiam(loss="l1"), "l1"),
        (lambda: LinearSimSiam(noise=-1.0), "noise"),
        (lambda: linear_simsiam(math.inf), "predictor"),
        (lambda: simulate_linear_simsiam([1, 2], [1, 2, 3], LinearSimSiam(), rate=0.1, steps=1), "each client"),
        (lambda: simulate_linear_simsiam(1, 1, LinearSimSiam(), rate=0.1, steps=0), "steps"),
        (lambda: theory.averaged_rate([math.nan], 1.0), "rates"),
        (lambda: theory.ema_weights(1.1, 3), "decay"),
        (lambda: theory.ema_weights_scheduled([0.5, 2.0]), "decays"),
        (lambda: theory.ema_teacher(np.zeros((3, 2)), np.zeros(3), 0.5), "students"),
        (lambda: theory.ema_window(1.0), "window"),
        (lambda: theory.ema_lag(0.5, -1), "steps"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_every_public_name_is_exported_once() -> None:
    assert sorted(theory.__all__) == sorted(set(theory.__all__))
    for name in theory.__all__:
        assert getattr(theory, name).__doc__
