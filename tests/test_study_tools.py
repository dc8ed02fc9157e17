"""The instruments of the studies: what they measure where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedssl import seeds
from fedssl.errors import ConfigError
from simulations.studies.tools.rows import apart, line, pair
from simulations.studies.tools.tables import SETTINGS, train
from simulations.studies.tools.two_factors import FactorViews, Scene, TwoFactors
from simulations.studies.tools.watched import free_descent


def test_a_difference_is_decided_by_the_spread() -> None:
    assert apart((0.9, 0.01), (0.8, 0.02)) is True
    assert apart((0.7, 0.01), (0.8, 0.02)) is False
    assert apart((0.81, 0.01), (0.8, 0.02)) is None
    assert apart((0.9, 0.0), (0.8, 0.0)) is None, "one seed says nothing about the spread"
    assert pair((0.9, 0.0)) == "0.900"
    assert pair((0.9, 0.01), 2) == "0.90 ± 0.01"
    assert line([1, 2], [(0.5, 0.1), (0.6, 0.0)]).error == [0.1, 0.0]
    assert line([1, 2], [(0.5, 0.0), (0.6, 0.0)]).error is None, "one seed has no bars"


def test_orthogonal_steps_grow_in_second_order_only() -> None:
    growth, share = free_descent("cosine", 0.01, 1.0, 0.5, 0)
    assert share == pytest.approx(1, abs=1e-9)
    assert growth == pytest.approx(free_descent("cosine", 0.005, 1.0, 0.5, 0)[0] * 2, rel=0.1)
    assert free_descent("dot", 0.01, 1.0, 0.5, 0)[1] < 0.5


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_predicted_bias_is_what_tables_learn(name: str) -> None:
    world = SETTINGS[name](4, 2, 0.9, seeds.stream(3, "joint"))
    assert world.joint.sum() == pytest.approx(1)
    once = train(world, 250, 1024, 4, 0) - world.ratio()
    assert world.spread(once - world.predicted()) < 0.08
    one = train(world, 250, 1024, 1, 0, every=1) - world.ratio()
    assert world.spread(one - world.predicted_of_steps(1)) < 0.08


def test_even_clients_have_no_bias() -> None:
    for make in SETTINGS.values():
        world = make(6, 3, 0.0, seeds.stream(0, "joint"))
        for bias in (world.predicted(), world.predicted_of_steps(1), world.predicted_of_steps(math.inf)):
            assert world.spread(bias) < 1e-9


def test_views_keep_what_they_are_told_to_keep() -> None:
    table = TwoFactors(train=64, test=8, keep_signal=(1.0, 0.0), keep_background=(0.0, 1.0)).load().train
    scene = table.batch(torch.arange(64))
    assert scene.keep.unique(dim=0).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert np.bincount(table.groups).tolist() == [32, 32]
    views = FactorViews()
    one, two = (views.views(scene, seeds.torch_stream(0, "x"), 1)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (64, 1, 12, 12)
    plain = views.plain(scene)
    other = views.plain(Scene(scene.factors, scene.keep * 0, scene.place))
    assert torch.equal(plain, other), "what an example is does not depend on how its views are drawn"
    changed = views.plain(Scene((scene.factors + 1) % 8, scene.keep, scene.place))
    assert (changed - plain).abs().amax((1, 2, 3)).min() > 0.1
    with pytest.raises(ConfigError, match="device=cpu"):
        table.to("cuda")
    with pytest.raises(ConfigError, match="each site"):
        TwoFactors(keep_signal=(1.0,), keep_background=(2.0,))
