"""Views and encoder of time series: each operation exactly and in its statistics, and small runs from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays
from torch import Tensor

import fedssl
from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.modalities.encoders1d import Conv1d
from fedssl.modalities.timeseries import Statistics, TimeSeriesViews, resample, rotations
from fedssl.networks.norms import commit_statistics

OFF = TimeSeriesViews(normalise="constants", crop=(1.0, 1.0), scaling=0.0, jitter=0.0)
ALL = TimeSeriesViews(
    rotation=30.0, flip=0.3, permutation=0.5, warp=0.3, frequency_mask=0.3, scaling=0.2, jitter=0.1, time_mask=0.3
)
EACH = {  # every operation alone
    "rotation": replace(OFF, rotation=40.0),
    "flip": replace(OFF, flip=0.5),
    "permutation": replace(OFF, permutation=1.0),
    "crop": replace(OFF, crop=(0.3, 0.9)),
    "warp": replace(OFF, warp=0.3),
    "frequency_mask": replace(OFF, frequency_mask=0.5),
    "scaling": replace(OFF, scaling=0.3),
    "jitter": replace(OFF, jitter=0.1),
    "time_mask": replace(OFF, time_mask=0.5),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def series(n: int = 6, channels: int = 3, steps: int = 32) -> Tensor:
    return torch.randn(n, channels, steps, generator=generator(99))


def ramps(n: int, steps: int = 40, channels: int = 2) -> Tensor:
    return torch.arange(float(steps)).expand(n, channels, steps).contiguous()


def one(views: TimeSeriesViews, x: Tensor, seed: int = 0) -> Tensor:
    return views.views(x, generator(seed), 1)[0]


# --- what holds for all of them


@pytest.mark.parametrize("views", [ALL, *EACH.values()], ids=["all", *EACH])
@pytest.mark.parametrize(("channels", "steps"), [(3, 16), (9, 33), (3, 128)])
def test_views_are_seeded_differ_and_leave_the_series_alone(views: TimeSeriesViews, channels: int, steps: int) -> None:
    x = series(8, channels, steps)
    before = x.clone()
    first, second = views.views(x, generator(), 2)
    again = views.views(x, generator(), 2)
    assert first.shape == second.shape == x.shape
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert torch.equal(x, before)
    assert first.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("views", [ALL, *EACH.values()], ids=["all", *EACH])
def test_a_view_depends_on_its_own_series_only_and_has_parameters_of_its_own(views: TimeSeriesViews) -> None:
    x = series(1).expand(32, -1, -1).contiguous()
    out = one(views, x)
    assert len(torch.unique(out, dim=0)) > 4, "equal series get different views"
    changed = x.clone()
    changed[3] = 1 - changed[3].flip(1)
    there = one(views, changed)
    others = [i for i in range(len(x)) if i != 3]
    assert torch.equal(out[others], there[others])
    assert not torch.equal(out[3], there[3])


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_very_short_series_pass(steps: int) -> None:
    x = series(5, 3, steps)
    assert torch.isfinite(one(ALL, x)).all()
    assert torch.isfinite(one(replace(ALL, normalise="constants"), x)).all()


def test_views_never_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    one(ALL, series())
    assert torch.equal(torch.get_rng_state(), state)


def test_other_precisions_keep_theirs() -> None:
    assert one(ALL, series().double()).dtype == torch.float64


def test_everything_off_only_normalises() -> None:
    x = series()
    assert torch.equal(one(OFF, x), x)
    shifted = replace(OFF, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1)
    assert torch.equal(one(shifted, x), expected)
    assert torch.equal(shifted.plain(x), expected)
    assert torch.equal(replace(OFF, mean=(1.0,), std=(2.0,)).plain(x), (x - 1) / 2)


def test_normalising_each_series_forgets_its_units_and_makes_a_flat_one_zero() -> None:
    views = replace(OFF, normalise="each")
    x = series()
    x[2] = 7.5
    out = one(views, x)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[kept].mean(2), torch.zeros(5, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[kept].std(2, correction=0), torch.ones(5, 3), atol=1e-4, rtol=0)
    assert torch.equal(out[2], torch.zeros(3, 32))
    torch.testing.assert_close(one(views, 512 * x + 3)[kept], out[kept], atol=1e-3, rtol=1e-3)


# --- one operation at a time


def test_jitter_has_its_standard_deviation_and_no_memory() -> None:
    noise = one(replace(OFF, jitter=0.1), torch.zeros(50, 3, 64))
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)
    assert abs(float(noise.mean())) < 0.005
    for a, b in ((noise[:, :, 1:], noise[:, :, :-1]), (noise[1:], noise[:-1]), (noise[:, :1], noise[:, 1:2])):
        assert abs(float((a * b).mean())) < 0.0005, "neighbours in time, examples and channels are independent"


def test_scaling_multiplies_a_channel_by_one_number() -> None:
    x = series(500, 2, 16)
    factor = one(replace(OFF, scaling=0.3), x) / x
    torch.testing.assert_close(factor, factor[:, :, :1].expand_as(factor), rtol=1e-4, atol=0)
    drawn = factor[:, :, 0]
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.06)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.1


def test_a_flip_changes_the_sign_of_its_share_of_the_channels() -> None:
    x = series(400, 3, 8)
    out = one(replace(OFF, flip=0.25), x)
    turned, same = (out == -x).all(2), (out == x).all(2)
    assert bool((turned ^ same).all())
    assert float(turned.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert 0 < int((turned[:, 0] ^ turned[:, 1]).sum()) < 400, "channels are drawn one by one"


@pytest.mark.parametrize("segments", [2, 5])
def test_a_permutation_moves_whole_pieces_and_all_channels_alike(segments: int) -> None:
    x = ramps(600)
    out = one(replace(OFF, permutation=1.0, segments=segments), x)
    assert torch.equal(out.sort(2).values, x)
    assert torch.equal(out[:, 0], out[:, 1])
    breaks = (out[:, 0, 1:] - out[:, 0, :-1] != 1).sum(1)
    assert int(breaks.max()) == segments - 1
    if segments == 2:  # two pieces change places, or do not
        start = out[:, 0, :1]
        assert torch.equal(out[:, 0], (torch.arange(40.0) + start) % 40)
        assert 0.4 < float((breaks > 0).float().mean()) < 0.6
        assert len(start.unique()) > 30, "cuts are anywhere"


def test_a_permutation_spares_the_series_that_are_not_drawn() -> None:
    x = ramps(600)
    out = one(replace(OFF, permutation=0.3, segments=8), x)
    moved = (out != x).flatten(1).any(1)
    assert 0.2 < float(moved.float().mean()) < 0.32


def test_a_crop_of_a_line_is_a_line_within_it() -> None:
    x = ramps(500)
    out = one(replace(OFF, crop=(0.25, 0.75)), x)[:, 0]
    slopes = out[:, 1:] - out[:, :-1]
    torch.testing.assert_close(slopes, slopes[:, :1].expand_as(slopes), atol=1e-4, rtol=0)
    assert float(slopes.min()) + 1e-4 >= 0.25
    assert float(slopes.max()) <= 0.75 + 1e-4
    assert float(slopes.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 39
    share = out[:, 0] / (39 - (out[:, -1] - out[:, 0]))  # where the window lies in the room that it has
    assert float(share.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(share.std()) == pytest.approx(12**-0.5, rel=0.08)


def test_a_warp_keeps_order_and_ends_and_changes_the_speed() -> None:
    out = one(replace(OFF, warp=0.3), ramps(300))[:, 0]
    speed = out[:, 1:] - out[:, :-1]
    torch.testing.assert_close(out[:, 0], torch.zeros(300))
    torch.testing.assert_close(out[:, -1], torch.full((300,), 39.0))
    assert float(speed.min()) > 0
    assert 0.15 < float(speed.log().std()) < 0.35
    assert float((speed[:, 1:] / speed[:, :-1]).log().abs().max()) < 0.25, "smoothly"


def test_resampling_is_linear_interpolation() -> None:
    x = series(4, 2, 9)
    assert torch.equal(resample(x, torch.arange(9.0).expand(4, 9)), x)
    at = torch.rand(4, 13, generator=generator()) * 8
    expected = np.stack(
        [[np.interp(t, np.arange(9), channel) for channel in one.numpy()] for t, one in zip(at.numpy(), x, strict=True)]
    )
    torch.testing.assert_close(resample(x, at), torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [32, 33])
def test_a_frequency_mask_removes_one_band_and_keeps_the_mean(steps: int) -> None:
    x = series(400, 3, steps)
    out = one(replace(OFF, frequency_mask=0.5), x)
    before, after = torch.fft.rfft(x), torch.fft.rfft(out)
    gone = (after.abs() < 1e-4).all(1)  # (B, bins), the same for all channels
    torch.testing.assert_close(after[~gone.unsqueeze(1).expand_as(after)], before[~gone.unsqueeze(1).expand_as(after)])
    torch.testing.assert_close(out.mean(2), x.mean(2), atol=1e-6, rtol=1e-4)
    assert not gone[:, 0].any()
    edges = (gone[:, 1:].int() - gone[:, :-1].int()).clamp(min=0).sum(1)
    assert int(edges.max()) == 1, "one band"
    widths = gone.sum(1)
    assert widths.unique().tolist() == list(range(steps // 4 + 1))
    assert all(gone[:, place].any() for place in range(1, steps // 2 + 1)), "anywhere"


def test_a_time_mask_silences_one_span() -> None:
    x = series(500, 2, 40).abs() + 1
    out = one(replace(OFF, time_mask=0.25), x)
    gone = (out == 0).all(1)
    assert torch.equal(out, x * ~gone.unsqueeze(1))
    padded = torch.cat((torch.zeros(500, 1), gone.float()), 1)
    assert float((padded[:, 1:] - padded[:, :-1]).clamp(min=0).sum(1).max()) == 1, "one span"
    widths = gone.sum(1)
    assert widths.unique().tolist() == list(range(11))
    assert float(widths.float().mean()) == pytest.approx(5, abs=0.5)
    assert bool(gone.any(0).all()), "anywhere"


def test_a_rotation_turns_all_triples_alike_and_keeps_lengths() -> None:
    x = series(500, 6, 12)
    x[:, 3:] = 2 * x[:, :3]
    out = one(replace(OFF, rotation=40.0), x)
    torch.testing.assert_close(out[:, :3].norm(dim=1), x[:, :3].norm(dim=1))
    torch.testing.assert_close(out[:, 3:], 2 * out[:, :3])
    along = torch.zeros(2000, 3, 1)
    along[:, 2] = 1
    turned = one(replace(OFF, rotation=40.0), along)[:, :, 0]
    angle = torch.rad2deg(torch.arccos(turned[:, 2].clamp(-1, 1)))
    assert 35 < float(angle.max()) <= 40.001
    assert float(turned[:, :2].mean(0).abs().max()) < 0.02, "no direction is preferred"
    assert float(turned[:, 0].std()) == pytest.approx(float(turned[:, 1].std()), rel=0.08)


def test_a_rotation_comes_before_the_normalisation() -> None:
    x = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1).expand(50, 3, 4).contiguous()
    views = replace(OFF, rotation=90.0, mean=(1.0, 0.0, 0.0))
    torch.testing.assert_close((one(views, x) + torch.tensor([1.0, 0, 0]).view(3, 1)).norm(dim=1), torch.ones(50, 4))


def test_rotations_are_rotations() -> None:
    quarter = torch.tensor([torch.pi / 2])
    about_z = rotations(torch.tensor([[0.0, 0.0, 3.0]]), quarter)[0]
    torch.testing.assert_close(about_z @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)
    turns = rotations(torch.randn(20, 3, generator=generator()), torch.linspace(-3, 3, 20))
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(20))
    torch.testing.assert_close(turns.diagonal(dim1=1, dim2=2).sum(1), 1 + 2 * torch.linspace(-3, 3, 20).cos())


def test_local_views_are_short_windows() -> None:
    views = replace(OFF, local_crop=(0.1, 0.3), local_size=0.5)
    first, second = views.local_views(ramps(200), generator(), 2)
    assert first.shape == second.shape == (200, 2, 20)
    reach = first[:, 0, -1] - first[:, 0, 0]
    assert float(reach.min()) + 1e-3 >= 0.1 * 39
    assert float(reach.max()) <= 0.3 * 39 + 1e-3
    assert ALL.local_views(series(steps=5), generator(), 1)[0].shape == (6, 3, 4)


@pytest.mark.parametrize(
    "bad",
    [
        {"flip": 1.5},
        {"permutation": -0.1},
        {"permutation": float("nan")},
        {"segments": 1},
        {"crop": (0.0, 1.0)},
        {"crop": (0.8, 0.2)},
        {"crop": (0.5,)},
        {"local_crop": (0.5, 1.5)},
        {"local_size": 2.0},
        {"warp": -1.0},
        {"frequency_mask": 1.1},
        {"time_mask": -0.1},
        {"scaling": -0.1},
        {"jitter": -0.1},
        {"rotation": 200.0},
        {"normalise": "batch"},
        {"mean": ()},
        {"std": (0.0,)},
        {"std": (1.0, 1.0)},
        {"mean": (float("nan"),)},
    ],
)
def test_values_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"augment.{next(iter(bad))}|augment.std"):
        TimeSeriesViews(**bad)


def test_series_with_other_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 channels"):
        replace(OFF, mean=(0.0, 0.0)).plain(series())
    with pytest.raises(ConfigError, match="threes"):
        one(replace(OFF, rotation=10.0), series(channels=4))


# --- the encoder


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("width", [4, 32])
@pytest.mark.parametrize(("channels", "steps"), [(1, 1), (3, 7), (9, 128), (2, 129)])
def test_features_have_the_size_that_make_names(norm: str, width: int, channels: int, steps: int) -> None:
    network, dim = Conv1d(width=width, dim=24, norm=norm).make((channels, steps))
    out = network(series(3, channels, steps))
    assert out.shape == (3, dim) == (3, 24)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_without_batch_norm_a_feature_depends_on_its_own_series_only(norm: str) -> None:
    network, _ = Conv1d(width=8, norm=norm).make((3, 32))
    x = series(4)
    changed = x.clone()
    changed[2] = 0
    here, there = network(x), network(changed)
    assert torch.equal(here[[0, 1, 3]], there[[0, 1, 3]])
    assert not torch.equal(here[2], there[2])


def test_deferred_batch_norm_gives_the_numbers_of_torch() -> None:
    ours, _ = Conv1d(width=8, norm="batch").make((3, 32))
    theirs, _ = Conv1d(width=8, norm="batch").make((3, 32))

    def swap(module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(module, name, torch.nn.BatchNorm1d(child.num_features))
            swap(child)

    swap(theirs)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = torch.randn(6, 3, 32, generator=generator(seed))
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        torch.testing.assert_close(ours(x), theirs(x))
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), "nothing moves before the commit"
        commit_statistics(ours)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_size_in_parameters_and_refusals() -> None:
    assert 80_000 < sum(p.numel() for p in Conv1d().make((9, 128))[0].parameters()) < 100_000
    for bad in ({"width": 0}, {"dim": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            Conv1d(**bad)
    with pytest.raises(ConfigError, match="norm"):
        Conv1d(norm="instance").make((3, 8))


# --- what an encoder must beat


@pytest.mark.parametrize("steps", [1, 2, 20, 128, 500])
def test_statistics_have_one_size_and_see_level_size_and_tempo(steps: int) -> None:
    x = series(5, 3, steps)
    out = Statistics()(x)
    assert out.shape == (5, 66)
    assert torch.isfinite(out).all()
    each = out.view(5, 3, 22)
    torch.testing.assert_close(each[:, :, 0], x.mean(2))
    torch.testing.assert_close(each[:, :, 1], x.std(2, correction=0))
    torch.testing.assert_close(each[:, :, 3], x.amax(2))
    if steps == 128:
        time = torch.arange(128.0).expand(1, 1, 128)
        slow, fast = (Statistics()(torch.sin(2 * torch.pi * k * time / 128))[0, 6:].argmax() for k in (3, 19))
        assert (int(slow), int(fast)) == (1, 9)


# --- whole runs

SMALL = (
    "data=synthetic_signals",
    "data.train=90",
    "data.test=30",
    "data.classes=3",
    "data.steps=32",
    "data.subjects=6",
    "encoder.width=4",
    "encoder.dim=8",
    "partition=natural",
    "federation.clients=3",
    "federation.rounds=2",
    "local.batch_size=8",
    "evaluate.every=1",
    "evaluate.repeats=2",
    "device=cpu",
    "engine.workers=2",
)


def plan_of(folder: Path, *overrides: str) -> Plan:
    return config.compose([*SMALL, f"out={folder}", "name=run", *overrides])


@pytest.mark.parametrize(
    "options",
    [
        ("method=simclr", "baselines=true"),
        ("method=byol", "encoder.norm=group", "method.norm=group"),
        ("method=simsiam", "encoder.norm=batch", "strategy=fedbn"),
        ("method=dino", "method.local_views=2", "method.out=16"),
        ("method=mae", "method.patch=4", "data.augment.time_mask=0.2"),
    ],
    ids=lambda options: options[0],
)
def test_a_federated_run_from_end_to_end(options: tuple[str, ...], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *options)
    rundir = execute(plan)
    summary = rundir.read("summary.json")
    assert np.isfinite(summary["loss"])
    assert 0 <= summary["linear_accuracy"] <= 1
    encoder = fedssl.load_encoder(rundir.path)
    assert encoder.augment.reads.startswith("float signals")
    x = plan.job.data.load().test.batch(torch.arange(4))
    assert encoder(x).shape == (4, 8)
    network, _ = plan.job.encoder.make((3, 32))
    arrays = final_arrays(rundir)
    assert {k for k in arrays if k.startswith("encoder.")} <= {f"encoder.{k}" for k in network.state_dict()}


def test_a_run_gives_the_same_bits_again(tmp_path: Path) -> None:
    first, second = (execute(plan_of(tmp_path / name, "data.augment.permutation=0.5")) for name in "ab")
    assert_same(final_arrays(first), final_arrays(second))


def test_the_data_choose_their_encoder_and_a_person_still_can() -> None:
    assert config.compose(["data=synthetic_signals"]).job.encoder == Conv1d()
    assert config.compose(["data=synthetic_signals", "encoder.dim=12"]).job.encoder == Conv1d(dim=12)
    for order in (("data=synthetic_signals", "encoder=conv4"), ("encoder=conv4", "data=synthetic_signals")):
        with pytest.raises(ConfigError, match="Conv4 reads images"):
            config.compose([*order])


def test_training_learns_the_waveforms(tmp_path: Path) -> None:
    """Federated SimCLR of ten subjects each beats the encoder that it began with."""
    overrides = ("data.train=800", "data.test=300", "data.steps=96", "data.classes=6", "data.subjects=10")
    longer = ("encoder.width=16", "encoder.dim=48", "federation.clients=5", "federation.rounds=15")
    rundir = execute(
        plan_of(tmp_path, *overrides, *longer, "local.batch_size=32", "local.lr=0.004", "evaluate.every=0")
    )
    summary = rundir.read("summary.json")
    assert summary["linear_accuracy"] > summary["random_encoder_linear_accuracy"] + 0.05, summary


def test_simple_features_are_probed_like_an_encoder(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "evaluate.repeats=2")
    evaluator = Evaluator(plan.job, plan.job.data.load(), torch.device("cpu"))
    simple = evaluator.without_encoder()
    assert list(simple) == ["raw values", "window statistics"]
    for values in simple.values():
        assert values.keys() == evaluator.probe(evaluator.random_encoder()).keys()
        assert 0 <= values["linear_accuracy"] <= 1
    images = config.compose(
        ["data=synthetic", "data.train=40", "data.test=20", "data.size=8", "evaluate.repeats=2"]
    ).job
    assert list(Evaluator(images, images.data.load(), torch.device("cpu")).without_encoder()) == ["raw values"]
