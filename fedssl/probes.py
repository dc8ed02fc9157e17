"""Probes: how much of the labels a simple classifier reads from frozen features.

The test set is read once, at the end: nothing is ever chosen on it. scikit-learn is imported inside functions, because
it would slow the start of every command.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl import seeds
from fedssl.errors import ConfigError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Predict = Callable[[Floats], Ints]

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse penalties, scikit-learn's C
# Used where nothing can be held out to choose by, and kept where nothing held out is clearly better. One point a class
# is always separable: weak penalties give the largest margin between single points, strong ones the class means. The
# middle of the grid is best or within 0.002 of it on raw digits with 1, 2, 5 and 20 labels a class (3 splits, 60 to 200
# draws): 0.647 with one label, where nearest class mean and 1-NN give 0.639.
_DEFAULT_STRENGTH = 1e-1
_WORK = 4e11  # floating-point operations one fit may take: some 20 seconds on one core


@dataclass(frozen=True)
class LinearResult:
    """What `linear` measured: both accuracies in [0, 1]; `strength` is the inverse penalty C that was chosen."""

    accuracy: float
    strength: float
    validation_accuracy: float  # nan where the train set was too small to hold anything out


@dataclass(frozen=True)
class FewLabelResult:
    """What `few_label` measured: `std` is over the draws (N - 1; 0 for one draw), `labels` the count in each draw."""

    mean: float
    std: float
    accuracies: tuple[float, ...]
    labels: int


def knn(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Classifies each test example by its k most similar train examples, which vote with `exp(cosine / temperature)`.

    Args:
        train_x: (N, D) features.
        train_y: (N,) integer labels.
        test_x: (M, D) features.
        test_y: (M,) integer labels.
        k: neighbours, >= 1; cut down to N where the train set is smaller.
        temperature: > 0; small values let the nearest neighbour decide, large ones count votes.

    Returns:
        The accuracy in [0, 1]: chance (the share of the largest class or so) for collapsed features, 1 for classes that
        lie apart. No training, hence the quick measure during a run.

    Raises:
        ConfigError: arrays that do not fit, features that are not finite, k < 1 or a temperature that is not positive.

    References:
        Wu et al. 2018, https://arxiv.org/abs/1805.01978
    """
    from sklearn import config_context
    from sklearn.neighbors import KNeighborsClassifier

    x, y, held_x, held_y = _checked(train_x, train_y, test_x, test_y)
    if k < 1:
        raise ConfigError(f"k is {k}, but a vote needs a voter; set k to 1 or more.")
    if not temperature > 0:
        raise ConfigError(f"The temperature is {temperature}, but similarities are divided by it; set a value above 0.")

    def weights(distance: Floats) -> Floats:  # (M, k), 1 - cosine; relative to the nearest one, so that no row is all 0
        return np.asarray(np.exp((distance.min(axis=1, keepdims=True) - distance) / temperature))

    model = KNeighborsClassifier(n_neighbors=min(k, len(x)), weights=weights, algorithm="brute", metric="cosine")
    with _quiet(), config_context(working_memory=256):  # MiB
        return _accuracy(model.fit(x, y).predict(held_x), held_y)


def linear(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    seed: int,
    limit: int = 20_000,
) -> LinearResult:
    """Trains multinomial logistic regression on standardised frozen features and reads the test set once.

    The strength is picked on a stratified fifth of the train set (a plain fifth where a class is too small for that):
    0.1, unless another is better by more than chance. Then the classifier is fitted again on the whole train set.

    Args:
        train_x: (N, D) features; mean and deviation for standardising come from these.
        train_y: (N,) integer labels; a single class gives the classifier that always says it.
        test_x: (M, D) features.
        test_y: (M,) integer labels.
        seed: draws the validation part and, above `limit`, the train examples.
        limit: the largest number of train examples used, >= 1.

    Returns:
        The accuracies and the strength. Read the accuracy against that of an untrained encoder, not against chance.

    Raises:
        ConfigError: arrays that do not fit, features that are not finite or a limit below 1.

    References:
        Kornblith et al. 2019, "Do better ImageNet models transfer better?", https://arxiv.org/abs/1805.08974
    """
    x, y, held_x, held_y = _checked(train_x, train_y, test_x, test_y)
    classifier, strength, validation = _linear_classifier(x, y, seed, limit)
    return LinearResult(_accuracy(classifier(held_x), held_y), strength, validation)


def linear_on_each(
    train_x: ArrayLike, train_y: ArrayLike, tests: Sequence[ArrayLike], test_y: ArrayLike, *, seed: int
) -> list[float]:
    """The classifier of `linear`, trained once, on several versions of one test set, such as corrupted ones.

    Each of `tests` is (M, D); returns their accuracies in [0, 1]. Raises a ConfigError as `linear` does.
    """
    x, y = _labelled("train", train_x, train_y)
    classifier, _, _ = _linear_classifier(x, y, seed, 20_000)
    out = []
    for test in tests:
        _, _, held_x, held_y = _checked(train_x, train_y, test, test_y)
        out.append(_accuracy(classifier(held_x), held_y))
    return out


def _linear_classifier(x: Floats, y: Ints, seed: int, limit: int) -> tuple[Predict, float, float]:
    """A classifier of raw features, its strength, and its accuracy on what was held out."""
    if limit < 1:
        raise ConfigError(f"limit is {limit}, but a classifier needs an example; set limit to 1 or more.")
    if len(x) > limit:
        chosen = np.sort(seeds.stream(seed, "probe", "limit").choice(len(x), limit, replace=False))
        x, y = x[chosen], y[chosen]
    z, _ = _standardised(x, x[:1])
    strength, validation = _choose_strength(z, y, seeds.stream(seed, "probe", "validation"))
    predict = _fit(z, y, strength)
    return (lambda rows: predict(_standardised(x, rows)[1])), strength, validation


def few_label(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    repeats: int = 10,
    seed: int,
) -> FewLabelResult:
    """Trains logistic regression on a few labelled examples, several times, with other examples each time.

    Features are L2-normalised, then centred and divided by one common scale, both from all train features, which needs
    no labels. One scale, not one a column: few labels cannot unlearn the noise of a nearly constant column that was
    blown up (raw digits, one label a class: 0.647 against 0.592). The strength is picked as in `linear`, on a fifth of
    the labelled examples alone, where each class has two of them, and is 0.1 otherwise.

    Args:
        train_x: (N, D) features.
        train_y: (N,) integer labels; only the drawn ones are used.
        test_x: (M, D) features.
        test_y: (M,) integer labels.
        per_class: labelled examples of each class, >= 1; a smaller class gives all it has.
        fraction: share of each class that is labelled, in (0, 1], rounded, at least one. Set this or `per_class`.
        repeats: draws, >= 1. One draw of one label a class says little: report mean and std.
        seed: names the draws; draw r is the same whatever `repeats` is.

    Returns:
        Mean, std and all accuracies, each in [0, 1], and the number of labels used in a draw.

    Raises:
        ConfigError: arrays that do not fit, features that are not finite, both or neither of `per_class` and
            `fraction`, or a value out of range.

    References:
        Chen et al. 2020, section 6 (1 % and 10 % of the labels), https://arxiv.org/abs/2002.05709
    """
    x, y, held_x, held_y = _checked(train_x, train_y, test_x, test_y)
    counts = _label_counts(y, per_class, fraction)
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, but a mean needs a draw; set repeats to 1 or more.")
    x, held_x = _unit(x), _unit(held_x)
    mean, scale = x.mean(axis=0), float(np.sqrt(x.var(axis=0).mean()))
    scale = scale if scale > 1e-7 else 1.0  # rows are 1 long: below lies rounding
    x, held_x = (x - mean) / scale, (held_x - mean) / scale
    accuracies = []
    for repeat in range(repeats):
        rng = seeds.stream(seed, "probe", "few_label", repeat)
        drawn = np.concatenate([rng.choice(np.flatnonzero(y == c), n, replace=False) for c, n in counts.items()])
        strength = _DEFAULT_STRENGTH
        if min(counts.values()) >= 2:
            strength, _ = _choose_strength(x[drawn], y[drawn], rng)
        accuracies.append(_accuracy(_fit(x[drawn], y[drawn], strength)(held_x), held_y))
    std = float(np.std(accuracies, ddof=1)) if repeats > 1 else 0.0
    return FewLabelResult(float(np.mean(accuracies)), std, tuple(accuracies), sum(counts.values()))


def _label_counts(y: Ints, per_class: int | None, fraction: float | None) -> dict[int, int]:
    """How many examples of each class are labelled, at least one and at most all."""
    if (per_class is None) == (fraction is None):
        raise ConfigError(
            f"per_class is {per_class} and fraction is {fraction}, but exactly one says how many labels; set one."
        )
    if per_class is not None and per_class < 1:
        raise ConfigError(f"per_class is {per_class}, but every class needs an example; set it to 1 or more.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(
            f"fraction is {fraction}, which is no share of the labels; set a value above 0 and at most 1."
        )
    classes, sizes = np.unique(y, return_counts=True)
    wanted = [per_class if fraction is None else max(1, round(fraction * int(size))) for size in sizes]
    return {int(c): min(int(size), int(n or 1)) for c, size, n in zip(classes, sizes, wanted, strict=True)}


def _choose_strength(x: Floats, y: Ints, rng: np.random.Generator) -> tuple[float, float]:
    """The strength for (x, y), chosen on a held-out fifth, and its accuracy there (nan if nothing can be held out).

    Another strength displaces the default if it wins more held-out examples than it loses by over one standard error of
    that difference (sign test): the best of five on ten examples is mostly luck.
    """
    fit, held = _split(y, rng)
    if len(held) == 0:
        return _DEFAULT_STRENGTH, math.nan
    grid = _STRENGTHS if len(np.unique(y[fit])) > 1 else (_DEFAULT_STRENGTH,)
    right = {c: _fit(x[fit], y[fit], c)(x[held]) == y[held] for c in grid}
    usual = right[_DEFAULT_STRENGTH]
    best = _DEFAULT_STRENGTH
    for strength, hits in right.items():
        clear = hits.sum() - usual.sum() > math.sqrt((hits != usual).sum())
        if clear and hits.sum() > right[best].sum():
            best = strength
    return best, float(right[best].mean())


def _split(y: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Indices to fit on and to hold out, a fifth: of each class where all have two examples, else of the whole."""
    _, group = np.unique(y, return_inverse=True)
    if np.bincount(group).min() < 2:
        group = np.zeros_like(group)
    held = []
    for g in range(int(group.max()) + 1):
        members = rng.permutation(np.flatnonzero(group == g))
        held.append(members[: min(len(members) - 1, max(1, round(len(members) / 5)))])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), chosen), chosen


def _fit(x: Floats, y: Ints, strength: float) -> Predict:
    """Logistic regression; a single class gives the constant classifier."""
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(y)
    if len(classes) == 1:
        return lambda rows: np.full(len(rows), classes[0])
    # Almost every fit converges far below this bound, which depends on sizes only: the same on every machine.
    steps = int(min(max(_WORK / (4 * x.size * len(classes)), 50), 1000))
    with _quiet():
        model = LogisticRegression(C=strength, max_iter=steps).fit(x, y)
    return lambda rows: np.asarray(model.predict(rows), dtype=np.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences two remarks: the bound on steps was reached; many classes for few labels look like a regression."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        yield


def _unit(x: Floats) -> Floats:
    """Rows at length 1 in float64; a zero row stays zero."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norm > 0, norm, 1.0))


def _standardised(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both sets in float64 with the train set's mean 0 and deviation 1 in each column.

    A column that is constant up to rounding becomes about 0.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-7 * np.abs(mean), std, 1.0)
    return (train - mean) / std, (test - mean) / std


def _accuracy(predicted: NDArray[np.generic], labels: Ints) -> float:
    return float(np.mean(predicted == labels))


def _checked(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike
) -> tuple[Floats, Ints, Floats, Ints]:
    """The four arrays after their checks; float32 features stay float32, which is enough for kNN and twice as fast."""
    train, labels = _labelled("train", train_x, train_y)
    test, held = _labelled("test", test_x, test_y)
    if train.shape[1] != test.shape[1]:
        raise ConfigError(
            f"Train features have {train.shape[1]} columns and test features {test.shape[1]}, so one classifier cannot "
            "read both; compute both with the same encoder."
        )
    return train, labels, test, held


def _labelled(name: str, features: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    x, y = np.asarray(features), np.asarray(labels)
    if x.ndim != 2 or x.size == 0 or y.shape != x.shape[:1]:
        raise ConfigError(
            f"The {name} set has features of shape {x.shape} and labels of shape {y.shape}, but a probe reads (N, D) "
            "and (N,) with at least one example; flatten the features and pass one label for each."
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise ConfigError(f"The {name} labels are of type {y.dtype}, but a probe counts classes; pass integers.")
    x = x if x.dtype == np.float32 else x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ConfigError(
            f"The {name} features hold values that are not finite, so no classifier can read them; look at the loss of "
            "the run for the round in which it diverged."
        )
    return x, y.astype(np.int64)
