"""Feature skew: clients see their examples in their own way, the same in training, in probes and in the union."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODALITIES, assert_same, execute, final_arrays, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import config, partition
from fedssl.config import Plan
from fedssl.datasets.base import Dataset
from fedssl.datasets.shifted.optics import Optics, gaussian, unit_of
from fedssl.datasets.shifted.seen import Seen
from fedssl.datasets.signals.table import Signals
from fedssl.errors import ConfigError, ProtocolError
from fedssl.evaluation.baselines import central
from fedssl.job import Job
from fedssl.job.setup import data_of
from fedssl.job.shards import as_seen, described, measured_skew, parts_of, shard_of, statistics, union_of
from fedssl.modalities.images import LUMA
from fedssl.partition import Appearance, FeatureShift

CPU = torch.device("cpu")
EVERYTHING = Appearance(rotation=25.0, blur=0.08, temperature=0.2, gain=-0.1, noise=0.05)


def images(n: int = 20, channels: int = 3, height: int = 12, width: int = 12) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (n, channels, height, width)).astype(np.uint8)
    return Dataset(torch.from_numpy(pixels))


def series(n: int = 20, channels: int = 6, steps: int = 40) -> Signals:
    return Signals(torch.from_numpy(np.random.default_rng(0).normal(size=(n, channels, steps)).astype(np.float32)))


def seen(table: Any, *appearances: Appearance, client: int = 0, key: int = 1) -> Seen:
    return Seen.by(table, client, Optics.of(appearances, table.shape, unit_of(table), key))


def one(table: Any, **strength: Any) -> torch.Tensor:
    return seen(table, Appearance(**strength)).batch(torch.arange(len(table)))


# --- what each appearance does


def test_nothing_is_nothing() -> None:
    table = images()
    assert torch.equal(one(table), table.batch(torch.arange(20)))
    assert torch.equal(one(series()), series().signals)


def test_a_quarter_turn_is_counter_clockwise_and_keeps_every_pixel() -> None:
    table = images()
    turned = torch.rot90(table.batch(torch.arange(20)), 1, (2, 3))
    assert torch.allclose(one(table, rotation=90.0), turned, atol=1e-5)
    assert torch.allclose(one(table, rotation=180.0), torch.rot90(turned, 1, (2, 3)), atol=1e-5)
    wide = images(height=8, width=14)
    assert torch.allclose(one(wide, rotation=180.0), wide.batch(torch.arange(20)).flip((2, 3)), atol=1e-5)


def test_warm_light_reddens_and_keeps_the_luma_of_white() -> None:
    white = Dataset(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8))
    warm = one(white, temperature=0.3)[0, :, 0, 0] * 255
    assert float(warm @ torch.tensor(LUMA)) == pytest.approx(100, rel=1e-5)
    assert float(warm[0] / warm[2]) == pytest.approx(np.exp(0.6), rel=1e-5)
    cold = one(white, temperature=-0.3)[0, :, 0, 0]
    assert cold[2] > cold[0]


def test_gain_multiplies_and_images_are_clipped() -> None:
    table = images()
    x = table.batch(torch.arange(20))
    assert torch.allclose(one(table, gain=0.5), (x * np.exp(0.5)).clamp(max=1))
    assert torch.allclose(one(series(), gain=-0.7), series().signals * np.exp(-0.7))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_blur_is_a_gaussian_of_unit_weight(share: float) -> None:
    dot = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    dot[0, 0, 20, 20] = 255
    out = one(Dataset(dot), blur=share)[0, 0]
    sigma = share * 41
    weights = np.exp(-(np.arange(-20, 21) ** 2) / (2 * sigma**2))
    if share < 0.15:  # nothing reaches the edge
        expected = np.outer(weights, weights) / weights.sum() ** 2
        assert np.allclose(out.numpy(), expected, atol=1e-2 * expected.max())  # the kernel ends at three deviations
    flat = Dataset(torch.full((1, 1, 9, 9), 77, dtype=torch.uint8))
    assert torch.allclose(one(flat, blur=share), flat.batch(torch.arange(1)), atol=1e-6)


def test_a_sensor_is_turned_about_its_axis() -> None:
    table = series()
    x = table.signals.view(20, 2, 3, 40)
    turned = one(table, rotation=90.0, axis=(0.0, 0.0, 1.0)).view(20, 2, 3, 40)
    assert torch.allclose(turned, torch.stack((-x[:, :, 1], x[:, :, 0], x[:, :, 2]), 2), atol=1e-5)
    anyhow = one(table, rotation=33.0, axis=(0.6, 0.0, 0.8)).view(20, 2, 3, 40)
    assert torch.allclose(anyhow.norm(dim=2), x.norm(dim=2), atol=1e-4)


def test_noise_has_its_strength_in_every_channels_unit() -> None:
    table = images(400)
    middle = Dataset(torch.full_like(table.images, 128))
    noise = one(middle, noise=0.05) - 128 / 255
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    scale = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    signals = Signals(series(400, 3).signals * scale)
    added = one(signals, noise=0.2) - signals.signals
    assert added.std((0, 2)).tolist() == pytest.approx([0.2, 2.0, 20.0], rel=0.05)


def test_the_noise_is_normal_and_independent() -> None:
    z = gaussian(torch.full((300,), 5), torch.arange(300), torch.zeros(3, 16, 16)).flatten(1)
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert z.pow(4).mean().item() == pytest.approx(3, abs=0.08)
    assert torch.isfinite(z).all()
    between = torch.corrcoef(z).fill_diagonal_(0)  # examples
    assert between.abs().max() < 6 / z.shape[1] ** 0.5
    assert z[:, 1:].mul(z[:, :-1]).mean().abs() < 0.01  # neighbouring pixels
    other = gaussian(torch.full((300,), 6), torch.arange(300), torch.zeros(3, 16, 16)).flatten(1)
    assert (z * other).mean().abs() < 0.01  # the same examples of another client


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, 19), min_size=1, max_size=12), kind=st.sampled_from(["images", "series"]))
def test_an_example_is_seen_alike_whatever_the_batch(rows: list[int], kind: str) -> None:
    table = images() if kind == "images" else series()
    how = EVERYTHING if kind == "images" else Appearance(rotation=25.0, blur=0.08, gain=-0.1, noise=0.05)
    view = seen(table, how, Appearance(blur=0.3), client=0)
    whole = view.batch(torch.arange(20))
    assert torch.equal(view.batch(torch.tensor(rows)), whole[rows])


def test_clients_of_one_table_do_not_touch_each_other() -> None:
    table = images()
    hows = (EVERYTHING, Appearance(), Appearance(rotation=-80.0, noise=0.1))
    optics = Optics.of(hows, table.shape, unit_of(table), 1)
    owner = np.arange(20) % 3
    union = Seen.by_owners(table, owner, optics).batch(torch.arange(20))
    for client in range(3):
        own = Seen.by(table, client, optics).batch(torch.arange(20))
        assert torch.equal(union[owner == client], own[owner == client])
    # a client without strengths in a federation that has them: up to the rounding of an identity
    assert torch.allclose(union[1::3], table.batch(torch.arange(1, 20, 3)), atol=1e-5)


def test_a_seen_table_is_a_table() -> None:
    view = seen(images(), EVERYTHING)
    assert (len(view), view.shape, view.device, view.targets, view.groups) == (20, (3, 12, 12), CPU, None, None)
    moved = view.to("cpu")
    shard = moved.shard(np.array([3, 5]), 0)
    assert torch.equal(shard.batch(torch.tensor([1])), view.batch(torch.tensor([5])))


# --- strengths


def test_even_strengths_span_their_range_and_are_not_tied_to_each_other() -> None:
    how = FeatureShift(rotation=30.0, noise=0.2, gain=0.5).appearances(5, 0)
    assert [a.rotation for a in how] == [-30, -15, 0, 15, 30]
    assert sorted(a.noise for a in how) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert sorted(a.gain for a in how) == pytest.approx([-0.5, -0.25, 0, 0.25, 0.5])
    assert {a.blur for a in how} | {a.temperature for a in how} == {0.0}
    assert [a.noise for a in how] != sorted(a.noise for a in how)
    assert all(np.linalg.norm(a.axis) == pytest.approx(1) for a in how)
    assert FeatureShift(rotation=30.0).appearances(1, 0)[0].rotation == -30


def test_drawn_strengths_follow_the_seed() -> None:
    shift = FeatureShift(rotation=30.0, blur=0.1, spread="drawn")
    how = shift.appearances(200, 3)
    assert how == shift.appearances(200, 3)
    assert how != shift.appearances(200, 4)
    turns = np.array([a.rotation for a in how])
    assert np.abs(turns).max() <= 30
    assert turns.std() == pytest.approx(30 / 3**0.5, rel=0.1)
    assert 0 <= min(a.blur for a in how) < max(a.blur for a in how) <= 0.1


@pytest.mark.parametrize(
    "options",
    [{"rotation": -1.0}, {"rotation": 181.0}, {"noise": float("inf")}, {"blur": 0.6}, {"spread": "fair"}],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        FeatureShift(**options)
    with pytest.raises(ConfigError, match="base"):
        FeatureShift(base=FeatureShift())


@pytest.mark.parametrize(
    ("table", "how", "words"),
    [
        (images(channels=1), Appearance(temperature=0.1), "in colour"),
        (series(), Appearance(temperature=0.1), "in colour"),
        (series(channels=4), Appearance(rotation=1.0), "in threes"),
    ],
)
def test_what_an_example_cannot_have_is_refused(table: Any, how: Appearance, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        seen(table, how)


@pytest.mark.parametrize("modality", ["graphs", "pairs"])
def test_other_modalities_are_refused_by_name(modality: str) -> None:
    with pytest.raises(ConfigError, match=f"feature_shift changes images and time series and .* gives {modality}"):
        config.compose([*MODALITIES[modality], "partition=feature_shift"])


# --- in a job


def plain(modality: str, *overrides: str) -> Job:
    return config.compose([*(o for o in tiny(modality=modality) if "partition" not in o), *overrides]).job


def shifted(plan: Callable[..., Plan], *overrides: str, **names: str) -> Plan:
    return plan("partition=feature_shift", "partition.noise=0.05", "partition.blur=0.05", *overrides, **names)


def test_the_split_is_that_of_the_base(plan: Callable[..., Plan]) -> None:
    base = ("partition@partition.base=dirichlet", "partition.base.alpha=0.2")
    ours = parts_of(shifted(plan, *base).job, CPU)
    theirs = parts_of(plan("partition=dirichlet", "partition.alpha=0.2").job, CPU)
    assert partition.fingerprint(ours) == partition.fingerprint(theirs)


@pytest.mark.parametrize("series", [False, True])
def test_training_probes_and_union_see_the_same(series: bool) -> None:
    options = ("partition=feature_shift", "partition.noise=0.05", "partition.blur=0.05")
    job = plain("timeseries", *options, "data.channels=3") if series else plain("images", *options)
    train, parts = data_of(job, CPU).train, parts_of(job, CPU)
    union = union_of(job, CPU)
    assert len(union) == len(train)
    for client in range(3):
        shard = shard_of(job, client, CPU)
        assert len(shard) == len(parts[client])
        own = shard.batch(torch.arange(len(shard)))
        rows = torch.from_numpy(parts[client])
        assert torch.equal(own, as_seen(job, client, CPU, "train").batch(rows))
        assert torch.equal(own, union.batch(rows))
        assert not torch.allclose(own, train.batch(rows), atol=1e-3)
    with pytest.raises(ProtocolError, match="partition-id 3"):
        shard_of(job, 3, CPU)


def test_each_client_has_its_own_test_set(plan: Callable[..., Plan]) -> None:
    job = shifted(plan).job
    data, rows = data_of(job, CPU), torch.arange(30)
    views = [as_seen(job, client, CPU).batch(rows) for client in range(3)]
    assert not torch.allclose(views[0], views[1], atol=1e-3)
    assert as_seen(job, 0, CPU).targets is data.test.targets
    noisy = plan(
        "partition=feature_shift", "partition.rotation=0", "partition.noise=0.05", "partition.spread=drawn"
    ).job
    part = {name: as_seen(noisy, 0, CPU, name) for name in ("train", "test")}
    noise = [table.optics.key[0] for table in part.values()]
    assert noise[0] != noise[1], "training and test examples of one number would share their noise"
    usual = plan().job
    assert as_seen(usual, 1, CPU) is data_of(usual, CPU).test


def test_a_run_says_how_clients_see_and_trains_by_it(plan: Callable[..., Plan]) -> None:
    run = execute(shifted(plan))
    split = run.read("split.json")
    assert [a["rotation"] for a in split["appearances"]] == [-45, 0, 45]
    assert sorted(a["noise"] for a in split["appearances"]) == pytest.approx([0, 0.025, 0.05])
    figures = run.read("manifest.json")["split"]
    usual = execute(plan("partition=iid", name="usual"))
    assert figures["fingerprint"] == usual.read("manifest.json")["split"]["fingerprint"]
    assert figures["feature_skew"] > 0.1 > usual.read("manifest.json")["split"]["feature_skew"]
    assert "appearances" not in usual.read("split.json")
    again = execute(shifted(plan, "engine.workers=1", name="again"))
    assert_same(final_arrays(run), final_arrays(again))
    assert any(
        not np.array_equal(a, b) for a, b in zip(final_arrays(run).values(), final_arrays(usual).values(), strict=True)
    )


def test_the_central_baseline_trains_on_what_clients_see() -> None:
    trained = []
    for options in (("partition=iid",), ("partition=feature_shift",), ("partition=feature_shift",)):
        job = plain("images", *options)
        trained.append(central(job, data_of(job, CPU).train, CPU, lambda at, rounds, result: None))
    assert_same(trained[1], trained[2])
    assert any(not np.array_equal(a, b) for a, b in zip(trained[0].values(), trained[1].values(), strict=True))


def test_impossible_appearances_end_a_run_before_it_begins(plan: Callable[..., Plan]) -> None:
    grey = ("data.channels=1", "data.augment.mean=[0.5]", "data.augment.std=[0.25]", "partition.temperature=0.2")
    with pytest.raises(ConfigError, match="in colour"):
        execute(shifted(plan, *grey))


def test_what_is_described_is_plain(plan: Callable[..., Plan]) -> None:
    job = shifted(plan).job
    json.dumps(described(job, data_of(job, CPU), parts_of(job, CPU)))
    for modality in ("pairs", "graphs"):
        assert measured_skew(plain(modality, "partition=iid"), CPU) == {}


def test_statistics_are_means_deviations_and_steps() -> None:
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert statistics(x).tolist() == [pytest.approx([1.5, 1.25**0.5, 2.0, 1.0])]
    assert statistics(torch.ones(2, 1, 1)).tolist() == [[1, 0, 0]] * 2
