"""The ghost engine: every kind of layer, every kind of use, lengths that may be trusted, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedssl.errors import PrivacyError
from fedssl.method import Batch, LossOutput, SSLMethod, Step
from fedssl.methods.byol import BYOL
from fedssl.model import Model
from fedssl.privacy import coupling, per_record
from fedssl.privacy.example_dp import ExampleDP, clipped_gradients
from fedssl.privacy.ghost.layers import Share, known
from fedssl.privacy.ghost.outer import Outer
from fedssl.privacy.per_record import Engine, clipped_sum, dense, norms, trainable

STEP = Step(1, 2, 0, 2)


class Squares(SSLMethod):
    """Each view's squared outputs against a smooth target: any network, used once for each view."""

    views = 2
    parts = BYOL().parts[:1]
    coupling = BYOL(norm="group").coupling

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        out = [model["encoder"](view).flatten(1) for view in batch.views]
        each = sum((h.sin() * (1 + k)).square().sum(1) for k, h in enumerate(out))
        assert isinstance(each, Tensor)
        return LossOutput(each.mean(), each, out[0], {"height": each.detach().mean()})


class Scaled(nn.Module):
    """A scalar outside of any layer, and a weight that is read by its layer and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.tensor(0.7)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + F.linear(x, F.normalize(self.linear.weight, dim=1))


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def frozen_bias() -> nn.Module:
    layer = nn.Linear(4, 6)
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    return layer


class Inner(nn.Module):
    """A layer that is used twice in a pass, its output written to, with a residual, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(F.relu(self.layer(x), inplace=True)) + x
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear, positions": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((5, 3)), nn.Linear(3, 2)), (5, 4)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, (3, 2), (2, 1), (1, 2), (1, 2)), nn.ReLU(True), nn.Conv2d(5, 9, 1)),
        (2, 6, 5),
    ),
    "conv2d, few positions": (lambda: nn.Conv2d(8, 9, 3), (8, 3, 3)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5, 2, 2), nn.ReLU(True), nn.Conv1d(4, 8, 3)), (3, 9)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True), nn.GroupNorm(1, 4, affine=False)),
        (2, 5, 5),
    ),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.ReLU(True), nn.Linear(4, 4, bias=False)), (4,)),
    "frozen bias": (frozen_bias, (4,)),
    "used twice": (Inner, (4,)),
    "tied": (tied, (4,)),
    "scalar and shared weight": (Scaled, (4,)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)), (4, 4, 4)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "same": (lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (4,)),
    "weight of no known layer": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)), (4,)),
}


def made(name: str) -> tuple[Model, tuple[int, ...]]:
    network, shape = NETWORKS[name]
    model = nn.ModuleDict({"encoder": network()}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, shape


def drawn(shape: tuple[int, ...], n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch([torch.randn(n, *shape, generator=generator, dtype=torch.float64) for _ in "ab"], torch.arange(n))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_gives_what_the_loop_gives(name: str, n: int) -> None:
    model, shape = made(name)
    batch = drawn(shape, n)
    expected = per_record.by_loop(Squares(), model, batch, STEP)
    found = per_record.by_ghost(Squares(), model, batch, STEP)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(dense(one), other, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(norms(found.gradients), norms(expected.gradients), rtol=1e-10, atol=1e-11)
    for clip in (1e-2, 1e6):
        for one, other in zip(*(clipped_sum(each.gradients, clip) for each in (found, expected)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * clip)
    assert found.aux["height"].shape == (n,)
    assert not any("forward" in vars(module) for module in model.modules()), "the network is as it was"
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_do_more_than_their_kind_are_left_alone() -> None:
    left = ("grouped", "circular", "same", "weight norm")
    for name in left:
        network = made(name)[0]["encoder"]
        assert not known(network if name != "grouped" else next(network.children())), name  # type: ignore[arg-type]

    class Own(nn.Linear):
        pass

    assert known(nn.Linear(2, 2))
    assert not known(Own(2, 2))
    assert not known(nn.Linear(2, 2).requires_grad_(False)), "teachers"


def test_small_layers_of_many_weights_are_never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))})
    batch = Batch([torch.rand(6, 64), torch.rand(6, 64)], torch.arange(6))
    expected, _ = clipped_gradients(ExampleDP(), Engine.loop, Squares(), model, batch, STEP)
    monkeypatch.setattr(Outer, "dense", lambda self: pytest.fail("multiplied out"))
    found, out = clipped_gradients(ExampleDP(), Engine.ghost, Squares(), model, batch, STEP)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert out.aux["height"].dim() == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(0, 1e6),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9),
)
def test_terms_that_cancel_out_do_not_hide_a_length(n: int, terms: int, size: float, kind: Any, seed: int) -> None:
    """Views that pull against each other with a million clip norms: what is left is still clipped."""
    generator = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(n, terms, k, generator=generator, dtype=kind) for k in (3, 4))
    against = [torch.cat([x * size, y * size, z], 1) for x, y, z in ((g, -g, g), (a, a * (1 + 1e-7), a))]
    outer = Outer(*against, torch.Size((3, 4)))
    for i in range(n):
        alone = Outer(outer.g[i : i + 1], outer.a[i : i + 1], outer.shape)
        (found,) = clipped_sum([alone], 1.0)
        assert float(found.double().norm()) <= 1 + (1e-6 if kind == torch.float32 else 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", ["linear", "conv2d", "group norm", "scalar and shared weight"])
def test_a_record_that_is_no_number_counts_as_none(name: str, bad: float) -> None:
    model, shape = made(name)
    batch = drawn(shape, 3)
    rest = Batch([view[:2] for view in batch.views], batch.index[:2])
    for view in batch.views:
        view[2] = bad
    whole, without = (clipped_sum(per_record.by_ghost(Squares(), model, b, STEP).gradients, 1.0) for b in (batch, rest))
    assert all(total.isfinite().all() for total in whole)
    distance = torch.stack([(a - b).square().sum() for a, b in zip(whole, without, strict=True)]).sum().sqrt()
    assert distance <= 1 + 1e-6
    if bad != 1e200:
        assert distance <= 1e-12


def test_records_too_large_for_float32_squares_are_clipped_like_others() -> None:
    gradients = [torch.full((2, 100), 1e25), torch.ones(2, 3)]
    outer = Outer(torch.full((2, 1, 3), 1e15), torch.full((2, 1, 4), 1e15), torch.Size((3, 4)))
    for given_ in ([*gradients], [outer, gradients[1]]):
        total = clipped_sum(given_, 1.0)
        assert float(torch.cat([t.flatten() for t in total]).norm()) == pytest.approx(2.0, rel=1e-5)
    tiny = [torch.full((1, 70), 1e-12)]
    assert float(norms(tiny)) == pytest.approx(1e-12 * 70**0.5, rel=1e-6)


def test_the_bound_is_of_the_numbers_that_are_added_up_also_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1, 40, 30, generator=generator), torch.randn(1, 7, generator=generator)]
    with torch.autocast("cpu", torch.bfloat16):
        total = clipped_sum(gradients, 1.0)
        model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Linear(8, 8))})
        batch = Batch([torch.rand(1, 8), torch.rand(1, 8)], torch.arange(1))
        other = clipped_sum(per_record.by_ghost(Squares(), model, batch, STEP).gradients, 1e-2)
    assert float(torch.cat([t.flatten() for t in total]).norm()) == pytest.approx(1.0, rel=1e-6)
    assert float(torch.cat([t.flatten() for t in other]).norm()) == pytest.approx(1e-2, rel=1e-6)


class Turned(nn.Module):
    """Positions before records, as some sequence models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.transpose(0, 1)).transpose(0, 1)
        return out


@pytest.mark.parametrize("positions", [2, 3, 6])
def test_rows_that_are_no_records_are_refused_before_training(positions: int) -> None:
    """With as many positions as records nothing would show in a step: so two sizes are looked at."""
    model = nn.ModuleDict({"encoder": Turned()}).double()
    batch = drawn((positions, 4), 6)
    with pytest.raises(PrivacyError, match=r"(is not known|than each record has alone): use privacy\.engine=vmap"):
        coupling.probe_engine(Engine.ghost, Squares(), model, batch)
    coupling.probe_engine(Engine.vmap, Squares(), model, batch)
    assert "forward" not in vars(model["encoder"].linear), "put back after an error too"  # type: ignore[union-attr]


def test_an_engine_that_errs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = made("linear")
    add = Share.add
    monkeypatch.setattr(Share, "add", lambda self, x, g: add(self, x.roll(1, 0), g))
    with pytest.raises(PrivacyError, match=r"engine=ghost finds other gradients of records at encoder\.weight"):
        coupling.probe_engine(Engine.ghost, Squares(), model, drawn(shape, 6))


def test_a_loss_that_differentiates_is_not_taken_for_the_gradient() -> None:
    class Inward(Squares):
        def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
            x = batch.views[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(model["encoder"](x).square().sum(), x, create_graph=self.penalty)
            out = super().loss(model, batch, step)
            each = out.per_example + slope.square().sum(1)
            return LossOutput(each.mean(), each, out.features, {})

        penalty = False

    model, shape = made("linear")
    method, batch = Inward(), drawn(shape, 3)
    found, expected = (by(method, model, batch, STEP).gradients for by in (per_record.by_ghost, per_record.by_loop))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(dense(one), other)
    method.penalty = True
    with pytest.raises(PrivacyError, match=r"differentiates a gradient.* use privacy\.engine=loop"):
        per_record.by_ghost(method, model, batch, STEP)


def test_the_empty_batch_is_zeros_and_pieces_add_up() -> None:
    model, shape = made("conv2d")
    empty, _ = clipped_gradients(
        ExampleDP(), Engine.ghost, Squares(), model, Batch([], torch.zeros(0, dtype=torch.int64)), STEP
    )
    assert [tuple(t.shape) for t in empty] == [tuple(p.shape) for p in trainable(model)]
    assert not any(t.any() for t in empty)
    whole, pieces = (
        clipped_gradients(ExampleDP(micro_batch=k), Engine.ghost, Squares(), model, drawn(shape, 5), STEP)[0]
        for k in (64, 2)
    )
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
