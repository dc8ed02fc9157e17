"""Near-duplicates: found exactly, kept with one client, counted where they leak."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import config, duplicates, partition
from fedssl.config import Plan
from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.digits import Digits
from fedssl.datasets.npz import Npz
from fedssl.datasets.signals.table import Signals
from fedssl.duplicates import DuplicateSafe, clusters, descriptors, leaks, near_pairs
from fedssl.errors import ConfigError
from fedssl.partition import Dirichlet, FeatureShift, Stored

REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(n: int, seed: int = 0, size: int = 16) -> np.ndarray:
    return rng(seed).integers(0, 256, (n, 3, size, size)).astype(np.uint8)


def dataset(pixels: np.ndarray) -> Dataset:
    return Dataset(torch.from_numpy(pixels), np.arange(len(pixels)) % 4)


def brute(x: np.ndarray, threshold: float, y: np.ndarray | None = None) -> list[list[int]]:
    """The slow reference."""
    other = x if y is None else y
    near = np.square(x[:, None] - other).sum(2) <= threshold**2
    return np.argwhere(np.triu(near, 1) if y is None else near).tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 60), m=st.integers(1, 30), centres=st.integers(1, 8), spread=st.sampled_from([0.0, 0.03, 0.2]),
    threshold=st.sampled_from([0.01, 0.15, 0.5, 0.9]), block=st.integers(1, 70), seed=st.integers(0, 3),
)  # fmt: skip
def test_pairs_and_clusters_are_those_of_brute_force(
    n: int, m: int, centres: int, spread: float, threshold: float, block: int, seed: int
) -> None:
    draw = rng(seed)
    x = draw.normal(size=(centres, 6))[draw.integers(0, centres, n + m)] + spread * draw.normal(size=(n + m, 6))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x, y = x[:n], x[n:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_ROWS", block)
        patch.setattr(duplicates, "_COLUMNS", block + 3)
        pairs = near_pairs(x, threshold=threshold)
        assert pairs.tolist() == brute(x, threshold)
        assert near_pairs(x, y, threshold=threshold).tolist() == brute(x, threshold, y)
    found = clusters(x, threshold=threshold)
    linked = np.eye(n, dtype=bool)
    linked[tuple(pairs.T)] = linked[tuple(pairs.T[::-1])] = True
    for _ in range(6):
        linked = linked @ linked
    assert np.array_equal(found[:, None] == found, linked)
    assert np.array_equal(found, np.argmax(linked, 1))


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    pixels = pictures(3000)
    twins = rng(1).choice(3000, (2, 40), replace=False)
    pixels[twins[1]] = pixels[twins[0]]  # exact
    dimmer = twins[1][20:]
    pixels[dimmer] = np.rint(pixels[dimmer] * 0.8 + 20).astype(np.uint8)  # another exposure
    pairs = near_pairs(descriptors(dataset(pixels)), threshold=0.02)
    assert {tuple(pair) for pair in pairs.tolist()} == {tuple(sorted(pair)) for pair in twins.T.tolist()}


def test_descriptors_forget_level_and_contrast_and_keep_the_rest() -> None:
    pixels = pictures(4)
    plain, bright = descriptors(dataset(pixels // 2)), descriptors(dataset(pixels // 2 + 100))
    assert np.allclose(plain, bright, atol=1e-7)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1)
    assert np.linalg.norm(plain[0] - plain[1]) > 0.9
    mirrored = descriptors(dataset(np.ascontiguousarray(pixels[..., ::-1])))
    assert np.linalg.norm(plain[0] - mirrored[0]) > 0.9
    flat = descriptors(dataset(np.stack([np.full((3, 16, 16), level, np.uint8) for level in (0, 90, 255)])))
    assert np.array_equal(flat[0], flat[1])
    assert np.array_equal(flat[1], flat[2])


def test_time_series_have_descriptors_too() -> None:
    x = torch.from_numpy(rng().normal(size=(30, 3, 50)).astype(np.float32))
    x[7] = 3 * x[2] + torch.tensor([1.0, -5.0, 9.0]).view(3, 1)
    assert near_pairs(descriptors(Signals(x)), threshold=0.05).tolist() == [[2, 7]]
    graphs = config.compose(tiny(modality="graphs")).job.data.load()
    with pytest.raises(ConfigError, match="images and time series"):
        descriptors(graphs.train)


def test_clusters_stay_together_whatever_the_base() -> None:
    pixels = pictures(300)
    pixels[200:] = pixels[:100]
    data = dataset(pixels)
    for base in (partition.Iid(), Dirichlet(alpha=0.2)):
        parts = DuplicateSafe(base=base).split(data, 5, rng())
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(300))
        owner = np.empty(300, int)
        for client, rows in enumerate(parts):
            owner[rows] = client
        assert np.array_equal(owner[:100], owner[200:])
        apart = partition.iid(300, 5, rng())
        both = Data(data, dataset(pixels[[5, 150]]), ("a", "b", "c", "d"))
        assert leaks(both, parts, threshold=0.1) == {"threshold": 0.1, "across_clients": 0, "train_test": 2}
        assert leaks(both, apart, threshold=0.1)["across_clients"] > 100
    alone = np.repeat(pictures(1), 5, 0)
    with pytest.raises(ConfigError, match="1 examples cannot give 2 clients"):
        DuplicateSafe().split(dataset(alone), 2, rng())


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.0, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        DuplicateSafe(threshold=threshold)
    with pytest.raises(ConfigError, match="threshold"):
        near_pairs(np.eye(3), threshold=threshold)


def test_a_threshold_that_links_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MOST", 1000)
    with pytest.raises(ConfigError, match="smaller partition.threshold"):
        near_pairs(np.repeat(np.eye(3)[:1], 100, 0), threshold=0.1)


@pytest.mark.parametrize("base", [FeatureShift(), Stored("x"), DuplicateSafe()])
def test_bases_that_make_no_sense_are_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match=type(base).__name__):
        DuplicateSafe(base=base)


def test_a_run_counts_what_leaks(plan: Callable[..., Plan]) -> None:
    options = ("partition@partition.base=duplicate_safe", "partition.base.threshold=0.3", "partition.rotation=20")
    run = execute(plan("partition=feature_shift", *options))
    split = run.read("split.json")
    assert split["near_duplicates"]["threshold"] == 0.3
    assert split["near_duplicates"]["across_clients"] == 0
    assert len(split["appearances"]) == 3


def test_the_digits_hold_few() -> None:
    train = Digits().load().train
    assert len(near_pairs(descriptors(train), threshold=0.15)) == 0
    assert len(near_pairs(descriptors(train), threshold=0.2)) == 8


def test_cifar_10_has_near_duplicates() -> None:
    file = REAL / "cifar10_jpeg.npz"
    if not file.is_file():
        pytest.skip(f"no {file.name}; set FEDSSL_DATA to the folder that holds it")
    train = Npz(str(file), limit=5000).load().train
    pairs = near_pairs(descriptors(train), threshold=0.25)
    assert 3 <= len(pairs) <= 30
    assert train.targets is not None
    assert (train.targets[pairs[:, 0]] == train.targets[pairs[:, 1]]).mean() > 0.8
