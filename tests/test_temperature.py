"""Temperature: the rules for Gaussian scores against Monte Carlo, the rules for batches against slow loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

from fedssl import seeds, temperature, theory
from fedssl.errors import ConfigError
from fedssl.temperature import MaxSNR, Rule, Scheduled, TargetProbability, choose, for_target_probability, max_snr, rule

property_test = settings(max_examples=30, deadline=None, derandomize=True)
READERS = (TargetProbability(), MaxSNR())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(seeds.stream(seed, "test", *shape).normal(size=shape))


def probability(positive: Tensor, negative: Tensor, t: float) -> Tensor:
    """(B,) of the positive, from the definition."""
    return F.softmax(torch.cat([positive[:, None], negative], dim=1).double() / t, dim=1)[:, 0]


# Rules for Gaussian scores


@property_test
@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 10_000), st.floats(0.01, 0.99))
def test_target_probability_in_closed_form(mu_p: float, mu_n: float, k: int, p: float) -> None:
    reachable = (mu_p - mu_n) * (p - 1 / (1 + k)) > 1e-6
    if not reachable:
        assume((mu_p - mu_n) * (p - 1 / (1 + k)) < 0)
        with pytest.raises(ConfigError, match="No temperature"):
            for_target_probability(mu_p, mu_n, k, p)
        return
    t = for_target_probability(mu_p, mu_n, k, p)
    assert t == pytest.approx((mu_p - mu_n) / math.log(k * p / (1 - p)))
    # At mu_n / t far from 0 the definition itself would overflow: shift the scores, which no softmax sees.
    assert 1 / (1 + k * math.exp((mu_n - mu_p) / t)) == pytest.approx(p)


@pytest.mark.parametrize(
    "case", [(0.6, 0.0, 15, 0.5, 0.2, 0.2), (0.9, 0.1, 63, 0.7, 0.05, 0.2), (0.0, 0.0, 3, 0.3, 0.5, 0.1)]
)
def test_target_probability_when_scores_vary(case: tuple[float, float, int, float, float, float]) -> None:
    mu_p, mu_n, k, p, sd_p, sd_n = case
    t = for_target_probability(mu_p, mu_n, k, p, positive_std=sd_p, negative_std=sd_n)
    found = probability(mu_p + sd_p * normal(40_000), mu_n + sd_n * normal(40_000, k), t)
    assert float(found.mean()) == pytest.approx(p, abs=4 * float(found.std()) / 200)
    assert theory.positive_probability(t, mu_p, sd_p, mu_n, sd_n, k) == pytest.approx(p, abs=1e-9)


def test_target_probability_has_the_closed_form_as_its_limit() -> None:
    exact = for_target_probability(0.6, 0.1, 100, 0.4)
    near = for_target_probability(0.6, 0.1, 100, 0.4, positive_std=1e-4, negative_std=1e-4)
    assert near == pytest.approx(exact, rel=1e-4)
    scaled = for_target_probability(6.0, 1.0, 100, 0.4, positive_std=2.0, negative_std=1.0)
    assert scaled == pytest.approx(10 * for_target_probability(0.6, 0.1, 100, 0.4, positive_std=0.2, negative_std=0.1))


def test_of_two_temperatures_with_the_target_probability_the_larger() -> None:
    stats = (-0.1, 0.3, 0.0, 0.05, 15)  # a positive that varies a lot: E[p] rises both as t falls and as t grows
    grid = np.geomspace(0.005, 50, 200)
    curve = np.array([theory.positive_probability(t, *stats) for t in grid])
    low = int(curve.argmin())
    assert 0 < low < len(grid) - 1
    target = (curve[low] + min(curve[0], curve[-1])) / 2
    t = for_target_probability(-0.1, 0.0, 15, float(target), positive_std=0.3, negative_std=0.05)
    assert t > grid[low]
    assert theory.positive_probability(t, *stats) == pytest.approx(target)


def test_max_snr_is_the_maximum_of_the_curve() -> None:
    for stats in ((0.6, 0.2, 0.0, 0.2, 15), (0.8, 0.15, 0.1, 0.25, 255), (0.3, 0.0, 0.0, 0.3, 7)):
        for floor in (0.1, 1.0, 5.0):
            t = max_snr(*stats, noise_floor=floor)

            def loss(x: float, stats: tuple[float, float, float, float, int] = stats, floor: float = floor) -> float:
                return -theory.gradient_snr(math.exp(x), *stats, floor)

            grid = np.linspace(math.log(0.01), math.log(10), 400)
            start = float(grid[np.argmin([loss(x) for x in grid])])
            best = optimize.minimize_scalar(loss, bounds=(start - 0.02, start + 0.02), method="bounded")
            assert -loss(math.log(t)) >= -best.fun * (1 - 1e-9)
            assert t == pytest.approx(math.exp(best.x), rel=5e-3)


def test_max_snr_beats_its_neighbours_in_simulated_gradients() -> None:
    mu_p, sd_p, mu_n, sd_n, k, n = 0.6, 0.2, 0.0, 0.2, 15, 40_000
    positive, negative = mu_p + sd_p * normal(n), mu_n + sd_n * normal(n, k)
    noise = normal(n, seed=1)
    t = max_snr(mu_p, sd_p, mu_n, sd_n, k)

    def snr(t: float) -> float:
        gradient = (probability(positive, negative, t) - 1) / t + temperature.NOISE_FLOOR * noise
        return abs(float(gradient.mean() / gradient.std()))

    assert 0.05 < t < 2
    assert snr(t) > 1.05 * max(snr(t / 2), snr(2 * t))


def test_max_snr_at_the_ends_of_its_range_and_with_the_floor() -> None:
    stats = (0.6, 0.2, 0.0, 0.2, 15)
    floors = [max_snr(*stats, noise_floor=f) for f in (1e-6, 0.01, 0.1, 1.0, 10.0)]
    assert floors[0] == pytest.approx(10)
    assert np.all(np.diff(floors) < 0)
    assert max_snr(0.0, 0.0, 0.0, 0.0, 5) == pytest.approx(0.01)
    assert max_snr(*stats, lowest=0.5, highest=0.6) == pytest.approx(0.5)


# Rules for batches: what they compute


@property_test
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.floats(-0.3, 1),
    st.floats(0.01, 0.5),
    st.floats(0.1, 0.9),
    st.integers(0, 999),
)
def test_target_probability_is_reached_by_the_batch(
    b: int, k: int, gap: float, spread: float, p: float, seed: int
) -> None:
    positive, negative = gap + spread * normal(b, seed=seed), spread * normal(b, k, seed=seed)
    t = float(TargetProbability(p).at(positive, negative, 0.0))
    assert 0.01 <= t <= 10
    found = float(probability(positive, negative, t).mean())
    if 0.0101 < t < 9.9:
        assert found == pytest.approx(p, abs=0.02)
    else:  # then no temperature of the grid is on the other side
        side = [float(probability(positive, negative, x).mean()) - p for x in np.geomspace(0.01, 10, 32)]
        assert min(side) > -0.02 or max(side) < 0.02


@property_test
@given(st.integers(2, 12), st.integers(1, 9), st.floats(0, 1), st.floats(0.02, 0.5), st.integers(0, 999))
def test_max_snr_is_the_best_of_the_batch(b: int, k: int, gap: float, spread: float, seed: int) -> None:
    positive, negative = gap + spread * normal(b, seed=seed), spread * normal(b, k, seed=seed)

    def snr(t: float) -> float:
        gradient = (1 - probability(positive, negative, t)) / t
        return float(gradient.mean() / (gradient.var(correction=0) + 1).sqrt())

    t = float(MaxSNR().at(positive, negative, 0.0))
    best = max(snr(x) for x in np.geomspace(0.01, 10, 600))
    assert snr(t) >= 0.97 * best


def test_rules_for_batches_agree_with_those_for_gaussian_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temperature, "_ANCHORS", 4000)
    monkeypatch.setattr(temperature, "_NEGATIVES", 1000)
    for mu_p, sd_p, sd_n in ((0.6, 0.2, 0.2), (0.8, 0.1, 0.3)):
        positive, negative = mu_p + sd_p * normal(4000), sd_n * normal(4000, 15)
        exact = for_target_probability(mu_p, 0.0, 15, 0.5, positive_std=sd_p, negative_std=sd_n)
        assert float(TargetProbability().at(positive, negative, 0.0)) == pytest.approx(exact, rel=0.03)
        exact = max_snr(mu_p, sd_p, 0.0, sd_n, 15)
        assert float(MaxSNR().at(positive, negative, 0.0)) == pytest.approx(exact, rel=0.05)


def test_large_batches_are_read_in_part_and_negatives_counted_in_full() -> None:
    positive, negative = 0.6 + 0.1 * normal(1000), 0.2 * normal(1000, 5000)
    for reader in READERS:
        part = reader.at(positive[::16], negative[::16, ::20], 0.0, 5000)
        torch.testing.assert_close(reader.at(positive, negative, 0.0), part)
        assert float(part) < float(reader.at(positive[::16], negative[::16, ::20], 0.0))  # more negatives, sharper
    t = float(TargetProbability().at(positive, negative / 2, 0.0))
    assert float(probability(positive, negative / 2, t).mean()) == pytest.approx(0.5, abs=0.05)


def test_scheduled_values() -> None:
    empty = torch.zeros(0), torch.zeros(0, 0)
    cosine, linear = Scheduled(0.4, 0.2), Scheduled(0.4, 0.2, "linear")
    assert [linear.at(*empty, x) for x in (0.0, 0.25, 1.0)] == pytest.approx([0.4, 0.35, 0.2])
    assert [cosine.at(*empty, x) for x in (0.0, 1 / 3, 0.5, 1.0)] == pytest.approx([0.4, 0.35, 0.3, 0.2])
    assert [cosine.at(*empty, x) for x in (-1.0, 2.0)] == pytest.approx([0.4, 0.2])
    assert Scheduled(0.1, 0.5).at(*empty, 0.5) == pytest.approx(0.3)


# Rules for batches: what they survive


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (torch.ones(4), torch.ones(4, 0)),
        (torch.ones(0), torch.ones(0, 3)),
        (torch.ones(4), torch.ones(4, 3)),
        (torch.full((4,), 1e4), torch.full((4, 3), 1e4)),
        (torch.tensor([0.9, math.nan]), torch.zeros(2, 3)),
        (torch.tensor([0.9, 0.8]), torch.tensor([[0.1], [math.inf]])),
        (torch.tensor([0.9, 0.8]), torch.full((2, 3), math.nan)),
    ],
)
def test_batches_that_say_nothing_give_the_fallback(reader: Rule, positive: Tensor, negative: Tensor) -> None:
    found = reader.at(positive, negative, 0.5)
    assert isinstance(found, Tensor)
    assert found.shape == ()
    assert float(found) == pytest.approx(0.2)
    other = dataclasses.replace(reader, fallback=0.35).at(positive, negative, 0.5)  # type: ignore[type-var]
    assert float(other) == pytest.approx(0.35)


def test_one_anchor() -> None:
    positive, negative = torch.tensor([0.8]), torch.tensor([[0.1, 0.2, -0.3]])
    assert float(MaxSNR().at(positive, negative, 0.0)) == pytest.approx(0.2)
    t = float(TargetProbability(0.6).at(positive, negative, 0.0))
    assert float(probability(positive, negative, t)) == pytest.approx(0.6, abs=0.01)


def test_temperatures_stay_in_their_range() -> None:
    positive, negative = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, 4)
    easy, hard = TargetProbability(0.201), TargetProbability(0.9999)
    assert float(easy.at(positive, negative, 0.0)) == pytest.approx(10)
    assert float(hard.at(0.01 * positive, negative, 0.0)) == pytest.approx(0.01)
    assert float(hard.at(-positive, negative, 0.0)) == pytest.approx(10)  # p falls as t falls: the larger is nearer
    narrow = TargetProbability(0.4, lowest=0.05, highest=0.07)
    assert float(narrow.at(0.1 * positive, negative, 0.0)) == pytest.approx(0.07)
    assert float(MaxSNR(lowest=1.0, highest=2.0).at(positive, negative, 0.0)) == pytest.approx(1.0)
    for reader in READERS:
        for scale in (1e-6, 1e-3, 1e3, 1e6, 1e30):
            found = float(reader.at(scale * positive, scale * negative, 0.0))
            assert 0.01 - 1e-6 <= found <= 10 + 1e-5


@pytest.mark.parametrize("reader", READERS)
def test_the_temperature_is_detached_and_keeps_dtype_and_order_does_not_matter(reader: Rule) -> None:
    positive, negative = 0.7 + 0.1 * normal(30), 0.2 * normal(30, 20)
    leaf = positive.clone().requires_grad_(), negative.clone().requires_grad_()
    found = reader.at(*leaf, 0.0)
    assert isinstance(found, Tensor)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    order, others = torch.from_numpy(np.roll(np.arange(30), 7)), torch.arange(19, -1, -1)
    torch.testing.assert_close(reader.at(positive[order], negative[order][:, others], 0.0), found)
    torch.testing.assert_close(reader.at(positive + 3, negative + 3, 0.0), found)  # a softmax sees differences only
    low = reader.at(positive.bfloat16(), negative.bfloat16(), 0.0)
    assert isinstance(low, Tensor)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(found), rel=0.05)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("negatives", [None, (50, 8), (10, 7, 8), (700, 8), (10, 0, 8)])
def test_no_value_is_read_on_the_host(reader: Rule, negatives: tuple[int, ...] | None) -> None:
    for b in (10, 200) if negatives is None or len(negatives) == 2 else (10,):
        x = torch.empty(b, 8, device="meta")  # a tensor without values: reading one would raise
        others = None if negatives is None else torch.empty(*negatives, device="meta")
        found = choose(reader, x, x, others, 0.5)
        assert isinstance(found, Tensor)
        assert found.device.type == "meta"
        assert found.shape == ()


# choose and rule


@property_test
@given(
    st.integers(2, 10),
    st.integers(1, 6),
    st.sampled_from(["cosine", "dot"]),
    st.sampled_from(["batch", "shared", "own"]),
)
def test_choose_scores_the_candidates_of_the_loss(b: int, k: int, similarity: str, kind: str) -> None:
    anchor, noise = normal(b, 5, seed=b), normal(b, 5, seed=b + 1)
    positive = anchor + 0.5 * noise
    negatives = {"batch": None, "shared": normal(k, 5, seed=k), "own": normal(b, k, 5, seed=k)}[kind]

    def score(u: Tensor, v: Tensor) -> float:
        size = float(u.norm() * v.norm()) if similarity == "cosine" else 1.0
        return float(u @ v) / size

    own = torch.tensor([score(anchor[i], positive[i]) for i in range(b)], dtype=torch.float64)
    rows = []
    for i in range(b):
        if negatives is None:
            others = [positive[j] for j in range(b) if j != i]
        else:
            others = list(negatives if negatives.ndim == 2 else negatives[i])
        rows.append([score(anchor[i], v) for v in others])
    against = torch.tensor(rows, dtype=torch.float64)
    for reader in READERS:
        found = choose(reader, anchor, positive, negatives, 0.0, similarity)
        torch.testing.assert_close(found, reader.at(own, against, 0.0), rtol=1e-9, atol=1e-12)


def test_choose_on_large_batches_masks_the_anchor_itself() -> None:
    anchor = normal(400, 16).float()
    against = F.normalize(anchor, dim=1) @ F.normalize(anchor, dim=1).T
    for reader in READERS:
        # Each anchor is its own positive with the similarity 1: unmasked, p could not exceed 1/2.
        found = float(choose(reader, anchor, anchor, None, 0.0))
        rows = torch.stack([torch.cat([against[i, :i], against[i, i + 1 :]]) for i in range(400)])
        assert found == pytest.approx(float(reader.at(torch.ones(400), rows, 0.0)), rel=1e-4)
    queue = normal(3000, 16).float()
    t = float(choose(TargetProbability(), anchor, anchor, queue, 0.0))
    scores = F.normalize(anchor, dim=1) @ F.normalize(queue, dim=1).T
    assert float(probability(torch.ones(400), scores, t).mean()) == pytest.approx(0.5, abs=0.05)


def test_choose_returns_a_number_as_it_is_and_a_schedule_without_scores() -> None:
    anchor = torch.full((3, 2), math.nan)
    assert choose(0.25, anchor, torch.ones(1), None, 0.5) == 0.25
    assert choose(Scheduled(0.4, 0.2), anchor, torch.ones(7), None, 0.5) == pytest.approx(0.3)
    one = choose(rule("auto"), torch.ones(1, 2), torch.ones(1, 2), None, 0.5)
    assert float(one) == pytest.approx(0.2)
    zeros = choose(rule("target_probability"), torch.zeros(4, 2), torch.zeros(4, 2), None, 0.5)
    assert float(zeros) == pytest.approx(0.2)


def test_choose_ignores_autocast_and_gradients() -> None:
    anchor, positive = normal(20, 8).float().requires_grad_(), normal(20, 8).float()
    for reader in READERS:
        found = choose(reader, anchor, anchor + 0.5 * positive, None, 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same = choose(reader, anchor, anchor + 0.5 * positive, None, 0.0)
        assert isinstance(found, Tensor)
        assert not found.requires_grad
        torch.testing.assert_close(found, same, rtol=1e-6, atol=0)
        assert found.dtype == torch.float32


def test_rules_and_words() -> None:
    assert rule(0.1) == 0.1
    assert isinstance(rule(1), float)
    assert rule("cosine") == Scheduled(0.5, 0.1, "cosine")
    assert rule("target_probability") == TargetProbability(0.5)
    assert rule("auto") == rule("max_snr") == MaxSNR()
    own = MaxSNR(noise_floor=3.0)
    assert rule(own) is own

    class Half:
        reads_scores = True

        def at(self, positive: Tensor, negative: Tensor, progress: float, count: int | None = None) -> Tensor:
            return positive.mean() / 2

    half = Half()
    assert rule(half) is half
    chosen = choose(half, torch.ones(4, 2), torch.ones(4, 2), None, 0.0)
    assert float(chosen) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", ["warm", "0.1", 0, -0.1, math.nan, math.inf, True, None])
def test_rule_refuses(bad: float | str) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        rule(bad)


def test_refusals() -> None:
    for call in (
        lambda: for_target_probability(0.5, 0.1, 0, 0.5),
        lambda: for_target_probability(0.5, 0.1, 5, 1.0),
        lambda: for_target_probability(0.5, 0.5, 5, 0.5),
        lambda: for_target_probability(0.5, 0.5, 1, 0.5),
        lambda: for_target_probability(0.5, 0.1, 5, 0.5, positive_std=-1.0),
        lambda: for_target_probability(0.2, 0.0, 255, 0.9, positive_std=0.2, negative_std=0.2),
        lambda: max_snr(0.5, 0.1, 0.0, 0.1, 5, noise_floor=0.0),
        lambda: max_snr(0.5, 0.1, 0.0, 0.1, 5, lowest=1.0, highest=0.5),
        lambda: max_snr(0.5, -0.1, 0.0, 0.1, 5),
        lambda: Scheduled(0.0, 0.1),
        lambda: Scheduled(schedule="step"),
        lambda: TargetProbability(0.0),
        lambda: TargetProbability(fallback=0.0),
        lambda: TargetProbability(lowest=0.0),
        lambda: MaxSNR(noise_floor=0.0),
        lambda: MaxSNR(lowest=2.0, highest=1.0),
        lambda: choose(MaxSNR(), torch.ones(3, 2), torch.ones(3, 2), None, 0.0, "l2"),
        lambda: choose(MaxSNR(), torch.ones(3, 2), torch.ones(4, 2), None, 0.0),
        lambda: choose(MaxSNR(), torch.ones(3), torch.ones(3), None, 0.0),
        lambda: choose(MaxSNR(), torch.ones(3, 2), torch.ones(3, 2), torch.ones(5, 3), 0.0),
        lambda: choose(MaxSNR(), torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 5, 2), 0.0),
        lambda: choose(MaxSNR(), torch.ones(3, 2), torch.ones(3, 2), torch.ones(2), 0.0),
    ):
        with pytest.raises(ConfigError):
            call()
