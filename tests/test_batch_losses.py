"""Losses of batch statistics against slow loops in float64, closed cases and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import normal
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses import barlow_twins, decorrelation, vicreg

property_test = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(2, 7), st.integers(1, 6), st.integers(0, 10_000))  # B, D, seed


def slow_vicreg(z1: Tensor, z2: Tensor) -> tuple[float, float, float]:
    """Invariance, variance and covariance by loops over examples and dimensions."""
    (n, d), views = z1.shape, [z1.tolist(), z2.tolist()]
    invariance = sum((views[0][i][j] - views[1][i][j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance = covariance = 0.0
    for z in views:
        mean = [sum(z[i][j] for i in range(n)) / n for j in range(d)]
        for j in range(d):
            spread = sum((z[i][j] - mean[j]) ** 2 for i in range(n)) / (n - 1)
            variance += max(0.0, 1 - math.sqrt(spread + 1e-4)) / d / 2
            for k in range(d):
                if j != k:
                    c = sum((z[i][j] - mean[j]) * (z[i][k] - mean[k]) for i in range(n)) / (n - 1)
                    covariance += c * c / d
    return invariance, variance, covariance


def slow_barlow(z1: Tensor, z2: Tensor, weight: float) -> float:
    """The cross-correlation matrix entry by entry."""
    n, d = z1.shape
    columns = [
        [(z[:, j] - z[:, j].mean()) / math.sqrt(z[:, j].var() + 1e-5) for j in range(d)]
        for z in (z1.numpy(), z2.numpy())
    ]
    total = 0.0
    for j in range(d):
        for k in range(d):
            c = float(columns[0][j] @ columns[1][k]) / n
            total += (1 - c) ** 2 if j == k else weight * c * c
    return total


def slow_decorrelation(z: Tensor) -> float:
    """The correlations pair by pair, as FedDecorr's authors scale them."""
    n, d = z.shape
    columns = [z[:, j].numpy() for j in range(d)]
    columns = [(c - c.mean()) / math.sqrt(c.var(ddof=1) + 1e-8) for c in columns]
    squares = [float(columns[j] @ columns[k]) ** 2 for j in range(d) for k in range(d) if j != k]
    return sum(squares) / len(squares) / n if squares else 0.0


@property_test
@given(sizes)
def test_vicreg_equals_the_loops(size: tuple[int, int, int]) -> None:
    n, d, seed = size
    z1, z2 = normal(n, d, seed=seed), 1.7 * normal(n, d, seed=seed + 1)
    terms = vicreg(z1, z2, invariance=2.0, variance=3.0, covariance=5.0)
    expected = slow_vicreg(z1, z2)
    np.testing.assert_allclose([float(t) for t in terms[1:]], expected, rtol=1e-10, atol=1e-12)
    assert float(terms.total) == pytest.approx(2 * expected[0] + 3 * expected[1] + 5 * expected[2], rel=1e-10)


@property_test
@given(sizes)
def test_barlow_twins_equals_the_loops(size: tuple[int, int, int]) -> None:
    n, d, seed = size
    z1, z2 = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    assert float(barlow_twins(z1, z2, off_diagonal=0.3)) == pytest.approx(slow_barlow(z1, z2, 0.3), rel=1e-9)


@property_test
@given(sizes)
def test_decorrelation_equals_the_loops(size: tuple[int, int, int]) -> None:
    n, d, seed = size
    z = normal(n, d, seed=seed)
    assert float(decorrelation(z)) == pytest.approx(slow_decorrelation(z), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [2, 10, 64])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_decorrelation_of_one_direction_is_its_largest_value(n: int, size: float) -> None:
    z = size * normal(n, 1) * torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64) + 3
    assert float(decorrelation(z)) == pytest.approx((n - 1) ** 2 / n, rel=1e-3 if size < 1 else 1e-6)
    assert n != 10 or float(decorrelation(z)) == pytest.approx(8.1, rel=1e-3 if size < 1 else 1e-6)
    assert float(decorrelation(z.float())) == pytest.approx((n - 1) ** 2 / n, rel=2e-3)


def test_decorrelation_is_zero_for_uncorrelated_columns_and_where_there_are_no_correlations() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(decorrelation(3 * signs + 5)) == 0
    # One example, one dimension, or a complete collapse: no variance and no step, rather than nan.
    for z in (normal(1, 4, dtype=torch.float32), normal(5, 1), torch.ones(6, 3)):
        z.requires_grad_()
        loss = decorrelation(z)
        (slope,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0
        assert slope.abs().max() == 0


def test_vicreg_of_a_collapsed_network() -> None:
    terms = vicreg(torch.ones(6, 4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.float64))
    assert [float(t) for t in terms] == pytest.approx([25 * 0.99, 0.0, 0.99, 0.0])


def test_vicreg_is_zero_for_spread_and_uncorrelated_features() -> None:
    z = (
        3
        * torch.eye(2, dtype=torch.float64).repeat(4, 1)
        * torch.tensor([[1.0], [1], [-1], [-1], [1], [1], [-1], [-1]])
    )
    assert float(vicreg(z, z).total) == pytest.approx(0.0, abs=1e-12)


def test_barlow_twins_closed_cases() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert float(barlow_twins(signs, signs, off_diagonal=1.0)) == pytest.approx(0.0, abs=1e-8)
    same = signs[:, :1].repeat(1, 3)
    assert float(barlow_twins(same, same, off_diagonal=0.1)) == pytest.approx(0.1 * 6, rel=1e-4)
    collapsed = torch.ones(5, 3, dtype=torch.float64)
    assert float(barlow_twins(collapsed, collapsed, off_diagonal=0.1)) == pytest.approx(3.0)
    assert float(barlow_twins(signs, -signs, off_diagonal=0.0)) == pytest.approx(8.0, rel=1e-4)


@property_test
@given(sizes)
def test_the_order_of_examples_does_not_matter(size: tuple[int, int, int]) -> None:
    n, d, seed = size
    z1, z2, order = normal(n, d, seed=seed), normal(n, d, seed=seed + 1), torch.arange(n).flip(0)
    torch.testing.assert_close(vicreg(z1, z2).total, vicreg(z1[order], z2[order]).total)
    a, b = barlow_twins(z1, z2, off_diagonal=0.1), barlow_twins(z1[order], z2[order], off_diagonal=0.1)
    torch.testing.assert_close(a, b)


def test_barlow_twins_ignores_scale_and_shift_but_vicreg_does_not() -> None:
    z1, z2 = normal(64, 5), normal(64, 5, seed=1)
    moved = 3 * z1 + 7
    a, b = barlow_twins(z1, z2, off_diagonal=0.1), barlow_twins(moved, z2, off_diagonal=0.1)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert float(vicreg(moved, z2).invariance) > 2 * float(vicreg(z1, z2).invariance)


def test_gradients_are_those_of_finite_differences() -> None:
    z1, z2 = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: vicreg(a, b).total, (z1, z2))
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins(a, b, off_diagonal=0.1), (z1, z2))
    assert torch.autograd.gradcheck(decorrelation, (z1,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z1, z2 = normal(8, 4).to(dtype), normal(8, 4, seed=1).to(dtype)
    assert vicreg(z1, z2).total.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = barlow_twins(z1, z2, off_diagonal=0.1)
    torch.testing.assert_close(inside, barlow_twins(z1.float(), z2.float(), off_diagonal=0.1))


def test_wrong_input_is_refused() -> None:
    one, two = normal(1, 3), normal(2, 3)
    for call in (
        lambda: vicreg(one, one),
        lambda: barlow_twins(one, one, off_diagonal=0.1),
        lambda: vicreg(two, normal(2, 4)),
        lambda: barlow_twins(two, two, off_diagonal=-1.0),
        lambda: vicreg(two, two, variance=-1.0),
        lambda: decorrelation(two[0]),
        lambda: decorrelation(two[:0]),
        lambda: decorrelation(two.long()),
    ):
        with pytest.raises(ConfigError):
            call()
