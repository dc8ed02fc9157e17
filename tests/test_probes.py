"""Probes: known answers, a brute-force kNN, no choice on the test set, repeatable by seed."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fedssl import probes, seeds
from fedssl.errors import ConfigError
from fedssl.probes import few_label, knn, linear

Data = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module")
def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    return train_x, train_y, test_x, test_y


def clusters(n: int = 90, classes: int = 3, spread: float = 0.05, seed: int = 0, d: int = 6) -> Data:
    """Well separated directions: every probe must reach 1."""
    rng = seeds.stream(seed, "test", "clusters")
    y = np.arange(2 * n) % classes
    x = np.eye(d)[y] + spread * rng.normal(size=(2 * n, d))
    return x[:n], y[:n], x[n:], y[n:]


def test_separable_data_gives_one() -> None:
    data = clusters()
    assert knn(*data) == 1
    assert linear(*data, seed=0).accuracy == 1
    assert linear(*data, seed=0).validation_accuracy == 1
    for result in (few_label(*data, per_class=1, seed=0), few_label(*data, fraction=0.2, seed=0)):
        assert result.accuracies == (1.0,) * 10
        assert result.mean == 1
        assert result.std == 0


def test_shuffled_labels_give_chance() -> None:
    rng = seeds.stream(0, "test", "shuffle")
    x, y, test_x, test_y = clusters(n=600)
    y = rng.permutation(y)
    for accuracy in (
        knn(x, y, test_x, test_y),
        linear(x, y, test_x, test_y, seed=0).accuracy,
        few_label(x, y, test_x, test_y, per_class=5, seed=0).mean,
    ):
        assert accuracy == pytest.approx(1 / 3, abs=0.15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (20, 0.02), (7, 10.0), (1000, 0.5)])
def test_knn_equals_a_brute_force_loop(k: int, temperature: float, dtype: Any) -> None:
    x, y, test_x, test_y = clusters(n=60, classes=4, spread=0.6)
    y = y + 3  # labels need not start at 0
    test_y = test_y + 3
    hits = 0
    for query, label in zip(test_x, test_y, strict=True):
        similarity = x @ query / (np.linalg.norm(x, axis=1) * np.linalg.norm(query))
        votes = dict.fromkeys(range(3, 7), 0.0)
        for i in np.argsort(-similarity)[:k]:
            votes[int(y[i])] += math.exp(similarity[i] / temperature)
        hits += max(votes, key=lambda c: votes[c]) == label
    got = knn(x.astype(dtype), y, test_x.astype(dtype), test_y, k=k, temperature=temperature)
    assert got == pytest.approx(hits / len(test_y))
    assert 0.3 < got < 1


def test_knn_edges() -> None:
    data = clusters()
    assert knn(*data, temperature=1e-6) == 1  # weights far below the smallest float relative to exp(1 / t)
    x, y, test_x, test_y = data
    assert knn(np.zeros_like(x), y, test_x, test_y) == pytest.approx(1 / 3, abs=0.01)
    assert knn(x[:1], y[:1], test_x, test_y) == pytest.approx(np.mean(test_y == y[0]))


def test_test_labels_never_change_what_linear_chooses(digits: Data) -> None:
    x, y, test_x, test_y = (a[:200] for a in digits)
    rng = seeds.stream(1, "test", "labels")
    usual = linear(x, y, test_x, test_y, seed=0)
    for _ in range(3):
        other = linear(x, y, test_x, rng.permutation(test_y), seed=0)
        assert (other.strength, other.validation_accuracy) == (usual.strength, usual.validation_accuracy)
        assert other.accuracy < usual.accuracy


def test_choosing_reads_the_train_labels_only(monkeypatch: pytest.MonkeyPatch, digits: Data) -> None:
    """Every classifier is fitted on train rows, and only the last one is asked about test rows."""
    x, y, test_x, test_y = (a[:150] for a in digits)
    asked: list[int] = []
    fit = probes._fit

    def spy(rows: NDArray[Any], labels: NDArray[Any], strength: float) -> Any:
        model = fit(rows, labels, strength)

        def predict(queries: NDArray[Any]) -> Any:
            asked.append(len(queries))
            return model(queries)

        return predict

    monkeypatch.setattr(probes, "_fit", spy)
    linear(x, y, test_x[:149], test_y[:149], seed=0)
    assert asked.count(149) == 1
    assert asked[-1] == 149
    asked.clear()
    few_label(x, y, test_x[:149], test_y[:149], per_class=3, repeats=2, seed=0)
    assert asked.count(149) == 2


def test_repeatable_by_seed(digits: Data) -> None:
    data = tuple(a[:300] for a in digits)
    assert linear(*data, seed=3, limit=100) == linear(*data, seed=3, limit=100)
    first = few_label(*data, per_class=2, seed=3, repeats=4)
    assert first == few_label(*data, per_class=2, seed=3, repeats=4)
    assert first.accuracies[:2] == few_label(*data, per_class=2, seed=3, repeats=2).accuracies
    assert first.accuracies != few_label(*data, per_class=2, seed=4, repeats=4).accuracies
    assert len(set(first.accuracies)) > 1
    assert first.std == pytest.approx(np.std(first.accuracies, ddof=1))


def test_digits_land_where_they_were_measured(digits: Data) -> None:
    assert knn(*digits) == pytest.approx(0.976, abs=0.01)
    result = linear(*digits, seed=0)
    assert result.accuracy == pytest.approx(0.97, abs=0.015)
    assert result.strength in (0.1, 1.0)
    one = few_label(*digits, per_class=1, seed=0)
    five = few_label(*digits, per_class=5, seed=0)
    assert one.labels == 10
    assert five.labels == 50
    assert one.mean == pytest.approx(0.645, abs=0.05)
    assert five.mean == pytest.approx(0.86, abs=0.025)


def test_scaling_is_fitted_on_the_train_set() -> None:
    x, y, test_x, test_y = clusters(n=60, classes=2, spread=0.3)
    offset = np.array([1e3, 0, 0, -50, 0, 0])
    scale = np.array([1, 100, 1e-3, 1, 1, 5])
    usual = linear(x, y, test_x, test_y, seed=0)
    moved = linear(x * scale + offset, y, test_x * scale + offset, test_y, seed=0)
    assert moved == usual
    # A test set far away must not be pulled back by its own mean.
    assert linear(x, y, test_x + np.array([9.0, -9, 0, 0, 0, 0]), test_y, seed=0).accuracy == pytest.approx(0.5)


@pytest.mark.parametrize("labels", [[0] * 19 + [1], [0, 1] * 10, list(range(20)), [5] * 20, [0] * 10 + [1] * 9 + [2]])
def test_rare_and_single_classes(labels: list[int]) -> None:
    y = np.array(labels)
    x = np.eye(20)[y] + 0.01
    result = linear(x, y, x, y, seed=0)
    assert result.accuracy >= 0.95
    assert 0 <= result.validation_accuracy <= 1
    assert few_label(x, y, x, y, per_class=1, seed=0, repeats=2).mean == 1
    if len(set(labels)) == 1:
        assert linear(x, y, x, y + 1, seed=0).accuracy == 0
        assert few_label(x, y, x, y + 1, per_class=2, seed=0).mean == 0


def test_one_and_two_train_examples() -> None:
    x, y, test_x, test_y = clusters(classes=2)
    one = linear(x[:1], y[:1], test_x, test_y, seed=0)
    assert one.accuracy == pytest.approx(0.5)
    assert math.isnan(one.validation_accuracy)
    assert linear(x[:2], y[:2], test_x, test_y, seed=0).accuracy >= 0.5


def test_a_hundred_classes_with_one_label_each() -> None:
    """scikit-learn warns here that the labels look like a regression; warnings are errors in these tests."""
    y = np.arange(200) % 100
    x = np.eye(100)[y]
    assert few_label(x, y, x, y, per_class=1, seed=0, repeats=2).mean == 1
    assert knn(x[:100], y[:100], x, y, k=1) == 1


def test_collapsed_features_give_chance_without_a_warning() -> None:
    _, y, _, test_y = clusters(n=300)
    for value in (0.0, 0.1):
        x = np.full((300, 5), value)
        assert linear(x, y, x, test_y, seed=0).accuracy == pytest.approx(1 / 3, abs=0.01)
        assert few_label(x, y, x, test_y, fraction=0.1, seed=0).mean == pytest.approx(1 / 3, abs=0.01)
        assert knn(x, y, x, test_y) == pytest.approx(1 / 3, abs=0.01)


def test_a_fit_that_reaches_its_bound_is_accepted(monkeypatch: pytest.MonkeyPatch, digits: Data) -> None:
    monkeypatch.setattr(probes, "_WORK", 0.0)
    monkeypatch.setattr(probes, "_STRENGTHS", (1e-1, 1e6))
    x, y, test_x, test_y = (a[:300] for a in digits)
    assert linear(x, y, test_x, test_y, seed=0).accuracy > 0.8


def test_limit_uses_that_many_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = probes._fit
    monkeypatch.setattr(probes, "_fit", lambda x, y, c: (seen.append(len(x)), fit(x, y, c))[1])
    linear(*clusters(n=90), seed=0, limit=50)
    assert max(seen) == seen[-1] == 50
    assert seen[0] == 40


def test_label_counts() -> None:
    y = np.repeat([0, 1, 2], [100, 15, 1])
    assert probes._label_counts(y, None, 0.1) == {0: 10, 1: 2, 2: 1}
    assert probes._label_counts(y, None, 1.0) == {0: 100, 1: 15, 2: 1}
    assert probes._label_counts(y, 20, None) == {0: 20, 1: 15, 2: 1}


def test_split_is_stratified_where_it_can_be() -> None:
    y = np.repeat([0, 1, 2], [50, 10, 2])
    fit, held = probes._split(y, seeds.stream(0, "split"))
    assert sorted([*fit, *held]) == list(range(62))
    assert np.bincount(y[held]).tolist() == [10, 2, 1]
    fit, held = probes._split(np.repeat([0, 1], [9, 1]), seeds.stream(0, "split"))
    assert len(held) == 2


def test_refusals() -> None:
    x, y, test_x, test_y = clusters()
    for bad in (
        (x[0], y, test_x, test_y),
        (x, y[:-1], test_x, test_y),
        (x[:0], y[:0], test_x, test_y),
        (x, y, test_x[:, :3], test_y),
        (x, y.astype(float), test_x, test_y),
        (x * np.nan, y, test_x, test_y),
        (x, y, test_x + np.inf, test_y),
    ):
        for probe in (knn, lambda *a: linear(*a, seed=0), lambda *a: few_label(*a, per_class=1, seed=0)):
            with pytest.raises(ConfigError):
                probe(*bad)
    for options in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError):
            knn(x, y, test_x, test_y, **options)
    with pytest.raises(ConfigError, match="limit"):
        linear(x, y, test_x, test_y, seed=0, limit=0)
    for options in (
        {},
        {"per_class": 1, "fraction": 0.1},
        {"per_class": 0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"fraction": math.nan},
        {"per_class": 1, "repeats": 0},
    ):
        with pytest.raises(ConfigError):
            few_label(x, y, test_x, test_y, seed=0, **options)


def test_importing_probes_does_not_import_scikit_learn() -> None:
    code = "import sys, fedssl.probes; sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
