"""Diagnostics: closed cases, definitions written out with numpy, invariances and edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedssl import diagnostics, seeds
from fedssl.diagnostics import (
    alignment,
    effective_rank,
    feature_std,
    feature_stds,
    linear_cka,
    mutual_information_bound,
    participation_ratio,
    rankme,
    spectrum,
    uniformity,
)
from fedssl.errors import ConfigError

property_test = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(2, 12), st.integers(1, 8), st.integers(0, 10_000))  # N, D, seed
ONE = (rankme, effective_rank, participation_ratio, feature_std, uniformity)
TWO = (alignment, linear_cka)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(seeds.stream(seed, "test", *shape).normal(size=shape))


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def test_rankme_closed_cases() -> None:
    eye = torch.eye(8)
    assert rankme(eye) == pytest.approx(8.0000069, abs=1e-7)
    assert rankme(normal(40, 1) @ normal(1, 8, seed=1)) == pytest.approx(1.0000112, abs=2e-7)
    rank_three = torch.zeros(8, 8)
    rank_three[:3, :3] = torch.eye(3)
    assert rankme(rank_three) == pytest.approx(3.0000243, abs=2e-7)
    assert effective_rank(eye) == pytest.approx(8, abs=1e-12)
    assert effective_rank(rank_three) == pytest.approx(3, abs=1e-12)
    assert effective_rank(normal(40, 1) @ normal(1, 8, seed=1)) == pytest.approx(1, abs=1e-9)


def test_uniformity_closed_cases() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.eye(6)) == pytest.approx(-4, abs=1e-12)
    assert uniformity(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(-8, abs=1e-12)


def test_participation_ratio_closed_cases() -> None:
    corners = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert participation_ratio(corners) == pytest.approx(3, abs=1e-12)
    scaled = corners * torch.tensor([2.0, 1.0, 1.0])  # covariance proportional to diag(4, 1, 1)
    assert participation_ratio(scaled) == pytest.approx(2.0, abs=1e-12)
    assert participation_ratio(scaled + 100) == pytest.approx(2.0, abs=1e-9)
    values = spectrum(scaled)
    np.testing.assert_allclose(values / values[-1], [4, 1, 1], rtol=1e-12)


def test_feature_stds_are_those_of_each_matrix_in_order() -> None:
    several = [normal(5, 3), normal(4, 7), normal(5, 3).float() + 1, normal(1, 3), torch.full((5, 3), math.inf)]
    found = feature_stds(several)
    assert found[:4] == pytest.approx([feature_std(x) for x in several[:4]], rel=1e-12)
    assert len(set(found[:4])) == 4
    assert math.isnan(found[4])
    assert feature_stds([]) == []
    with pytest.raises(ConfigError, match="matrix"):
        feature_stds([normal(2, 3), torch.zeros(4)])


def test_feature_std_of_a_gaussian_and_of_collapse() -> None:
    assert feature_std(normal(4000, 64)) * math.sqrt(64) == pytest.approx(1, abs=5e-3)
    assert feature_std(normal(1, 64).expand(50, 64)) == 0
    assert feature_std(normal(50, 1).abs() @ normal(1, 64)) == pytest.approx(0, abs=1e-12)


def test_alignment_closed_cases() -> None:
    x = normal(9, 4)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(torch.eye(4)[:2], torch.eye(4)[2:]) == pytest.approx(2)


def test_mutual_information_bound() -> None:
    assert mutual_information_bound(0.0, 512) == pytest.approx(math.log(512))
    assert mutual_information_bound(math.log(7), 7) == 0
    assert mutual_information_bound(0.0, 1) == 0
    assert math.isnan(mutual_information_bound(math.nan, 7))
    with pytest.raises(ConfigError, match="0 candidates"):
        mutual_information_bound(1.0, 0)


@property_test
@given(shapes)
def test_definitions_written_out(shape: tuple[int, int, int]) -> None:
    n, d, seed = shape
    x, y = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    a, b = x.numpy(), y.numpy()
    unit = a / np.linalg.norm(a, axis=1, keepdims=True)
    s = np.linalg.svd(a, compute_uv=False)
    p = s / s.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    cov = np.cov(a, rowvar=False).reshape(d, d)
    assert participation_ratio(x) == pytest.approx(np.trace(cov) ** 2 / np.trace(cov @ cov), rel=1e-8)
    np.testing.assert_allclose(spectrum(x), np.sort(np.linalg.eigvalsh(cov))[::-1], rtol=1e-8, atol=1e-10)
    assert feature_std(x) == pytest.approx(unit.std(axis=0, ddof=1).mean(), rel=1e-9, abs=1e-12)
    pairs = [math.exp(-2 * float(((u - v) ** 2).sum())) for u, v in itertools.combinations(unit, 2)]
    assert uniformity(x) == pytest.approx(math.log(np.mean(pairs)), rel=1e-9, abs=1e-9)
    assert alignment(x, y) == pytest.approx(
        np.mean(((unit - b / np.linalg.norm(b, axis=1, keepdims=True)) ** 2).sum(axis=1))
    )
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    assert linear_cka(x, y) == pytest.approx(np.linalg.norm(b.T @ a) ** 2 / size, rel=1e-8)


@property_test
@given(shapes, st.floats(1e-3, 1e3))
def test_ranges_and_invariances(shape: tuple[int, int, int], scale: float) -> None:
    n, d, seed = shape
    x, turn = normal(n, d, seed=seed), rotation(d, seed=seed)
    assert 1 <= effective_rank(x) <= min(n, d) + 1e-9
    assert 1 - 1e-9 <= participation_ratio(x) <= min(n - 1, d) + 1e-9
    assert -8 - 1e-9 <= uniformity(x) <= 1e-9
    order = torch.from_numpy(seeds.stream(seed, "order").permutation(n))
    for f in ONE:
        assert f(x[order]) == pytest.approx(f(x), rel=1e-9, abs=1e-9)
        assert f(scale * x) == pytest.approx(f(x), rel=1e-9, abs=1e-9)
        if f is not feature_std:
            assert f(x @ turn) == pytest.approx(f(x), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 6), (8, 30)])
def test_cka_ignores_rotation_scale_and_shift(n: int, d: int) -> None:
    x, y = normal(n, d), normal(n, d + 2, seed=1)
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 5 * x @ rotation(d) + 3) == pytest.approx(1)
    assert linear_cka(1e-30 * x, 1e30 * y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert 0 < linear_cka(x, y) < 1
    block = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert linear_cka(block[:, :1], block[:, 1:]) == pytest.approx(0, abs=1e-12)


def test_uniformity_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(37, 5)
    whole = uniformity(x)
    for block in (1, 37 * 4, 37 * 36):
        monkeypatch.setattr(diagnostics, "_BLOCK", block)
        assert uniformity(x) == pytest.approx(whole, rel=1e-12)


def test_one_row_and_zero_features_have_sensible_values() -> None:
    zeros = torch.zeros(6, 4)
    for x in (zeros, zeros[:1], normal(1, 4), normal(1, 4).expand(6, 4)):
        assert rankme(x) == pytest.approx(1, abs=1e-5)
        assert effective_rank(x) == pytest.approx(1, abs=1e-12)
        assert participation_ratio(x) == 1
        assert feature_std(x) == 0
        assert uniformity(x) == pytest.approx(0, abs=1e-12)
        assert alignment(x, x) == 0
        assert linear_cka(x, x) == 0
        np.testing.assert_array_equal(spectrum(x), np.zeros(4))
    half = torch.cat([zeros[:1], torch.eye(4)[:1]])  # a dead row beside a live one
    assert uniformity(half) == pytest.approx(-2)


def test_equal_rows_count_as_collapse_whatever_their_rounding() -> None:
    x = torch.full((1000, 7), 0.1) * torch.arange(1, 8)
    assert participation_ratio(x) == 1
    assert feature_std(x) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_give_nan(bad: float) -> None:
    x = normal(5, 3)
    x[2, 1] = bad
    for f in ONE:
        assert math.isnan(f(x)), f.__name__
    for g in TWO:
        assert math.isnan(g(x, normal(5, 3))), g.__name__
        assert math.isnan(g(normal(5, 3), x)), g.__name__
    np.testing.assert_array_equal(spectrum(x), [math.nan] * 3)


def test_low_precision_and_gradients_are_accepted() -> None:
    x = normal(9, 4).bfloat16()
    for f in ONE:
        assert f(x.clone().requires_grad_()) == f(x.double())
        assert isinstance(f(x), float)
    assert rankme(normal(20, 4) * 1e30) == pytest.approx(rankme(normal(20, 4)))


def test_spectrum_has_one_value_a_column() -> None:
    values = spectrum(normal(3, 6))
    assert values.shape == (6,)
    assert values.dtype == np.float64
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(values[2:], 0, atol=1e-12)


def test_refusals() -> None:
    for bad in (normal(3), normal(2, 3, 4), normal(3, 4)[:0], normal(3, 4)[:, :0]):
        for f in (*ONE, spectrum):
            with pytest.raises(ConfigError, match="shape"):
                f(bad)
    with pytest.raises(ConfigError, match="paired"):
        alignment(normal(3, 4), normal(3, 5))
    with pytest.raises(ConfigError, match="3 and 4 rows"):
        linear_cka(normal(3, 4), normal(4, 4))
