"""Masked autoencoding: patches, masks without a generator, and where it makes sense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import STEP, batch_of, job_of, model_of

from fedssl.errors import ConfigError
from fedssl.method import Step
from fedssl.methods.mae import mask, patches, whole
from fedssl.parts import Coupling


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_are_the_blocks_of_an_image(b: int, c: int, rows: int, columns: int, side: int) -> None:
    x = torch.arange(b * c * rows * columns * side * side).view(b, c, rows * side, columns * side).float()
    cut = patches(x, side)
    assert cut.shape == (b, rows * columns, c * side * side)
    for i in range(rows):
        for j in range(columns):
            block = x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
            assert torch.equal(cut[:, i * columns + j], block.flatten(1))


def test_patches_of_a_signal() -> None:
    x = torch.arange(24).view(1, 2, 12)
    assert patches(x, 4)[0].tolist() == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 20, 21, 22, 23],
    ]


def test_hidden_patches_are_hidden_pixels() -> None:
    hidden = torch.tensor([[True, False, False, True]])
    assert whole(hidden, torch.Size([4, 4]), 2)[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    assert whole(hidden, torch.Size([8]), 2)[0, 0].int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]


def test_masks_differ_by_example_and_step_and_hide_evenly() -> None:
    index = torch.arange(2000)
    first, again, later = (mask(index, Step(1, 5, at, 9), 16, 0.5) for at in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first.sum(1) == 8).all()
    assert (first != later).any(1).float().mean() > 0.99
    assert len(torch.unique(first, dim=0)) > 1500
    assert (first.float().mean(0) - 0.5).abs().max() < 0.06, "every patch is hidden as often: 5 deviations"
    both = (first & later).float().mean()
    assert abs(both.item() - 0.25) < 0.02, "steps are independent"


@pytest.mark.parametrize("share", [0.01, 0.6, 0.99])
def test_something_is_always_hidden_and_something_seen(share: float) -> None:
    hidden = mask(torch.arange(50), STEP, 4, share)
    assert hidden.any(1).all()
    assert (~hidden).any(1).all()


def test_the_encoder_never_sees_what_it_must_restore() -> None:
    job = job_of("mae", "method.patch=2")
    model, batch = model_of(job), batch_of(job, 4)
    seen: list[torch.Tensor] = []
    model["encoder"].register_forward_hook(lambda _m, x, _y: seen.append(x[0].detach()))
    job.method.loss(model, batch, STEP)
    hidden = whole(mask(batch.index, STEP, 16, 0.6), torch.Size([8, 8]), 2).expand_as(seen[0])
    assert not seen[0][hidden].any()
    assert torch.equal(seen[0][~hidden], batch.views[0][~hidden])


def test_examples_stay_uncoupled_and_patches_must_fit() -> None:
    assert job_of("mae").method.coupling is Coupling.none
    with pytest.raises(ConfigError, match="evenly"):
        model_of(job_of("mae", "method.patch=3"))
    with pytest.raises(ConfigError, match="mask"):
        job_of("mae", "method.mask=1")
