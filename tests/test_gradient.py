"""Batches cover every example once an epoch, and schedules keep within their bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import seeds
from fedssl.gradient import PlainGradient, balanced_batches
from fedssl.schedules import ema_decay, learning_rate

SHARES = st.floats(0, 1, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 400), size=st.integers(1, 80), epochs=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_every_epoch_is_a_permutation_in_even_batches(n: int, size: int, epochs: int, seed: int) -> None:
    batches = list(balanced_batches(n, size, epochs, seeds.stream(seed, "order")))
    steps = -(-n // size)
    assert len(batches) == steps * epochs
    for epoch in range(epochs):
        chosen = batches[epoch * steps : (epoch + 1) * steps]
        assert torch.cat(chosen).sort().values.tolist() == list(range(n))
        sizes = [len(batch) for batch in chosen]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
    assert all(batch.dtype == torch.int64 and batch.dim() == 1 for batch in batches)


def test_no_tiny_remainder_and_small_clients() -> None:
    rng = np.random.default_rng(0)
    assert [len(b) for b in balanced_batches(33, 32, 1, rng)] == [17, 16]
    assert [len(b) for b in balanced_batches(5, 32, 2, rng)] == [5, 5]
    assert [b.tolist() for b in balanced_batches(1, 32, 3, rng)] == [[0], [0], [0]]
    assert [len(b) for b in balanced_batches(64, 32, 1, rng)] == [32, 32]


def test_the_order_comes_from_the_given_stream_alone() -> None:
    def draw(seed: int) -> list[list[int]]:
        np.random.default_rng().random()
        return [b.tolist() for b in PlainGradient().batches(40, 8, 2, seeds.stream(seed, "order"))]

    state = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    epochs = draw(1)
    assert epochs[:5] != epochs[5:], "each epoch is shuffled anew"
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=100, deadline=None)
@given(progress=SHARES, base=st.floats(1e-6, 10), warmup=st.floats(0, 0.99))
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rates_stay_in_bounds(schedule: str, progress: float, base: float, warmup: float) -> None:
    assert 0 <= learning_rate(progress, base, schedule, warmup) <= base


@settings(max_examples=60, deadline=None)
@given(points=st.lists(SHARES, min_size=2, max_size=20), warmup=st.floats(0, 0.9))
def test_learning_rates_rise_then_fall(points: list[float], warmup: float) -> None:
    points = sorted(points)
    rising = [learning_rate(p, 0.3, "cosine", warmup) for p in points if p < warmup]
    falling = [learning_rate(p, 0.3, "cosine", warmup) for p in points if p >= warmup]
    assert rising == sorted(rising)
    assert all(b <= a + 1e-15 for a, b in itertools.pairwise(falling))
    constant = {learning_rate(p, 0.3, "constant", warmup) for p in points if p >= warmup}
    assert constant <= {0.3}


def test_learning_rate_by_hand() -> None:
    assert learning_rate(0.0, 2.0, "cosine", 0.0) == 2.0
    assert learning_rate(0.5, 2.0, "cosine", 0.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 2.0, "cosine", 0.0) == 0.0
    assert learning_rate(0.0, 2.0, "cosine", 0.2) == 0.0
    assert learning_rate(0.1, 2.0, "cosine", 0.2) == 1.0
    assert learning_rate(0.2, 2.0, "cosine", 0.2) == 2.0
    assert learning_rate(0.6, 2.0, "cosine", 0.2) == pytest.approx(1.0)
    assert learning_rate(1.0, 2.0, "cosine", 0.2) == pytest.approx(0.0)
    assert learning_rate(1.0, 2.0, "constant", 0.2) == 2.0


@settings(max_examples=80, deadline=None)
@given(points=st.lists(SHARES, min_size=2, max_size=20), base=SHARES)
def test_teachers_slow_down_and_never_leave_the_unit_interval(points: list[float], base: float) -> None:
    decays = [ema_decay(p, base, "cosine") for p in sorted(points)]
    assert all(base - 1e-12 <= d <= 1 for d in decays)
    assert all(b >= a - 1e-15 for a, b in itertools.pairwise(decays))
    assert ema_decay(points[0], base, "constant") == base


def test_ema_decay_by_hand() -> None:
    assert ema_decay(0.0, 0.996, "cosine") == pytest.approx(0.996, abs=1e-15)
    assert ema_decay(0.5, 0.996, "cosine") == pytest.approx(0.998)
    assert ema_decay(1.0, 0.996, "cosine") == 1.0
