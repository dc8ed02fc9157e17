"""Pairs: views, towers, data of two modalities, and retrieval across them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedssl import config
from fedssl.datasets.paired import Column, Pairs, PairsNpz, SpokenWritten, SyntheticPairs
from fedssl.errors import ConfigError
from fedssl.measures import retrieval
from fedssl.modalities.encoders import Conv4, ResNet18
from fedssl.modalities.images import ImageViews
from fedssl.modalities.pairs import Pair, PairViews, Side, TwoTowers

REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "spoken_written_digits.npz"
GREY = ImageViews(mean=(0.5,), std=(0.25,))
COLOUR = ImageViews()
VIEWS = PairViews(GREY, COLOUR)
SHAPE = ((1, 8, 8), (3, 8, 12))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 5, side: int = 0, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE[side], generator=generator(seed + side))


def pair(n: int = 5) -> Pair:
    return Pair(pictures(n), pictures(n, 1))


def table(n: int = 6, **options: Any) -> Pairs:
    return Pairs(Column(pictures(n)), Column(pictures(n, 1)), np.arange(n) % 2, np.arange(n) % 3, **options)


# --- views and towers


def test_both_modalities_are_the_views_and_one_alone_gives_all() -> None:
    views = VIEWS.views(pair(), generator(), 3)
    assert [view.which for view in views] == ["first", "second", "first"]
    assert [tuple(view.x.shape) for view in views] == [(5, 1, 8, 8), (5, 3, 8, 12), (5, 1, 8, 8)]
    again = VIEWS.views(pair(), generator(), 3)
    assert all(torch.equal(a.x, b.x) for a, b in zip(views, again, strict=True))
    for alone, which in ((Pair(pictures(), None), "first"), (Pair(None, pictures(side=1)), "second")):
        one, two = VIEWS.views(alone, generator(), 2)
        assert one.which == two.which == which
        assert not torch.equal(one.x, two.x), "augmented anew"


def test_plain_normalises_what_is_there() -> None:
    plain = VIEWS.plain(pair())
    assert torch.equal(plain.first, (pictures() - 0.5) / 0.25)
    assert torch.equal(plain.second, COLOUR.plain(pictures(side=1)))
    alone = VIEWS.plain(Pair(None, pictures(side=1)))
    assert alone.first is None
    assert len(alone) == 5
    assert "may be None" in VIEWS.reads
    assert "channels" in VIEWS.reads


def test_sides_split_as_tensors_do() -> None:
    pieces = Side(pictures(), "second").split(2)
    assert [(len(piece), piece.which) for piece in pieces] == [(2, "second"), (2, "second"), (1, "second")]
    assert torch.equal(torch.cat([piece.x for piece in pieces]), pictures())


@pytest.mark.parametrize("sides", [(None, None), (torch.zeros(2, 1), torch.zeros(3, 1))])
def test_pairs_that_do_not_fit_are_refused(sides: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="row i"):
        Pair(*sides)


def test_a_side_goes_through_its_tower_and_a_pair_gives_the_mean() -> None:
    network, dim = TwoTowers(Conv4(width=4, dim=8), ResNet18(width=1)).make(SHAPE)
    assert dim == 8
    assert {name.partition(".")[0] for name in network.state_dict()} == {"first", "second"}
    first, second = network(Side(pictures(), "first")), network(Side(pictures(side=1), "second"))
    assert torch.equal(first, network.first(pictures()))
    assert torch.equal(second, network.second(pictures(side=1)))
    unit = [x / x.norm(dim=1, keepdim=True) for x in (first, second)]
    torch.testing.assert_close(network(pair()), (unit[0] + unit[1]) / 2)
    torch.testing.assert_close(network(Pair(pictures(), None)), unit[0])
    torch.testing.assert_close(network(Pair(None, pictures(side=1))), unit[1])


def test_towers_of_other_sizes_and_other_data_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"64 features and encoder.second 8, .*encoder.second.dim=64"):
        TwoTowers(second=Conv4(dim=8)).make(SHAPE)
    for shape in ((3, 8, 8), (1, 8), ((1, 8, 8),)):
        with pytest.raises(ConfigError, match="two towers"):
            TwoTowers().make(shape)


def test_the_data_choose_the_towers_and_the_user_has_the_last_word() -> None:
    job = config.compose(["data=synthetic_pairs", "encoder@encoder.first=resnet18", "encoder.first.width=8"]).job
    assert job.encoder == TwoTowers(ResNet18(width=8), Conv4())
    with pytest.raises(ConfigError, match="Conv4 reads images and SyntheticPairs gives pairs"):
        config.compose(["data=synthetic_pairs", "encoder=conv4"])
    with pytest.raises(
        ConfigError, match=r"encoder.first \(Conv1d\) reads timeseries and data.augment.first gives images"
    ):
        config.compose(["data=synthetic_pairs", "encoder@encoder.first=conv1d"])
    with pytest.raises(ConfigError, match="encoder=resnet19 does not exist"):
        config.compose(["data=synthetic_pairs", "encoder@encoder.first=resnet19"])


# --- data


def test_a_table_gives_rows_of_both_and_a_shard_what_its_client_holds() -> None:
    data = table(holds=("both", "first", "second"))
    batch = data.batch(torch.tensor([3, 1]))
    assert torch.equal(batch.first, pictures(6)[[3, 1]])
    assert torch.equal(batch.second, pictures(6, 1)[[3, 1]])
    assert (len(data), data.shape, data.device.type) == (6, SHAPE, "cpu")
    rows = np.array([5, 0, 2])
    held = []
    for client in range(6):
        shard = data.shard(rows, client)
        assert len(shard) == 3
        got = shard.batch(torch.tensor([0]))
        held.append((got.first is not None, got.second is not None))
        assert torch.equal(got.sides[0].x[0], (pictures(6) if got.first is not None else pictures(6, 1))[5])
    assert held == [(True, True), (True, False), (False, True)] * 2
    assert [data.untrained(client) for client in range(3)] == [(), ("encoder.second.",), ("encoder.first.",)]
    part = data.subset(np.array([4, 2]))
    assert torch.equal(part.batch(torch.tensor([1])).second[0], pictures(6, 1)[2])
    assert part.targets is not None
    assert part.targets.tolist() == [0, 0]
    assert part.holds == data.holds
    assert data.to("cpu").shape == SHAPE


def test_bytes_become_floats_between_0_and_1() -> None:
    values = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert Column(values).batch(torch.tensor([0])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"holds": ()}, "data.holds"),
        ({"holds": ("both", "third")}, "data.holds"),
        ({"second": Column(pictures(4, 1))}, "same number"),
        ({"targets": np.zeros(3, np.int64)}, "one per example"),
    ],
)
def test_tables_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(table(), **options)


def test_drawn_pairs_come_from_their_seed_and_share_class_and_author() -> None:
    source = SyntheticPairs(train=200, test=50, classes=20)
    one, two = source.load(), source.load()
    other = replace(source, seed=1).load()
    index = torch.arange(200)
    for side in ("first", "second"):
        a, b, c = (getattr(data.train.batch(index), side) for data in (one, two, other))
        assert a.shape == (200, 1, 16, 16)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert (len(one.test), len(one.classes)) == (50, 20)
    tones, y = one.train.batch(index).second.flatten(1).numpy(), one.train.targets
    held = one.test.batch(torch.arange(50)).second.flatten(1).numpy()
    assert retrieval.retrieval(held, one.test.targets, tones, y) > 0.4, "a tone shows its class; chance is 0.05"
    with pytest.raises(ConfigError, match="2 to 20"):
        SyntheticPairs(classes=21)


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "pairs.npz", **arrays)
    return str(path / "pairs.npz")


def test_two_arrays_of_a_file_are_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(20, 3, 40))
    images = rng.integers(0, 256, (20, 9, 8)).astype(np.uint8)
    y = np.arange(20) % 4
    path = npz(tmp_path, wave=waves, image=images, labels=y, subjects=y, is_test=y == 3, class_names=list("abcd"))
    data = PairsNpz(path, "wave", "image", holds=("first",)).load()
    assert (len(data.train), len(data.test), data.classes) == (15, 5, ("a", "b", "c", "d"))
    assert data.train.shape == ((3, 40), (1, 9, 8))
    batch = data.train.batch(torch.tensor([3]))
    np.testing.assert_allclose(batch.first[0], waves[4], rtol=1e-6)
    np.testing.assert_allclose(batch.second[0, 0], images[4] / 255, rtol=1e-6)
    assert data.train.groups.tolist() == data.train.targets.tolist()
    assert data.train.holds == ("first",)
    blind = PairsNpz(npz(tmp_path, first=images, second=images)).load()
    assert (len(blind.train), blind.train.targets, blind.classes) == (16, None, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"second": None}, "no array 'second'"),
        ({"second": np.zeros((5, 8, 8), np.uint8)}, "same number"),
        ({"second": np.zeros((6, 4), np.int32)}, "uint8 images or finite"),
        ({"second": np.full((6, 4), np.nan)}, "finite"),
        ({"labels": np.zeros(6)}, "one whole number"),
        ({"is_test": np.zeros(6, bool)}, "whether it is a test"),
        ({"is_test": np.ones(4, bool)}, "whether it is a test"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arrays = {"first": np.zeros((6, 8, 8), np.uint8), "second": np.zeros((6, 4)), "labels": np.arange(6) % 2} | change
    with pytest.raises(ConfigError, match=words):
        PairsNpz(npz(tmp_path, **{k: v for k, v in arrays.items() if v is not None})).load()
    with pytest.raises(ConfigError, match="no file"):
        SpokenWritten(str(tmp_path / "other.npz")).load()


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not here; set FEDSSL_DATA to its folder")
def test_spoken_and_written_digits() -> None:
    data = SpokenWritten(str(REAL), image=2).load()
    assert (len(data.train), len(data.test)) == (2700, 300)
    assert data.train.shape == ((1, 40, 64), (1, 28, 28))
    assert np.bincount(data.train.groups).tolist() == [450] * 6
    assert np.bincount(data.test.targets).tolist() == [30] * 10
    views = SpokenWritten(str(REAL)).augment.plain(data.train.batch(torch.arange(2700)))
    for side in views.sides:
        assert abs(float(side.x.mean())) < 0.05
        assert abs(float(side.x.std()) - 1) < 0.05
    with pytest.raises(ConfigError, match="0 to 4"):
        SpokenWritten(str(REAL), image=5).load()


# --- retrieval


def test_retrieval_by_hand() -> None:
    queries = np.array([[2.0, 0.1], [0.1, 3.0], [-1.0, 0.0]])
    gallery = np.array([[0.0, 1.0], [5.0, 0.0]])
    assert retrieval.retrieval(queries, [7, 8, 8], gallery, [8, 7]) == 1.0
    assert retrieval.retrieval(queries, [8, 8, 8], gallery, [8, 7]) == pytest.approx(2 / 3)
    for bad in ((queries, [1, 2], gallery, [1, 2]), (queries, [1, 2, 3], gallery[:, :1], [1, 2])):
        with pytest.raises(ConfigError, match="do not fit"):
            retrieval.retrieval(*bad)
    with pytest.raises(ConfigError, match="at least one"):
        retrieval.retrieval(queries, [7, 8, 8], gallery[:0], [])


def test_the_gap_between_the_modalities_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    first, bank = (np.eye(3)[y] + 0.1 * rng.normal(size=(60, 3)) for _ in range(2))
    gap = np.array([9.0, -9.0, 5.0])
    assert retrieval.retrieval(first, y, first + gap, y) < 0.9
    got = retrieval.across(bank, bank + gap, first, first + gap, y)
    assert got == {"first_to_second_accuracy": 1.0, "second_to_first_accuracy": 1.0}
