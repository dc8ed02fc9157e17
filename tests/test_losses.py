"""Losses against slow loops in float64, closed cases, finite differences and invariances."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.losses import info_nce, negative_cosine, nt_xent
from fedssl.losses.similarity import cross_entropies

property_test = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 7), st.integers(2, 6), st.integers(0, 10_000))  # B, D, seed


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeds.torch_stream(seed, "test", *shape), dtype=torch.float64).to(dtype)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0


def slow_info_nce(a: Tensor, p: Tensor, negatives: Tensor | None, t: float, similarity: str = "cosine") -> list[float]:
    score = cosine if similarity == "cosine" else lambda u, v: float(u @ v)
    out = []
    for i in range(len(a)):
        if negatives is None:
            others = [p[j] for j in range(len(p)) if j != i]
        else:
            others = list(negatives if negatives.ndim == 2 else negatives[i])
        own = score(a[i].numpy(), p[i].numpy()) / t
        logits = [own] + [score(a[i].numpy(), n.numpy()) / t for n in others]
        top = max(logits)
        out.append(math.log(sum(math.exp(v - top) for v in logits)) + top - own)
    return out


def slow_nt_xent(z1: Tensor, z2: Tensor, t: float, similarity: str = "cosine") -> list[float]:
    score = cosine if similarity == "cosine" else lambda u, v: float(u @ v)
    z, b = torch.cat([z1, z2]).numpy(), len(z1)
    total = [0.0] * b
    for i in range(2 * b):
        logits = {k: score(z[i], z[k]) / t for k in range(2 * b) if k != i}
        top = max(logits.values())
        log_sum = math.log(sum(math.exp(v - top) for v in logits.values())) + top
        total[i % b] += (log_sum - logits[(i + b) % (2 * b)]) / 2
    return total


@pytest.mark.parametrize("b", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 3.0])
def test_losses_equal_their_slow_loops(b: int, temperature: float) -> None:
    x, y = normal(b, 6), normal(b, 6, seed=1)
    for similarity in ("cosine", "dot"):
        for negatives in (None, normal(4, 6), normal(b, 3, 6), normal(0, 6)):
            got = info_nce(x, y, negatives, temperature=temperature, similarity=similarity)
            want = slow_info_nce(x, y, negatives, temperature, similarity)
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-11)
        got = nt_xent(x, y, temperature=temperature, similarity=similarity)
        want = slow_nt_xent(x, y, temperature, similarity)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-11)
    want = [-cosine(x[i].numpy(), y[i].numpy()) for i in range(b)]
    np.testing.assert_allclose(negative_cosine(x, y).numpy(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("n", "t", "expected"), [(2, 0.5, 0.239544766), (8, 0.5, 1.062879394), (8, 0.1, 6.35397e-4), (64, 0.5, None)]
)
def test_nt_xent_of_orthonormal_pairs(n: int, t: float, expected: float | None) -> None:
    z = torch.eye(n, dtype=torch.float64)
    loss = nt_xent(z, z, temperature=t)
    formula = math.log1p((2 * n - 2) * math.exp(-1 / t))
    np.testing.assert_allclose(loss.numpy(), [formula] * n, rtol=1e-12)
    assert expected is None or loss[0].item() == pytest.approx(expected, rel=1e-6)
    single = nt_xent(z.float(), z.float(), temperature=t)
    np.testing.assert_allclose(single.numpy(), [formula] * n, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_identical_embeddings_give_the_log_of_the_candidates(n: int) -> None:
    z = normal(1, 5).expand(n, 5)
    for loss in (nt_xent(z, z, temperature=0.5), info_nce(z, z, z[:1].expand(2 * n - 2, 5), temperature=0.07)):
        np.testing.assert_allclose(loss.numpy(), [math.log(2 * n - 1)] * n, rtol=1e-12)
    np.testing.assert_allclose(info_nce(z, z, temperature=0.1).numpy(), [math.log(n)] * n, rtol=1e-12)


@pytest.mark.parametrize(("n", "t"), [(2, 0.5), (8, 0.5), (64, 0.5), (2, 0.1)])
def test_a_diagonal_multiplied_by_zero_gives_another_loss(n: int, t: float) -> None:
    """The known defect: `exp(0)` of each view with itself stays in the denominator."""
    z = torch.eye(n, dtype=torch.float64)
    both = torch.cat([z, z])
    logits = (both @ both.T) * (1 - torch.eye(2 * n)) / t
    wrong = F.cross_entropy(logits, torch.arange(2 * n).roll(n)).item()
    assert wrong == pytest.approx(math.log1p((2 * n - 1) * math.exp(-1 / t)))
    right = nt_xent(z, z, temperature=t).mean().item()
    assert right == pytest.approx(math.log1p((2 * n - 2) * math.exp(-1 / t)))
    assert wrong - right > 1e-3 * wrong


@pytest.mark.parametrize(
    ("n", "t", "right", "wrong"),
    [(2, 0.5, 0.2364, 0.3469), (8, 0.5, 1.1156, 1.1648), (64, 0.5, 3.0173, 3.0245), (64, 0.1, 0.03625, 0.03632)],
)
def test_defect_11_the_diagonal_is_masked_and_not_multiplied_by_zero(
    n: int, t: float, right: float, wrong: float
) -> None:
    """The measured error of FL4Health's and FedU2's NT-Xent, largest for the small batches of small clients."""
    noise = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, 32, generator=noise)
    z2 = z1 + 0.3 * torch.randn(n, 32, generator=noise)
    half = 0.5 * 10.0 ** -(len(str(right)) - 2)  # of the last digit noted
    assert nt_xent(z1, z2, temperature=t).mean().item() == pytest.approx(right, abs=1.01 * half)
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / t).fill_diagonal_(0)
    assert F.cross_entropy(logits, torch.arange(2 * n).roll(n)).item() == pytest.approx(wrong, abs=1.01 * half)


def test_one_example_without_negatives_has_loss_zero_and_no_gradient() -> None:
    x, y = normal(1, 4).requires_grad_(), normal(1, 4, seed=1)
    for loss in (info_nce(x, y, temperature=0.1), nt_xent(x, y, temperature=0.1)):
        assert loss.item() == 0
        assert torch.autograd.grad(loss.sum(), x)[0].abs().max() < 1e-12


def test_negative_cosine_of_equal_orthogonal_and_opposite_vectors() -> None:
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    y = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    np.testing.assert_allclose(negative_cosine(x, y).numpy(), [-1, 0, 1])
    wide = normal(500, 33, dtype=torch.float32)
    assert bool((negative_cosine(wide, wide) >= -1).all())  # also by rounding


def test_info_nce_is_cross_entropy_of_its_logits() -> None:
    a, p, n = normal(6, 4), normal(6, 4, seed=1), normal(9, 4)
    expected = F.cross_entropy(F.normalize(a) @ F.normalize(p).T / 0.2, torch.arange(6), reduction="none")
    torch.testing.assert_close(info_nce(a, p, temperature=0.2), expected)
    logits = torch.cat([(a * p).sum(1, keepdim=True), a @ n.T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="none")
    torch.testing.assert_close(info_nce(a, p, n, temperature=0.2, similarity="dot"), expected)
    mean = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(info_nce(a, p, n, temperature=0.2, similarity="dot").mean(), mean)


def test_mean_of_nt_xent_is_the_loss_over_all_views() -> None:
    x, y = normal(5, 4), normal(5, 4, seed=1)
    z = F.normalize(torch.cat([x, y]))
    logits = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    torch.testing.assert_close(nt_xent(x, y, temperature=0.3).mean(), expected)


@pytest.mark.parametrize("b", [1, 2, 4])
def test_gradients_agree_with_finite_differences(b: int) -> None:
    x, y, n = (normal(b, 3, seed=s).requires_grad_() for s in range(3))
    own = normal(b, 2, 3).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x, y: nt_xent(x, y, temperature=0.5), (x, y))
    assert check(lambda x, y: nt_xent(x, y, temperature=0.5, similarity="dot"), (x, y))
    assert check(lambda x, y: info_nce(x, y, temperature=0.5), (x, y))
    assert check(lambda x, y, n: info_nce(x, y, n, temperature=0.5), (x, y, n))
    assert check(lambda x, y, n: info_nce(x, y, n, temperature=0.5, similarity="dot"), (x, y, own))
    assert check(lambda x: negative_cosine(x, y), (x,))


def test_the_target_of_negative_cosine_gets_no_gradient() -> None:
    x, y = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    negative_cosine(x, y).sum().backward()
    assert y.grad is None
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_cross_entropies_are_torchs_bit_for_bit() -> None:
    """Values and gradients, so that no run changes with the way by which `vmap` finds them."""
    for dtype in (torch.float32, torch.float64):
        logits = (20 * normal(9, 6, dtype=dtype)).masked_fill(normal(9, 6, seed=1) > 1.5, -math.inf).requires_grad_()
        classes = torch.arange(9) % 6
        logits.data[torch.arange(9), classes] = normal(9, seed=2, dtype=dtype)
        mine, torchs = cross_entropies(logits, classes), F.cross_entropy(logits, classes, reduction="none")
        assert torch.equal(mine, torchs)
        weights = normal(9, seed=3, dtype=dtype)
        slopes = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (mine, torchs)]
        assert torch.equal(*slopes)


def test_a_batch_of_contrastive_losses_does_not_import_sympy() -> None:
    """In a process of its own: what is imported once stays."""
    program = (
        "import sys, torch; from fedssl.losses import nt_xent; z = torch.rand(2, 3, 4); "
        "torch.func.vmap(lambda a: nt_xent(a, a + 1, temperature=0.5))(z); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@property_test
@given(sizes)
def test_permuting_the_batch_permutes_the_losses(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    x, y, own = normal(b, d, seed=seed), normal(b, d, seed=seed + 1), normal(b, 3, d, seed=seed)
    order = torch.from_numpy(seeds.stream(seed, "order").permutation(b))
    for f in (lambda x, y: nt_xent(x, y, temperature=0.2), lambda x, y: info_nce(x, y, temperature=0.2)):
        torch.testing.assert_close(f(x[order], y[order]), f(x, y)[order])
    shuffled = info_nce(x[order], y[order], own[order], temperature=0.2)
    torch.testing.assert_close(shuffled, info_nce(x, y, own, temperature=0.2)[order])
    torch.testing.assert_close(negative_cosine(x[order], y[order]), negative_cosine(x, y)[order])
    torch.testing.assert_close(nt_xent(x, y, temperature=0.2), nt_xent(y, x, temperature=0.2))


@property_test
@given(sizes, st.floats(1e-3, 1e3))
def test_cosine_losses_ignore_length_and_pull_at_right_angles(size: tuple[int, int, int], scale: float) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed).requires_grad_(), normal(b, d, seed=seed + 1)
    for f in (
        lambda x: nt_xent(x, y, temperature=0.3),
        lambda x: info_nce(x, y, temperature=0.3),
        lambda x: info_nce(x, y, y[:1], temperature=0.3),
        lambda x: negative_cosine(x, y),
    ):
        torch.testing.assert_close(f(x * scale), f(x))
        (slope,) = torch.autograd.grad(f(x).sum(), x)
        assert (slope * x).sum(1).abs().max() < 1e-9


@property_test
@given(sizes)
def test_ranges(size: tuple[int, int, int]) -> None:
    b, d, seed = size
    x, y = normal(b, d, seed=seed, dtype=torch.float32), normal(b, d, seed=seed + 1, dtype=torch.float32)
    assert bool((nt_xent(x, y, temperature=0.05) >= 0).all())
    assert bool((info_nce(x, y, temperature=0.05) >= 0).all())
    assert bool((nt_xent(x, y, temperature=1.0) <= math.log(2 * b - 1) + 2 + 1e-5).all())
    assert bool((negative_cosine(x, y).abs() <= 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_small_temperature_and_extreme_norms_stay_exact(dtype: torch.dtype, size: float) -> None:
    x, y = (normal(6, 8, seed=1).sign() * size).to(dtype), (normal(6, 8, seed=2).sign() * size).to(dtype)
    got = nt_xent(x.requires_grad_(), y, temperature=0.01)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = slow_nt_xent(x.detach().double(), y.double(), 0.01)
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=1e-5, atol=1e-4)
    for similarity in ("cosine", "dot"):
        loss = info_nce(x, y, y[:2], temperature=0.01, similarity=similarity)
        assert bool(torch.isfinite(loss).all())
        if dtype != torch.float16:  # which cannot hold gradients of 1e6
            assert bool(torch.isfinite(torch.autograd.grad(loss.sum(), x)[0]).all())


def test_zero_vectors_give_finite_losses_and_gradients() -> None:
    x = normal(3, 4, dtype=torch.float32)
    x[1] = 0
    zero = torch.zeros_like(x)
    for a, b in ((x, zero), (zero, x), (zero, zero)):
        a = a.clone().requires_grad_()
        both = [nt_xent(a, b, temperature=0.1), negative_cosine(a, b)]
        for loss in [*both, *(info_nce(a, b, n, temperature=0.1) for n in (None, zero, zero[:, None]))]:
            assert bool(torch.isfinite(loss).all())
            (slope,) = torch.autograd.grad(loss.sum(), a)
            assert slope.abs().max() < 1e3  # finite, and no step to the end of the world
    np.testing.assert_array_equal(negative_cosine(zero, x).numpy(), [0, 0, 0])


def test_autocast_keeps_full_precision() -> None:
    x, y = normal(8, 16, dtype=torch.float32), normal(8, 16, seed=1, dtype=torch.float32)
    plain = [nt_xent(x, y, temperature=0.01), info_nce(x, y, temperature=0.01), info_nce(x, y, y, temperature=0.01)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [nt_xent(x, y, temperature=0.01), info_nce(x, y, temperature=0.01), info_nce(x, y, y, temperature=0.01)]
        mixed = negative_cosine(x.bfloat16(), y)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    torch.testing.assert_close(mixed, negative_cosine(x, y), rtol=0, atol=2e-2)


def test_torch_func_transforms_equal_the_loop() -> None:
    w, x, y = normal(3, 4, 4), normal(3, 5, 4), normal(3, 5, 4, seed=1)
    for f in (
        lambda w, x, y: negative_cosine(x @ w, y @ w).mean(),
        lambda w, x, y: nt_xent(x @ w, y @ w, temperature=0.2).mean(),
        lambda w, x, y: info_nce(x @ w, y @ w, temperature=0.2).mean(),
        lambda w, x, y: info_nce(x @ w, y @ w, y[:2], temperature=0.2).mean(),
    ):
        looped = torch.stack([grad(f)(w[i], x[i], y[i]) for i in range(3)])
        torch.testing.assert_close(vmap(grad(f))(w, x, y), looped)
    # Per-example gradients of one model, as example-level privacy takes them.
    each = vmap(grad(lambda w, x, y: negative_cosine(x[None] @ w, y[None])[0]), in_dims=(None, 0, 0))(w[0], x[0], y[0])
    whole = grad(lambda w: negative_cosine(x[0] @ w, y[0]).sum())(w[0])
    torch.testing.assert_close(each.sum(0), whole)


def test_refusals_name_what_was_found() -> None:
    x = normal(3, 4)
    for bad in (x[:2], x[:, :3]):
        for loss in (nt_xent, info_nce):
            with pytest.raises(ConfigError, match=r"\(3, 4\)"):
                loss(x, bad, temperature=1.0)
        with pytest.raises(ConfigError, match="paired"):
            negative_cosine(x, bad)
    for bad in (x[0], x[None], x[:0], x[:, :0]):
        with pytest.raises(ConfigError, match="shape"):
            nt_xent(bad, bad, temperature=1.0)
        with pytest.raises(ConfigError, match="shape"):
            info_nce(bad, bad, temperature=1.0)
        with pytest.raises(ConfigError, match="shape"):
            negative_cosine(bad, bad)
    for negatives in (x[0], x[:, :3], x[None], x[None, None]):
        with pytest.raises(ConfigError, match="negatives"):
            info_nce(x, x, negatives, temperature=1.0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            nt_xent(x, x, temperature=temperature)
        with pytest.raises(ConfigError, match="temperature"):
            info_nce(x, x, temperature=temperature)
    for loss in (nt_xent, info_nce):
        with pytest.raises(ConfigError, match="'euclid'"):
            loss(x, x, temperature=1.0, similarity="euclid")
    with pytest.raises(ConfigError, match="int64"):
        nt_xent(x.long(), x, temperature=1.0)
