"""Splits: disjoint, sorted, complete, seeded; and the measures of their inequality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import partition
from fedssl.errors import ConfigError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Rows:
    targets: np.ndarray | None
    groups: np.ndarray | None
    n: int

    def __len__(self) -> int:
        return self.n


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, classes, n)


def check(parts: list[np.ndarray], n: int, clients: int, min_size: int = 1) -> None:
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) >= min_size for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@QUICK
@given(n=st.integers(1, 300), clients=st.integers(1, 40), seed=st.integers(0, 5))
def test_iid_is_a_partition_with_sizes_that_differ_by_one(n: int, clients: int, seed: int) -> None:
    if clients > n:
        with pytest.raises(ConfigError, match="at most"):
            partition.iid(n, clients, rng(seed))
        return
    parts = partition.iid(n, clients, rng(seed))
    check(parts, n, clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@QUICK
@given(
    n=st.integers(20, 300),
    clients=st.integers(1, 10),
    classes=st.integers(1, 12),
    alpha=st.sampled_from([1e-8, 0.01, 0.3, 10.0, 1e9]),
    min_size=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_dirichlet_and_quantity_skew_are_partitions_with_a_smallest_size(
    n: int, clients: int, classes: int, alpha: float, min_size: int, seed: int
) -> None:
    targets = labels(n, classes, seed)
    for split in (
        lambda g: partition.dirichlet(targets, clients, g, alpha=alpha, min_size=min_size),
        lambda g: partition.quantity_skew(n, clients, g, alpha=alpha, min_size=min_size),
    ):
        if clients * min_size > n:
            with pytest.raises(ConfigError, match="at most"):
                split(rng(seed))
            continue
        parts = split(rng(seed))
        check(parts, n, clients, min_size)
        assert partition.fingerprint(parts) == partition.fingerprint(split(rng(seed)))


@QUICK
@given(
    classes=st.integers(1, 12),
    clients=st.integers(1, 20),
    k=st.integers(1, 12),
    n=st.integers(12, 400),
    seed=st.integers(0, 3),
)
def test_pathological_gives_every_client_exactly_k_classes(
    classes: int, clients: int, k: int, n: int, seed: int
) -> None:
    targets = np.concatenate([np.arange(classes), labels(n, classes, seed) ** 2 // classes])
    counts = np.bincount(targets, minlength=classes)
    if (
        k > classes
        or clients * k < classes
        or np.minimum(counts, clients).sum() < clients * k
        or clients > len(targets)
    ):
        with pytest.raises(ConfigError):
            partition.pathological(targets, clients, rng(seed), classes_per_client=k)
        return
    parts = partition.pathological(targets, clients, rng(seed), classes_per_client=k)
    check(parts, len(targets), clients)
    assert all(len(np.unique(targets[part])) == k for part in parts)


@QUICK
@given(ids=st.lists(st.integers(0, 30), min_size=1, max_size=200), clients=st.integers(1, 12), seed=st.integers(0, 3))
def test_natural_never_divides_a_group(ids: list[int], clients: int, seed: int) -> None:
    groups = np.array(ids)
    if clients > len(set(ids)):
        with pytest.raises(ConfigError, match="groups"):
            partition.natural(groups, clients, rng(seed))
        return
    parts = partition.natural(groups, clients, rng(seed))
    check(parts, len(ids), clients)
    held = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(set(ids))
    largest = np.bincount(groups).max()
    assert max(map(len, parts)) - min(map(len, parts)) <= max(largest, 1)


def test_natural_with_as_many_clients_as_groups_numbers_them_alike() -> None:
    groups = np.array(["sketch", "photo", "art", "photo", "sketch", "art", "art"])
    parts = partition.natural(groups, 3, rng(7))
    assert [part.tolist() for part in parts] == [[2, 5, 6], [1, 3], [0, 4]]


def test_another_seed_gives_another_split() -> None:
    targets = labels(500, 10)
    one, two = (partition.dirichlet(targets, 5, rng(seed), alpha=0.3) for seed in (0, 1))
    assert partition.fingerprint(one) != partition.fingerprint(two)


def test_dirichlet_tends_to_iid_and_to_single_classes() -> None:
    targets = np.arange(20_000) % 10
    even = partition.heterogeneity(partition.dirichlet(targets, 10, rng(), alpha=1e6), targets)
    skew = partition.heterogeneity(partition.dirichlet(targets, 10, rng(), alpha=0.1), targets)
    assert even["label_emd"] < 0.01
    assert even["gini"] < 0.01
    assert skew["label_emd"] > 0.5


def test_extremely_unequal_draws_are_repaired_and_end() -> None:
    targets = np.zeros(100, np.int64)
    check(partition.dirichlet(targets, 50, rng(), alpha=1e-6, min_size=2), 100, 50, 2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        partition.Dirichlet(alpha=alpha)
    with pytest.raises(ConfigError, match="alpha"):
        partition.quantity_skew(10, 2, rng(), alpha=alpha)


def test_other_options_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_size"):
        partition.QuantitySkew(min_size=0)
    with pytest.raises(ConfigError, match="classes_per_client"):
        partition.Pathological(classes_per_client=0)
    with pytest.raises(ConfigError, match="clients"):
        partition.iid(10, 0, rng())


def test_the_fingerprint_is_the_same_on_every_platform() -> None:
    parts = [np.array([0, 3], np.int64), np.array([1, 2, 4], np.int64)]
    golden = "27dce2dabc538765d8bb5a72bc515c2fe95831cebffa2d54d88125484eee58fd"
    assert partition.fingerprint(parts) == golden
    assert partition.fingerprint([part.astype(">i4") for part in parts]) == golden
    assert partition.fingerprint([np.array([0, 3, 1]), np.array([2, 4])]) != golden


def test_heterogeneity_of_known_splits() -> None:
    targets = np.arange(1000) % 10
    alone = partition.heterogeneity([np.flatnonzero(targets == k) for k in range(10)], targets)
    assert alone["label_emd"] == pytest.approx(0.9)
    assert alone["gini"] == pytest.approx(0.0)
    assert partition.heterogeneity(partition.iid(100_000, 4, rng()), np.arange(100_000) % 10)["label_emd"] < 0.01
    unequal = partition.heterogeneity([np.arange(1), np.arange(1, 100)], None)
    assert unequal == {"gini": pytest.approx(0.49), "smallest": 1.0, "largest": 99.0}


@pytest.mark.parametrize(
    "configured",
    [
        partition.Iid(),
        partition.Dirichlet(),
        partition.Pathological(),
        partition.QuantitySkew(),
        partition.Natural(),
    ],
)
def test_the_configured_form_splits_and_says_whether_it_reads_labels(configured: partition.Partition) -> None:
    whole = Rows(labels(400, 10), np.arange(400) % 12, 400)
    check(configured.split(whole, 6, rng()), 400, 6)
    unlabelled = Rows(None, whole.groups, 400)
    if configured.uses_labels:
        with pytest.raises(ConfigError, match="needs labels"):
            configured.split(unlabelled, 6, rng())
    else:
        check(configured.split(unlabelled, 6, rng()), 400, 6)


def test_natural_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs groups"):
        partition.Natural().split(Rows(None, None, 10), 2, rng())
