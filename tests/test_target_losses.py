"""Losses towards a target, each example by itself: predictors, DINO and masked reconstruction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import cosine, normal
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses import dino, masked_reconstruction, negative_cosine, negative_similarity

property_test = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(0, 10_000))  # B, D, seed
PAPER = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def slow_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_dino(student: Tensor, teacher: Tensor, center: Tensor, s: float, t: float) -> list[float]:
    out = []
    for i in range(len(student)):
        target = slow_softmax((teacher[i] - center).numpy() / t)
        logits = student[i].numpy() / s
        log_sum = math.log(np.exp(logits - logits.max()).sum()) + logits.max()
        out.append(-sum(float(p) * float(v - log_sum) for p, v in zip(target, logits, strict=True)))
    return out


def slow_masked(prediction: Tensor, target: Tensor, mask: Tensor) -> list[float]:
    out = []
    for p, t, m in zip(prediction.tolist(), target.tolist(), mask.tolist(), strict=True):
        errors = [sum((a - b) ** 2 for a, b in zip(p[k], t[k], strict=True)) / len(p[k]) for k in range(len(m)) if m[k]]
        out.append(sum(errors) / len(errors) if errors else 0.0)
    return out


@property_test
@given(sizes)
def test_negative_similarity_equals_its_slow_loop(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed), normal(b, d, seed=seed + 1)
    for stop in (True, False):
        got = negative_similarity(x, y, stop_gradient=stop)
        want = [-cosine(x[i].numpy(), y[i].numpy()) for i in range(b)]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)
        got = negative_similarity(x, y, similarity="dot", stop_gradient=stop)
        np.testing.assert_allclose(got.numpy(), [-float(x[i] @ y[i]) for i in range(b)], rtol=1e-10, atol=1e-12)
    assert torch.equal(negative_similarity(x, y), negative_cosine(x, y))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_gradient_reaches_the_target_only_when_asked(similarity: str) -> None:
    x, y = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    stopped = negative_similarity(x, y, similarity=similarity).sum()
    assert torch.autograd.grad(stopped, y, allow_unused=True, retain_graph=True)[0] is None
    (with_stop,) = torch.autograd.grad(stopped, x)
    free = negative_similarity(x, y, similarity=similarity, stop_gradient=False).sum()
    without_stop, other = torch.autograd.grad(free, (x, y))
    torch.testing.assert_close(with_stop, without_stop)
    mirrored = negative_similarity(y, x, similarity=similarity).sum()
    torch.testing.assert_close(other, torch.autograd.grad(mirrored, y)[0])
    if similarity == "dot":
        torch.testing.assert_close(other, -x)


def test_dot_similarity_pulls_along_the_vector_and_cosine_does_not() -> None:
    x = normal(5, 4).requires_grad_()
    for similarity, along in (("cosine", False), ("dot", True)):
        (slope,) = torch.autograd.grad(negative_similarity(x, 2 * x, similarity=similarity).sum(), x)
        assert bool(((slope * x).sum(1).abs() > 1e-3).all()) is along


@property_test
@given(sizes, st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.01, 0.04, 1.0]))
def test_dino_equals_its_slow_loop(size: tuple[int, int, int], s: float, t: float) -> None:
    b, d, seed = size
    x, y, center = normal(b, d, seed=seed), normal(b, d, seed=seed + 1), normal(d, seed=seed)
    got = dino(x, y, center, student_temperature=s, teacher_temperature=t)
    np.testing.assert_allclose(got.numpy(), slow_dino(x, y, center, s, t), rtol=1e-10, atol=1e-11)


def test_dino_closed_cases() -> None:
    x, flat, none = normal(4, 6), torch.ones(4, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    np.testing.assert_allclose(dino(flat, x, none, **PAPER).numpy(), [math.log(6)] * 4, rtol=1e-12)
    # A teacher that says what the center says is centred to uniform.
    assert dino(flat[:1], x[:1], x[0], **PAPER).item() == pytest.approx(math.log(6))
    sharp = 100 * torch.eye(4, 6, dtype=torch.float64)
    np.testing.assert_allclose(dino(sharp, sharp, none, **PAPER).numpy(), np.zeros(4), atol=1e-12)
    # Equal distributions have their entropy, and no student does better.
    p = torch.softmax(x / 0.1, dim=1)
    entropy = -(p * p.log()).sum(1)
    same = dino(x, x, none, student_temperature=0.1, teacher_temperature=0.1)
    torch.testing.assert_close(same, entropy)
    other = dino(normal(4, 6, seed=1), x, none, student_temperature=0.1, teacher_temperature=0.1)
    assert bool((other >= entropy).all())
    assert dino(x[:, :1], x[:, :1], none[:1], **PAPER).abs().max() == 0  # one prototype: nothing to guess


def test_the_gradient_of_dino_is_the_difference_of_the_softmaxes_and_stops_at_the_teacher() -> None:
    x, y, center = (normal(*shape, seed=s).requires_grad_() for s, shape in enumerate(((3, 5), (3, 5), (5,))))
    loss = dino(x, y, center, **PAPER).sum()
    slope, *stopped = torch.autograd.grad(loss, (x, y, center), allow_unused=True)
    expected = (torch.softmax(x / 0.1, 1) - torch.softmax((y - center) / 0.04, 1)) / 0.1
    torch.testing.assert_close(slope, expected.detach())
    assert stopped == [None, None]


@property_test
@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000)))
def test_masked_reconstruction_equals_its_slow_loop(size: tuple[int, int, int, int]) -> None:
    b, t, p, seed = size
    x, y, mask = normal(b, t, p, seed=seed), normal(b, t, p, seed=seed + 1), normal(b, t, seed=seed) > 0
    got = masked_reconstruction(x, y, mask)
    np.testing.assert_allclose(got.numpy(), slow_masked(x, y, mask), rtol=1e-12, atol=1e-14)


def test_masked_reconstruction_closed_cases() -> None:
    y = normal(3, 4, 2)
    half = torch.tensor([True, True, False, False]).expand(3, 4)
    np.testing.assert_array_equal(masked_reconstruction(y, y, half).numpy(), np.zeros(3))
    np.testing.assert_allclose(masked_reconstruction(y + 2, y, half).numpy(), [4.0] * 3)
    # With as many hidden patches in each example the mean is the paper's, over all hidden patches.
    x = normal(3, 4, 2, seed=1)
    paper = ((x - y).square().mean(2) * half).sum() / half.sum()
    torch.testing.assert_close(masked_reconstruction(x, y, half).mean(), paper)
    every = masked_reconstruction(x, y, torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(every, (x - y).square().mean((1, 2)))


def test_visible_patches_are_not_read_and_an_example_with_nothing_hidden_has_loss_zero() -> None:
    x, y = normal(2, 3, 2), normal(2, 3, 2, seed=1)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    clean = masked_reconstruction(x, y, mask)
    x[:, 1:], y[1] = math.nan, math.inf
    x.requires_grad_()
    loss = masked_reconstruction(x, y, mask)
    torch.testing.assert_close(loss, clean)
    assert loss[1].item() == 0
    (slope,) = torch.autograd.grad(loss.sum(), x)
    assert bool(torch.isfinite(slope).all())
    assert slope[0, 1:].abs().max() == 0
    assert slope[1].abs().max() == 0
    assert slope[0, 0].abs().max() > 0


def test_refusals_name_what_was_found() -> None:
    x, center = normal(3, 4), torch.zeros(4)
    with pytest.raises(ConfigError, match="'euclid'"):
        negative_similarity(x, x, similarity="euclid")
    with pytest.raises(ConfigError, match="paired"):
        negative_similarity(x, x[:2])
    with pytest.raises(ConfigError, match="paired"):
        dino(x, x[:2], center, **PAPER)
    for bad in (center[:3], center[None], torch.zeros(())):
        with pytest.raises(ConfigError, match="center has the shape"):
            dino(x, x, bad, **PAPER)
    with pytest.raises(ConfigError, match="center holds torch.int64"):
        dino(x, x, center.long(), **PAPER)
    for name in PAPER:
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            dino(x, x, center, **{**PAPER, name: 0.0})
    y, mask = normal(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    for bad in (y[0], y[:0], y[..., None]):
        with pytest.raises(ConfigError, match=r"need \(B, T, P\)"):
            masked_reconstruction(bad, y, mask)
    with pytest.raises(ConfigError, match=r"\(2, 3, 3\)"):
        masked_reconstruction(y[..., :3], y, mask)
    with pytest.raises(ConfigError, match="int64"):
        masked_reconstruction(y, y.long(), mask)
    for bad in (mask[:1], mask.float(), mask[..., None]):
        with pytest.raises(ConfigError, match="mask holds"):
            masked_reconstruction(y, y, bad)
