"""Losses over many candidates: CLIP, memory bank, pairs one by one, and the weights of negatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import cosine, normal, slow_info_nce
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses import (
    clip,
    info_nce,
    instance_discrimination,
    negative_weights,
    nt_xent,
    sigmoid_pair,
    spectral,
)

property_test = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 7), st.integers(2, 6), st.integers(0, 10_000))  # B, D, seed
temperatures = st.sampled_from([0.01, 0.1, 0.5, 3.0])


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def slow_sigmoid_pair(z1: Tensor, z2: Tensor, t: float, bias: float) -> list[float]:
    a, b, n, out = z1.numpy(), z2.numpy(), len(z1), []
    for i in range(n):
        value = softplus(-(cosine(a[i], b[i]) / t + bias))
        for j in range(n):
            if j != i:
                value += softplus(cosine(a[i], b[j]) / t + bias) / n
        out.append(value)
    return out


def slow_spectral(z1: Tensor, z2: Tensor) -> float:
    """Both expectations over the batch's pairs, as the authors' code takes them."""
    a, b, n = z1.numpy(), z2.numpy(), len(z1)
    own = sum(float(a[i] @ b[i]) for i in range(n)) / n
    others = [float(a[i] @ b[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    return -2 * own + sum(others) / len(others)


@property_test
@given(sizes, temperatures)
def test_clip_is_the_mean_of_info_nce_in_both_directions(size: tuple[int, int, int], t: float) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed), normal(b, d, seed=seed + 1)
    slow = (np.array(slow_info_nce(x, y, None, t)) + slow_info_nce(y, x, None, t)) / 2
    np.testing.assert_allclose(clip(x, y, temperature=t).numpy(), slow, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(clip(x, y, temperature=t), clip(y, x, temperature=t))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_clip_closed_cases(n: int) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    found = math.log1p((n - 1) * math.exp(-1 / 0.5))
    np.testing.assert_allclose(clip(eye, 5 * eye, temperature=0.5).numpy(), [found] * n, atol=1e-14)
    one = normal(1, 4).expand(n, 4)
    np.testing.assert_allclose(clip(one, one, temperature=0.07).numpy(), [math.log(n)] * n, atol=1e-14)


def test_clip_has_no_candidates_within_a_modality() -> None:
    z = torch.eye(2, dtype=torch.float64)
    assert clip(z, z, temperature=0.5)[0].item() == pytest.approx(math.log1p(math.exp(-2)))
    assert nt_xent(z, z, temperature=0.5)[0].item() == pytest.approx(math.log1p(2 * math.exp(-2)))


@property_test
@given(sizes, temperatures, st.integers(1, 9))
def test_instance_discrimination_equals_its_slow_loop(size: tuple[int, int, int], t: float, n: int) -> None:
    b, d, seed = size
    x, bank = normal(b, d, seed=seed), normal(n, d, seed=seed + 1)
    index = torch.arange(b) * 5 % n
    slow = []
    for i in range(b):
        logits = [cosine(x[i].numpy(), key) / t for key in bank.numpy()]
        top = max(logits)
        slow.append(math.log(sum(math.exp(v - top) for v in logits)) + top - logits[int(index[i])])
    got = instance_discrimination(x, bank, index, temperature=t)
    np.testing.assert_allclose(got.numpy(), slow, rtol=1e-10, atol=1e-11)


def test_instance_discrimination_is_a_linear_layer_of_stored_keys_without_bias() -> None:
    x, keys, index = F.normalize(normal(5, 4)), F.normalize(normal(9, 4, seed=1)), torch.tensor([0, 8, 3, 3, 1])
    layer = torch.nn.Linear(4, 9, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(keys)
        layer.bias.zero_()
    expected = F.cross_entropy(layer(x) / 0.07, index, reduction="none")
    torch.testing.assert_close(instance_discrimination(x, keys, index, temperature=0.07), expected)


def test_instance_discrimination_closed_cases() -> None:
    eye, index = torch.eye(8, dtype=torch.float64), torch.arange(8)
    found = math.log1p(7 * math.exp(-1 / 0.5))
    got = instance_discrimination(eye, eye, index, temperature=0.5)
    np.testing.assert_allclose(got.numpy(), [found] * 8, rtol=1e-12)
    for bank in (eye[:1].expand(8, 8), torch.zeros(8, 8, dtype=torch.float64)):
        got = instance_discrimination(eye, bank, index, temperature=0.07)
        np.testing.assert_allclose(got.numpy(), [math.log(8)] * 8, rtol=1e-12)
    assert instance_discrimination(eye[:1], eye[:1], index[:1], temperature=0.07).item() == 0
    # With the batch as the bank it is InfoNCE within the batch.
    x, y = normal(6, 4), normal(6, 4, seed=1)
    batch = instance_discrimination(x, y, torch.arange(6), temperature=0.2)
    torch.testing.assert_close(batch, info_nce(x, y, temperature=0.2))


@property_test
@given(sizes, temperatures, st.sampled_from([0.0, -10.0, 2.0]))
def test_sigmoid_pair_equals_its_slow_loop(size: tuple[int, int, int], t: float, bias: float) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed), normal(b, d, seed=seed + 1)
    got = sigmoid_pair(x, y, temperature=t, bias=bias)
    np.testing.assert_allclose(got.numpy(), slow_sigmoid_pair(x, y, t, bias), rtol=1e-10, atol=1e-13)
    back = sigmoid_pair(y, x, temperature=t, bias=bias)
    torch.testing.assert_close(got.sum(), back.sum())  # the loss does not know which view is the first


@pytest.mark.parametrize("n", [1, 2, 8])
def test_sigmoid_pair_closed_cases(n: int) -> None:
    eye = torch.eye(2 * n, dtype=torch.float64)
    found = softplus(-1 / 0.1) + (n - 1) / n * math.log(2)
    np.testing.assert_allclose(sigmoid_pair(eye[:n], eye[:n], temperature=0.1).numpy(), [found] * n, rtol=1e-12)
    unlike = sigmoid_pair(eye[:n], eye[n:], temperature=0.1)
    np.testing.assert_allclose(unlike.numpy(), [(2 - 1 / n) * math.log(2)] * n, rtol=1e-12)


def test_sigmoid_pair_weighs_positives_by_one_and_negatives_by_one_over_the_batch() -> None:
    x, y = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:1].expand(4, 4)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)  # its slope sums the pairs' slopes
    loss = sigmoid_pair(x, y, temperature=0.5, bias=bias)
    slopes = [torch.autograd.grad(value, bias, retain_graph=True)[0].item() for value in loss]
    sure = 1 / (1 + math.exp(-2))  # row 0 has similarity 1 with all, the others 0
    assert slopes == pytest.approx([-(1 - sure) + 3 / 4 * sure] + 3 * [-1 / 2 + 3 / 4 * 1 / 2])


def test_an_example_moves_the_sum_of_pairs_by_a_bounded_amount() -> None:
    """The premise of private pair losses: coefficients of all similarity gradients change by less than 4 / t in sum."""

    def slopes(scores: Tensor) -> Tensor:
        # Unit rows whose products are the scores: x_i = e_i, y_j = (scores[:, j], what is missing to length 1).
        n = len(scores)
        y = torch.cat([scores.T, torch.diag((1 - scores.square().sum(0)).sqrt())], dim=1)
        x = torch.eye(n, 2 * n, dtype=scores.dtype).requires_grad_()
        (slope,) = torch.autograd.grad(sigmoid_pair(x, y, temperature=t).sum(), x)
        rest = y[:, n:].diagonal()
        return slope[:, n:] / rest  # x's gradient is sum_j c_ij y_j, and only y_j reaches the column n + j

    t = 0.2
    for n, seed in ((2, 0), (5, 1), (16, 2)):
        scores = normal(n, n, seed=seed) / n
        more, less = slopes(scores), slopes(scores[:-1, :-1])
        moved = more.clone()
        moved[:-1, :-1] -= less
        assert moved.abs().sum() < 4 / t


@property_test
@given(st.tuples(st.integers(2, 7), st.integers(1, 6), st.integers(0, 10_000)))
def test_spectral_equals_its_slow_loop(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed), normal(b, d, seed=seed + 1)
    got = spectral(x, y)
    assert got.mean().item() == pytest.approx(slow_spectral(x, y), rel=1e-10, abs=1e-12)
    for i in range(b):
        others = [float(x[i] @ y[j]) ** 2 for j in range(b) if j != i]
        assert got[i].item() == pytest.approx(-2 * float(x[i] @ y[i]) + sum(others) / (b - 1), rel=1e-10, abs=1e-12)


def test_spectral_closed_cases() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    np.testing.assert_array_equal(spectral(eye, eye).numpy(), [-2.0] * 5)
    np.testing.assert_array_equal(spectral(eye[:1].expand(5, 5), eye[:1].expand(5, 5)).numpy(), [-1.0] * 5)
    np.testing.assert_array_equal(spectral(0 * eye, 0 * eye).numpy(), [0.0] * 5)
    np.testing.assert_array_equal(spectral(eye, -eye).numpy(), [2.0] * 5)
    np.testing.assert_array_equal(spectral(3 * eye, 3 * eye).numpy(), [-18.0] * 5)  # without end: bound the norm


def test_spectral_averages_to_the_loss_of_the_population() -> None:
    """No bias: the mean over all ordered batches of 2 from a finite population, with replacement, is the definition."""
    z1, z2 = normal(4, 3), normal(4, 3, seed=1)
    batches = [spectral(z1[[i, j]], z2[[i, j]]).mean() for i in range(4) for j in range(4)]
    population = -2 * (z1 * z2).sum(1).mean() + (z1 @ z2.T).square().mean()
    torch.testing.assert_close(torch.stack(batches).mean(), population)


@property_test
@given(sizes, st.sampled_from([0.05, 0.5, 5.0]))
def test_negative_weights_are_those_of_the_gradient_of_info_nce(size: tuple[int, int, int], t: float) -> None:
    b, d, seed = size
    scores = normal(b, 1 + d, seed=seed).requires_grad_()  # the positive first
    loss = F.cross_entropy(scores / t, torch.zeros(b, dtype=torch.long), reduction="none")
    (slope,) = torch.autograd.grad(loss.sum(), scores)
    weights = negative_weights(scores.detach()[:, 1:], temperature=t)
    missed = 1 - torch.softmax(scores.detach() / t, dim=1)[:, :1]
    torch.testing.assert_close(slope[:, 1:], missed / t * weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights.sum(1).numpy(), np.ones(b), rtol=1e-12)


def test_negative_weights_at_the_ends_of_temperature() -> None:
    scores = torch.tensor([[0.9, 0.1, -0.5], [0.2, 0.2, -1.0]])
    cold, hot = negative_weights(scores, temperature=1e-3), negative_weights(scores, temperature=1e6)
    np.testing.assert_allclose(cold.numpy(), [[1, 0, 0], [0.5, 0.5, 0]], atol=1e-12)
    np.testing.assert_allclose(hot.numpy(), np.full((2, 3), 1 / 3), rtol=1e-5)
    scores[0, 0] = -math.inf  # a masked negative
    assert negative_weights(scores, temperature=0.1)[0, 0].item() == 0
    assert negative_weights(scores[:, :0], temperature=0.1).shape == (2, 0)


def test_refusals_name_what_was_found() -> None:
    x, index = normal(3, 4), torch.arange(3)
    for loss in (clip, sigmoid_pair):
        with pytest.raises(ConfigError, match="paired"):
            loss(x, x[:2], temperature=1.0)
        with pytest.raises(ConfigError, match="temperature is 0"):
            loss(x, x, temperature=0.0)
    with pytest.raises(ConfigError, match="paired"):
        spectral(x, x[:, :3])
    with pytest.raises(ConfigError, match="one example"):
        spectral(x[:1], x[:1])
    with pytest.raises(ConfigError, match=r"bank has the shape \(3, 3\)"):
        instance_discrimination(x, x[:, :3], index, temperature=1.0)
    with pytest.raises(ConfigError, match="bank has the shape"):
        instance_discrimination(x, x[:0], index, temperature=1.0)
    for bad in (index[:2], index.int(), index[:, None], index.double()):
        with pytest.raises(ConfigError, match="index holds"):
            instance_discrimination(x, x, bad, temperature=1.0)
    with pytest.raises(ConfigError, match="temperature"):
        instance_discrimination(x, x, index, temperature=math.nan)
    with pytest.raises(ConfigError, match="scores has the shape"):
        negative_weights(x[0], temperature=1.0)
    with pytest.raises(ConfigError, match="int64"):
        negative_weights(x.long(), temperature=1.0)
    with pytest.raises(ConfigError, match="temperature"):
        negative_weights(x, temperature=-1.0)
