"""Encoders: shapes at every image size, sizes in parameters, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from fedssl.errors import ConfigError
from fedssl.modalities.encoders import Conv4, ResNet18

SMALL = ResNet18(width=8)


@pytest.mark.parametrize("encoder", [Conv4(), SMALL, Conv4(width=8, dim=24)])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_features_have_the_size_that_make_names(encoder: Conv4 | ResNet18, norm: str, channels: int, size: int) -> None:
    network, dim = type(encoder)(**{**vars(encoder), "norm": norm}).make((channels, 8, 8))
    x = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    out = network(x)
    assert out.shape == (3, dim)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("encoder", [Conv4(), SMALL])
@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_without_batch_norm_a_feature_depends_on_its_own_image_only(encoder: Conv4 | ResNet18, norm: str) -> None:
    network, _ = type(encoder)(**{**vars(encoder), "norm": norm}).make((1, 8, 8))
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[2] = 0
    here, there = network(x), network(changed)
    assert torch.equal(here[[0, 1, 3]], there[[0, 1, 3]])
    assert not torch.equal(here[2], there[2])


def test_sizes_in_parameters() -> None:
    def count(encoder: Conv4 | ResNet18, channels: int) -> int:
        return sum(p.numel() for p in encoder.make((channels, 8, 8))[0].parameters())

    assert 30_000 < count(Conv4(), 1) < 70_000
    assert count(ResNet18(), 3) == 11_168_832  # the published CIFAR ResNet-18 without its classifier


@pytest.mark.parametrize("bad", [{"width": 0}, {"dim": 0}])
def test_sizes_below_one_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Conv4(**bad)
    with pytest.raises(ConfigError, match="width"):
        ResNet18(width=0)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="norm"):
        Conv4(norm="instance").make((3, 8, 8))
