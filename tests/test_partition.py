"""Splits: disjoint, sorted, complete, seeded; and the measures of their inequality."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import config, partition
from fedssl.errors import ConfigError
from fedssl.partition.classes import ASSIGN
from fedssl.partition.labels import SIZES, scaled

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Rows:
    targets: np.ndarray | None
    groups: np.ndarray | None
    n: int
    images: torch.Tensor | None = None
    device: Any = "cpu"

    def __len__(self) -> int:
        return self.n

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        assert self.images is not None
        return self.images[index]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, classes, n)


def pictures(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


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
def test_what_is_drawn_from_a_dirichlet_is_a_partition_with_a_smallest_size(
    n: int, clients: int, classes: int, alpha: float, min_size: int, seed: int
) -> None:
    targets = labels(n, classes, seed)
    options = {"alpha": alpha, "min_size": min_size}
    for split in (
        *(lambda g, s=s: partition.dirichlet(targets, clients, g, **options, sizes=s) for s in SIZES),
        lambda g: partition.quantity_skew(n, clients, g, **options),
        lambda g: partition.mixed_skew(targets, clients, g, **options, quantity_alpha=0.5),
        lambda g: partition.mixed_skew(targets, clients, g, alpha=0.5, quantity_alpha=alpha, min_size=min_size),
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
    assign=st.sampled_from(ASSIGN),
    seed=st.integers(0, 3),
)
def test_pathological_gives_every_client_k_classes(
    classes: int, clients: int, k: int, n: int, assign: str, seed: int
) -> None:
    targets = np.concatenate([np.arange(classes), labels(n, classes, seed) ** 2 // classes])
    counts = np.bincount(targets, minlength=classes)
    split = partial(partition.pathological, targets, clients, classes_per_client=k, assign=assign)
    room = np.minimum(counts, clients) if assign == "drawn" else counts
    held = np.bincount(np.arange(clients * k) % classes, minlength=classes)  # in turn
    if k > classes or clients * k < classes or room.sum() < clients * k or (assign == "turn" and any(held > counts)):
        with pytest.raises(ConfigError):
            split(rng(seed))
        return
    parts = split(rng(seed))
    check(parts, len(targets), clients)
    kinds = [len(np.unique(targets[part])) for part in parts]
    assert all(kind == k for kind in kinds) if assign != "shards" else max(kinds) <= classes
    if assign == "shards":
        assert max(map(len, parts)) - min(map(len, parts)) <= k


@pytest.mark.parametrize("k", range(1, 11))
@pytest.mark.parametrize("assign", ASSIGN)
def test_ten_clients_go_from_one_class_to_all(k: int, assign: str) -> None:
    targets = rng().permutation(np.arange(1000) % 10)
    parts = partition.pathological(targets, 10, rng(), classes_per_client=k, assign=assign)
    check(parts, 1000, 10)
    emd = partition.heterogeneity(parts, targets)["label_emd"]
    if assign == "shards":
        assert emd >= 1 - k / 10 - 1e-9  # several shards of a client may be of one class
    else:
        assert emd == pytest.approx(1 - k / 10, abs=0.01)


def test_in_turn_deals_neighbouring_classes_as_easyfl_does() -> None:
    targets = rng().permutation(np.arange(1000) % 10)
    parts = partition.pathological(targets, 5, rng(), classes_per_client=2, assign="turn")
    assert [np.unique(targets[part]).tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert {len(part) for part in parts} == {200}
    more = partition.pathological(targets, 7, rng(), classes_per_client=3, assign="turn")
    assert [np.unique(targets[part]).tolist() for part in more][3:5] == [[0, 1, 9], [2, 3, 4]]


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


def orchestra(drawn: np.ndarray) -> np.ndarray:
    """The balancing loop of Orchestra's sampler: a hundred passes, each by the sums before it, of both axes at once."""
    out = drawn / drawn.sum()
    for _ in range(100):
        out = out / out.sum(0, keepdims=True) / out.sum(1, keepdims=True)
    return out


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_equal_sizes_are_balanced_as_orchestra_balances(alpha: float) -> None:
    clients, classes = 20, 10
    drawn = rng().dirichlet(np.full(clients, alpha), classes).T  # (clients, classes)
    ours = scaled(drawn, np.full(clients, 1 / clients), np.full(classes, 1 / classes))
    assert np.allclose(ours.sum(0), 1 / classes)
    assert np.allclose(ours, orchestra(drawn), atol=1e-9)


def test_sizes_are_free_capped_or_equal() -> None:
    targets = np.arange(20_000) % 10
    measured = {
        sizes: partition.heterogeneity(partition.dirichlet(targets, 20, rng(), alpha=0.1, sizes=sizes), targets)
        for sizes in SIZES
    }
    assert measured["free"]["gini"] > 0.25
    assert measured["capped"]["gini"] < measured["free"]["gini"]
    assert measured["capped"]["largest"] < 1000 + 2000
    assert measured["equal"]["gini"] < 0.03
    assert all(row["label_emd"] > 0.6 for row in measured.values())


def test_capped_gives_nothing_more_to_those_that_have_their_share() -> None:
    targets = np.repeat(np.arange(10), 200)
    for part in partition.dirichlet(targets, 4, rng(3), alpha=0.2, sizes="capped"):
        before = np.cumsum(np.bincount(targets[part], minlength=10))
        full = np.flatnonzero(before >= 500)
        assert len(np.unique(before[full])) <= 1  # once at 2000 / 4, no later class adds to it


def test_mixed_skew_sets_labels_and_sizes_apart() -> None:
    targets = np.arange(20_000) % 10

    def figures(alpha: float, quantity_alpha: float) -> tuple[float, float]:
        parts = partition.mixed_skew(targets, 10, rng(), alpha=alpha, quantity_alpha=quantity_alpha)
        found = partition.heterogeneity(parts, targets)
        return found["label_emd"], found["gini"]

    (same, even), (skewed, still_even), (still_same, uneven) = figures(1e4, 1e4), figures(0.1, 1e4), figures(1e4, 0.3)
    assert same < 0.02
    assert even < 0.02
    assert skewed > 0.5
    assert still_even < 0.02
    assert still_same < 0.02
    assert uneven > 0.4


@QUICK
@given(
    n=st.integers(1, 200), kinds=st.integers(1, 60), clients=st.integers(1, 12), base=st.sampled_from(["iid", "dir"])
)
def test_what_belongs_together_stays_together(n: int, kinds: int, clients: int, base: str) -> None:
    clusters, targets = labels(n, kinds), labels(n, 5, 1)
    whole = base == "iid"
    of = partition.iid if whole else partial(partition.dirichlet, alpha=0.5, min_size=1)
    split = partial(partition.keep_together, n if whole else targets, clients, clusters=clusters, base=of)
    if clients > len(np.unique(clusters)):
        with pytest.raises(ConfigError, match="at most"):
            split(rng())
        return
    parts = split(rng())
    check(parts, n, clients)
    assert sum(len(np.unique(clusters[part])) for part in parts) == len(np.unique(clusters))


def test_a_base_keeps_its_bits_where_nothing_belongs_together() -> None:
    targets = labels(300, 10)
    base = partial(partition.dirichlet, alpha=0.3)
    kept = partition.keep_together(targets, 5, rng(), clusters=np.arange(300)[::-1], base=base)
    assert partition.fingerprint(kept) == partition.fingerprint(base(targets, 5, rng()))
    shifted = partition.feature_shift(targets, 5, rng(), base=base)
    assert partition.fingerprint(shifted) == partition.fingerprint(kept)
    with pytest.raises(ConfigError, match="one per example"):
        partition.keep_together(300, 5, rng(), clusters=np.arange(299))


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
    with pytest.raises(ConfigError, match="assign"):
        partition.Pathological(assign="fair")
    with pytest.raises(ConfigError, match="sizes"):
        partition.Dirichlet(sizes="fair")
    with pytest.raises(ConfigError, match="quantity_alpha"):
        partition.MixedSkew(quantity_alpha=0)
    with pytest.raises(ConfigError, match="clients"):
        partition.iid(10, 0, rng())


def test_the_fingerprint_is_the_same_on_every_platform() -> None:
    parts = [np.array([0, 3], np.int64), np.array([1, 2, 4], np.int64)]
    golden = "27dce2dabc538765d8bb5a72bc515c2fe95831cebffa2d54d88125484eee58fd"
    assert partition.fingerprint(parts) == golden
    assert partition.fingerprint([part.astype(">i4") for part in parts]) == golden
    assert partition.fingerprint([np.array([0, 3, 1]), np.array([2, 4])]) != golden


@pytest.mark.parametrize(
    ("split", "start"),
    [
        (lambda t, g: partition.iid(t, 7, g), "1b4d8814a4f3f354"),
        (lambda t, g: partition.dirichlet(t, 7, g, alpha=0.3), "654cb97fcc898dce"),
        (lambda t, g: partition.dirichlet(t, 40, g, alpha=0.01, min_size=3), "3445c145320ed2ae"),
        (lambda t, g: partition.pathological(t, 7, g, classes_per_client=3), "24efb26d3104a367"),
        (lambda t, g: partition.quantity_skew(t, 7, g, alpha=0.5), "b1294ef34e075aac"),
        (lambda t, g: partition.natural(t, 4, g), "f8f344196288f28d"),
    ],
)
def test_a_seed_gives_the_split_that_it_has_always_given(split: Any, start: str) -> None:
    assert partition.fingerprint(split(rng(3).integers(0, 10, 997), rng(7))).startswith(start)


def test_feature_skew_is_the_share_of_the_variance_between_clients() -> None:
    noise = rng().normal(size=(3, 500, 2))
    assert partition.feature_skew(noise) < 0.01  # type: ignore[operator]
    apart = noise * 0.1 + np.arange(3)[:, None, None]
    assert partition.feature_skew(apart) == pytest.approx(1 - 0.01 / (0.01 + 2 / 3), abs=2e-3)
    one = apart.copy()
    one[:, :, 1] = noise[:, :, 1]  # one of two numbers tells the clients apart
    assert partition.feature_skew(one) == pytest.approx(0.5 * (1 - 0.01 / (0.01 + 2 / 3)), abs=4e-3)
    assert partition.feature_skew([np.ones((4, 2)), np.ones((5, 2))]) == 0
    assert partition.feature_skew([noise[0]]) is None
    assert partition.feature_skew([noise[0, :1], noise[1, :1]]) is None


def test_heterogeneity_of_known_splits() -> None:
    targets = np.arange(1000) % 10
    alone = partition.heterogeneity([np.flatnonzero(targets == k) for k in range(10)], targets)
    assert alone["label_emd"] == pytest.approx(0.9)
    assert alone["gini"] == pytest.approx(0.0)
    assert partition.heterogeneity(partition.iid(100_000, 4, rng()), np.arange(100_000) % 10)["label_emd"] < 0.01
    unequal = partition.heterogeneity([np.arange(1), np.arange(1, 100)], None)
    assert unequal == {"gini": pytest.approx(0.49), "smallest": 1.0, "largest": 99.0}


@pytest.mark.parametrize(
    "name", [name for name in config.options_of("partition") if name not in ("file", "virtual", "sites")]
)
def test_every_option_splits_and_says_whether_it_reads_labels(name: str) -> None:
    """What holds of every partition, for each yaml, with the bits of its seed alone."""
    configured = config.compose([f"partition={name}", "federation.clients=6"]).job.partition
    whole = Rows(labels(400, 10), np.arange(400) % 12, 400, pictures(400))
    parts = configured.split(whole, 6, rng())
    check(parts, 400, 6)
    assert partition.fingerprint(configured.split(whole, 6, rng())) == partition.fingerprint(parts)
    shuffled = replace(whole, targets=rng(1).permutation(whole.targets))
    assert configured.uses_labels is (
        partition.fingerprint(configured.split(shuffled, 6, rng())) != partition.fingerprint(parts)
    )
    unlabelled = replace(whole, targets=None)
    if configured.uses_labels:
        with pytest.raises(ConfigError, match="needs labels"):
            configured.split(unlabelled, 6, rng())
    else:
        check(configured.split(unlabelled, 6, rng()), 400, 6)
    one = Rows(np.zeros(1, np.int64), np.zeros(1, np.int64), 1, pictures(1))
    if configured == config.compose(["partition=iid"]).job.partition:
        check(configured.split(one, 1, rng()), 1, 1)
    with pytest.raises(ConfigError):
        configured.split(one, 2, rng())


def test_natural_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs groups"):
        partition.Natural().split(Rows(None, None, 10), 2, rng())
