"""What all losses promise alike: precision, derivatives, order of examples, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import normal
from torch import Tensor
from torch.func import grad, vmap

from fedssl import losses, seeds
from fedssl.errors import ConfigError

Loss = Callable[[Tensor, Tensor, Tensor, "float | Tensor"], Tensor]
D = 6
# What does not change with the batch: a queue, a bank, a center; in numbers that every precision holds.
FIXED = normal(9, D, seed=77).bfloat16().double()
HIDDEN = normal(9, 3, seed=78) > 0


def masked(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    mask = HIDDEN.to(x.device)[rows]
    return losses.masked_reconstruction(x.reshape(-1, 3, 2), y.reshape(-1, 3, 2), mask)


# Two batches, the numbers of their examples, a temperature -> the loss. Those of T take the temperature.
T: dict[str, Loss] = {
    "info_nce": lambda x, y, r, t: losses.info_nce(x, y, temperature=t),
    "info_nce dot": lambda x, y, r, t: losses.info_nce(x, y, temperature=t, similarity="dot"),
    "info_nce queue": lambda x, y, r, t: losses.info_nce(x, y, FIXED.to(x)[:5], temperature=t),
    "nt_xent": lambda x, y, r, t: losses.nt_xent(x, y, temperature=t),
    "nt_xent dot": lambda x, y, r, t: losses.nt_xent(x, y, temperature=t, similarity="dot"),
    "clip": lambda x, y, r, t: losses.clip(x, y, temperature=t),
    "instance_discrimination": lambda x, y, r, t: losses.instance_discrimination(x, FIXED.to(x), r, temperature=t),
    "negative_weights": lambda x, y, r, t: losses.negative_weights(x, temperature=t),
    "sigmoid_pair": lambda x, y, r, t: losses.sigmoid_pair(x, y, temperature=t, bias=-1.0),
    "dino": lambda x, y, r, t: losses.dino(x, y, FIXED.to(x)[0], student_temperature=t, teacher_temperature=t / 2),
}
LOSSES: dict[str, Loss] = T | {
    "spectral": lambda x, y, r, t: losses.spectral(x, y),
    "negative_cosine": lambda x, y, r, t: losses.negative_cosine(x, y),
    "negative_similarity dot": lambda x, y, r, t: losses.negative_similarity(
        x, y, similarity="dot", stop_gradient=False
    ),
    "masked_reconstruction": lambda x, y, r, t: masked(x, y, r),
    "vicreg": lambda x, y, r, t: losses.vicreg(x, y).total,
    "barlow_twins": lambda x, y, r, t: losses.barlow_twins(x, y, off_diagonal=0.1),
    "decorrelation": lambda x, y, r, t: losses.decorrelation(x),
}
OF_THE_BATCH = ("vicreg", "barlow_twins", "decorrelation")
NEEDS_TWO = ("vicreg", "barlow_twins", "spectral")
STOPPED = ("dino", "negative_cosine")  # no gradient to the second batch
UNREAD = ("instance_discrimination", "negative_weights", "decorrelation")  # no second batch
ALONE = (
    *STOPPED,
    "negative_similarity dot",
    "masked_reconstruction",
    "negative_weights",
    "instance_discrimination",  # but its bank holds the other examples
    "info_nce queue",  # and so does the queue
)
every = pytest.mark.parametrize("name", LOSSES)


def pair(b: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return normal(b, D, seed=seed, dtype=dtype), normal(b, D, seed=seed + 1, dtype=dtype), torch.arange(b)


def test_every_public_loss_is_here() -> None:
    pieces = {"relations", "jensen_shannon", "kullback_leibler"}  # of distillation: tests/test_distillation.py
    assert {name.split()[0] for name in LOSSES} | pieces == {name for name in losses.__all__ if name[0].islower()}
    assert all(callable(getattr(losses, name)) for name in losses.__all__)


@every
@pytest.mark.parametrize("b", [1, 3])
def test_gradients_agree_with_finite_differences(name: str, b: int) -> None:
    x, y, rows = pair(b)
    if b == 1 and name in NEEDS_TWO:
        with pytest.raises(ConfigError, match="one example"):
            LOSSES[name](x, y, rows, 0.5)
        return
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, y, rows, 0.5), (x,))
    if name in STOPPED + UNREAD:
        out = LOSSES[name](x, y, rows, 0.5).sum()
        assert torch.autograd.grad(out, y, allow_unused=True)[0] is None
    else:
        assert torch.autograd.gradcheck(lambda y: LOSSES[name](x, y, rows, 0.5), (y,))


@every
@settings(max_examples=8, deadline=None, derandomize=True)
@given(b=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_permuting_the_batch_permutes_the_losses(name: str, b: int, seed: int) -> None:
    x, y, rows = pair(b, seed)
    order = torch.from_numpy(seeds.stream(seed, "order").permutation(b))
    out, moved = LOSSES[name](x, y, rows, 0.2), LOSSES[name](x[order], y[order], rows[order], 0.2)
    if name in OF_THE_BATCH:
        assert out.shape == ()
        torch.testing.assert_close(moved, out)
    else:
        assert out.shape == ((b, D) if name == "negative_weights" else (b,))
        torch.testing.assert_close(moved, out[order])


@every
def test_which_losses_read_one_example_at_a_time(name: str) -> None:
    """What example-level privacy may rest on; all other losses couple the examples of a batch."""
    x, y, rows = pair(4)
    whole = LOSSES[name](x, y, rows, 0.5)
    if name in NEEDS_TWO + OF_THE_BATCH:
        return
    alone = torch.cat([LOSSES[name](x[i : i + 1], y[i : i + 1], rows[i : i + 1], 0.5) for i in range(4)])
    assert torch.allclose(alone, whole) is (name in ALONE)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    x, y, rows = pair(5, dtype=dtype)
    plain = LOSSES[name](x.float(), y.float(), rows, 0.01)
    torch.testing.assert_close(LOSSES[name](x, y, rows, 0.01), plain, rtol=1e-3, atol=1e-4)
    assert LOSSES[name](x, y, rows, 0.01).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](x.float(), y.float(), rows, 0.01)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@every
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-4, 1e4])
def test_small_temperature_and_extreme_norms_stay_finite(name: str, size: float) -> None:
    x, y, rows = pair(4, dtype=torch.float32)
    x = (size * x).requires_grad_()
    out = LOSSES[name](x, size * y, rows, 0.01)
    assert bool(torch.isfinite(out).all())
    if out.requires_grad:
        assert bool(torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all())
    exact = LOSSES[name](x.detach().double(), (size * y).double(), rows, 0.01)
    torch.testing.assert_close(out.detach().double(), exact, rtol=2e-4, atol=2e-4 * max(1.0, exact.abs().max().item()))


@every
def test_torch_func_transforms_equal_the_loop(name: str) -> None:
    w, x, y = normal(3, D, D), normal(3, 4, D), normal(3, 4, D, seed=1)
    weight = torch.arange(1.0, 1 + D, dtype=torch.float64)  # of the columns of weights, whose sum is 1

    def f(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        out = LOSSES[name](x @ w, y @ w, torch.arange(4), 0.5)
        return (out * weight).sum() if name == "negative_weights" else out.mean()

    looped = torch.stack([grad(f)(w[i], x[i], y[i]) for i in range(3)])
    torch.testing.assert_close(vmap(grad(f))(w, x, y), looped)


@every
def test_no_value_is_read_on_the_host(name: str) -> None:
    """A meta tensor has no values: whoever asks for one fails here, and would wait for the device there."""
    x = torch.empty(4, D, device="meta", requires_grad=True)
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    t = torch.empty((), device="meta", requires_grad=True)
    out = LOSSES[name](x, torch.empty_like(x), rows, t)
    assert out.device.type == "meta"
    out.sum().backward()


@pytest.mark.parametrize("name", T)
def test_a_temperature_may_be_a_learned_tensor(name: str) -> None:
    x, y, rows = pair(3)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(T[name](x, y, rows, t), T[name](x, y, rows, 0.3))
    assert T[name](x.float(), y.float(), rows, t).dtype == torch.float32
    f = T[name]
    if name == "dino":  # the teacher's temperature is part of the target, which gets no gradient
        f = lambda x, y, r, t: losses.dino(x, y, x[0], student_temperature=t, teacher_temperature=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(lambda t: f(x, y, rows, t), (t,))
    assert not torch.isfinite(T[name](x, y, rows, torch.tensor(float("nan")))).any()  # its value is not checked
    with pytest.raises(ConfigError, match=r"temperature has the shape \(1,\)"):
        T[name](x, y, rows, torch.ones(1))
    for wrong in (0.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="temperature is"):
            T[name](x, y, rows, wrong)
