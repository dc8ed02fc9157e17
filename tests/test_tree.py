"""Arithmetic on arrays: the running mean against exact fractions, and what is refused off the wire."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from conftest import assert_same
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedssl.errors import ProtocolError
from fedssl.parts import Arrays
from fedssl.tree import ExactMean, PartialMean, check_same, flatten, like, size_bytes, squared_distance

MODEL: Arrays = {
    "a.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "a.scale": np.array(0.3, dtype=np.float32),
    "a.nothing": np.zeros((0, 5), dtype=np.float32),
    "a.count": np.array([7, -3], dtype=np.int64),
    "a.mask": np.array([True, False]),
    "b.half": np.array([0.1, 3, -7], dtype=np.float16),
}
FLOATS = st.integers(-30, 30).flatmap(
    lambda power: st.integers(-(2**24), 2**24).map(lambda m: float(np.float32(m * 2.0**power)))
)
SOME = st.lists(st.tuples(FLOATS, st.integers(1, 4096)), min_size=1, max_size=4)
TERMS = SOME | SOME.map(lambda terms: [*terms, (-terms[0][0], terms[0][1])])  # what is left after one cancels out
CANCEL = [(2.0**30, 3), (2.0**-30, 1), (-(2.0**30), 3), (2.0**-46, 3)]


def mean_of(updates: Iterable[tuple[Arrays, float]], model: Arrays) -> Arrays:
    mean = ExactMean()
    for arrays, weight in updates:
        mean.add(arrays, weight)
    return mean.result(model)


def scalars(terms: list[tuple[float, int]]) -> list[tuple[Arrays, float]]:
    return [({"x": np.array([value], dtype=np.float32)}, weight) for value, weight in terms]


@settings(max_examples=150, deadline=None)
@given(TERMS)
@example(CANCEL)
def test_the_sum_is_exact_and_rounded_as_promised(terms: list[tuple[float, int]]) -> None:
    model = {"x": np.zeros(1, np.float32)}
    total = sum((Fraction(value) * weight for value, weight in terms), Fraction(0))
    weight = sum(w for _, w in terms)
    merged = mean_of(scalars(terms), model)["x"]
    # float() of a fraction is correctly rounded, so this is the one rounding of the sum that the class promises.
    assert merged.tobytes() == np.array([np.float32(float(total) / weight)]).tobytes()
    exact = total / weight
    gap = abs(Fraction(float(merged[0])) - exact)
    ulp = Fraction(float(np.spacing(np.float32(abs(float(exact))))))
    assert gap <= ulp * Fraction(500_001, 1_000_000), "half a unit in the last place, but for near ties"


@settings(max_examples=60, deadline=None)
@given(TERMS)
@example(CANCEL)
def test_every_order_gives_the_same_bits(terms: list[tuple[float, int]]) -> None:
    model = {"x": np.zeros(1, np.float32)}
    results = {mean_of(scalars(list(order)), model)["x"].tobytes() for order in itertools.permutations(terms)}
    assert len(results) == 1


def test_the_order_of_large_arrays_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    model = {"x": np.zeros(70_001, np.float32)}  # more than two passes
    updates: list[tuple[Arrays, float]] = [
        ({"x": (rng.normal(size=70_001) * 10.0 ** rng.integers(-8, 8, 70_001)).astype(np.float32)}, int(w))
        for w in rng.integers(1, 2000, 12)
    ]
    first = mean_of(updates, model)
    for _ in range(4):
        rng.shuffle(updates)  # type: ignore[arg-type]
        assert_same(first, mean_of(updates, model))
    reference = sum(u["x"].astype(np.float64) * w for u, w in updates) / sum(w for _, w in updates)
    np.testing.assert_allclose(first["x"], reference, rtol=2e-7, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    st.lists(st.integers(1, 2**20), min_size=1, max_size=9),
)
@example([0.1, 1 / 3, 3.4e38, 1e-45], [1257])
@example([-0.0, 0.0], [1, 1257])
def test_equal_updates_are_a_fixed_point(values: list[float], weights: list[int]) -> None:
    model = {"x": np.array(values, dtype=np.float32)}
    assert_same(mean_of([(model, weight) for weight in weights], model), model)


def test_every_type_is_a_fixed_point() -> None:
    assert_same(mean_of([(MODEL, 1257), (MODEL, 1), (MODEL, 31)], MODEL), MODEL)
    assert_same(mean_of([(MODEL, 3.0)], MODEL), MODEL)


def test_integers_and_booleans_are_rounded_to_the_nearest() -> None:
    model = {"count": np.array([0, 0], np.int32), "mask": np.array([False, False]), "small": np.array(0, np.uint8)}
    a = {"count": np.array([1, -8], np.int32), "mask": np.array([True, True]), "small": np.array(200, np.uint8)}
    b = {"count": np.array([2, -3], np.int32), "mask": np.array([False, True]), "small": np.array(255, np.uint8)}
    merged = mean_of([(a, 1), (b, 3)], model)
    assert merged["count"].tolist() == [2, -4]
    assert merged["mask"].tolist() == [False, True]
    assert merged["small"] == 241
    assert {k: v.dtype for k, v in merged.items()} == {k: v.dtype for k, v in model.items()}


def test_double_arrays_and_half_arrays() -> None:
    model = {"d": np.zeros(2), "h": np.zeros(2, np.float16)}
    a = {"d": np.array([0.1, 1e-200]), "h": np.array([1, 65504], np.float16)}
    b = {"d": np.array([0.4, 3e-200]), "h": np.array([2, 65504], np.float16)}
    merged = mean_of([(a, 1), (b, 1)], model)
    np.testing.assert_allclose(merged["d"], [0.25, 2e-200], rtol=1e-15)
    assert merged["h"].tolist() == [1.5, 65504.0]
    assert merged["d"].dtype == np.float64
    assert merged["h"].dtype == np.float16


def test_arrays_without_and_with_one_element() -> None:
    merged = mean_of([(MODEL, 2)], MODEL)
    assert merged["a.nothing"].shape == (0, 5)
    assert merged["a.scale"].shape == ()
    assert isinstance(merged["a.scale"], np.ndarray)


def test_not_contiguous_and_read_only_updates() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    update = {"x": whole.T[::-1, ::2]}
    update["x"].flags.writeable = False
    assert_same(mean_of([(update, 5)], update), {"x": np.ascontiguousarray(update["x"])})


def test_inputs_are_only_read() -> None:
    update = {k: v.copy() for k, v in MODEL.items()}
    mean = ExactMean()
    mean.add(update, 3)
    merged = mean.result(MODEL)
    assert_same(update, MODEL)
    for key, value in update.items():
        assert not np.shares_memory(value, merged[key])
    before = {k: v.copy() for k, v in merged.items()}
    for value in update.values():
        value[...] = 0
    mean.add(update, 1)
    assert_same(before, merged)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), -float("inf"), np.int64(0)])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    mean = ExactMean()
    with pytest.raises(ProtocolError, match="weight"):
        mean.add(MODEL, weight)
    assert mean.count == 0
    with pytest.raises(ProtocolError, match="nothing to merge"):
        mean.result(MODEL)


def test_an_update_with_other_names_is_not_averaged_silently() -> None:
    """A missing array would be divided by weights that never reached it."""
    mean = ExactMean()
    mean.add({"a": np.ones(3), "b": np.ones(3)}, 1)
    one = np.ones(1)
    for odd in ({"a": np.ones(3)}, {"a": np.ones(3), "b": np.ones(3), "c": one}, {"a": one, "b": np.ones(3)}):
        with pytest.raises(ProtocolError):
            mean.add(odd, 1)


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    size = 200_000
    rng = np.random.default_rng(1)
    mean = ExactMean()
    mean.add({"x": rng.random(size, dtype=np.float32)}, 1)
    tracemalloc.start()
    try:
        for weight in range(1, 51):
            mean.add({"x": rng.random(size, dtype=np.float32)}, weight)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < size, "nothing of an update stays"
    assert peak < 4 * size + 8 * (1 << 15) * 10, "one update and the work arrays of one pass"


def test_like_gives_types_and_rounds() -> None:
    model = {"f": np.float32(0), "i": np.zeros((), np.int64), "m": np.zeros(2, bool)}
    out = like({"f": np.float64(0.1), "i": np.array(2.6), "m": np.array([0.4, 0.6])}, model)  # type: ignore[arg-type]
    assert out["f"].dtype == np.float32
    assert isinstance(out["f"], np.ndarray)
    assert out["i"] == 3
    assert out["m"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.scale": None}, "'a.scale'"),
        ({"z.more": np.zeros(1)}, "'z.more'"),
        ({"a.weight": np.zeros((4, 3), np.float32)}, r"'a.weight' with shape \(4, 3\), not \(3, 4\)"),
        ({"a.scale": np.zeros(1, np.float32)}, r"shape \(1,\), not \(\)"),
        ({"a.scale": np.array(np.nan, np.float32)}, "not finite"),
        ({"b.half": np.array([0.0, np.inf, 0.0])}, "not finite"),
        ({"b.half": np.array([0.0, 0.0, -np.inf])}, "not finite"),
        ({"a.scale": np.array("text")}, "a.scale"),
        ({"a.scale": np.array(1j)}, "a.scale"),
    ],
)
def test_a_reply_that_does_not_fit_is_one_sentence(change: dict[str, Any], words: str) -> None:
    sent = {k: v for k, v in (MODEL | change).items() if v is not None}
    with pytest.raises(ProtocolError, match=words) as caught:
        check_same(sent, MODEL, "client 7")
    assert str(caught.value).startswith("client 7 sent")
    assert "\n" not in str(caught.value)


def test_a_reply_that_fits_passes() -> None:
    check_same(MODEL, MODEL, "client 0")
    check_same({}, {}, "client 0")
    check_same(dict(reversed(MODEL.items())), MODEL, "client 0")


def test_squared_distance_is_that_of_the_floating_arrays() -> None:
    a = {"x": np.array([[1, 2], [3, 4]], np.float32), "n": np.array(5), "s": np.array(2.0), "e": np.zeros(0)}
    b = {"x": np.array([[1, 0], [3, 1]], np.float32).T.copy().T, "n": np.array(9), "s": np.array(0.5), "e": np.zeros(0)}
    assert squared_distance(a, b) == 4 + 9 + 2.25
    assert squared_distance(a, a) == 0.0
    big = {"x": np.full(10, 3e38, np.float32)}
    assert np.isfinite(squared_distance(big, {"x": -big["x"]}))


def test_size_is_that_of_the_values() -> None:
    assert size_bytes(MODEL) == 48 + 4 + 0 + 16 + 2 + 6
    assert size_bytes({}) == 0


def test_flatten_names_every_leaf() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": {}}
    assert dict(flatten(tree)) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
    assert dict(flatten(tree, "x.")) == {"x.a.b.c": 1, "x.a.d": [1, 2], "x.e": None}


def test_a_mean_that_need_not_be_exact_is_one_in_float64() -> None:
    now = {"a": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}
    plain = PartialMean(now, exact=False)
    plain.add({"a": np.array([1e20, 1, 2], np.float32), "b": np.float32(1).reshape(())}, 1.0)
    plain.add({"a": np.array([1, 1, 4], np.float32)}, 3.0)
    plain.add({"a": np.array([-1e20, 1, 1], np.float32), "b": np.float32(4).reshape(())}, 1.0)
    mean = plain.result()
    assert mean["a"].tolist() == [0, 1, 3]  # what is exact has 0.6 there: the 3 is lost beside 1e20
    assert mean["b"] == 2.5
    assert mean["b"].shape == ()
    exact = PartialMean(now)
    for value, weight in ((1e20, 1.0), (1.0, 3.0), (-1e20, 1.0)):
        exact.add({"a": np.full(3, value, np.float32)}, weight)
    assert exact.result()["a"].tolist() == pytest.approx([0.6] * 3)


@pytest.mark.parametrize("size", [5, (1 << 14) - 1, 1 << 14, 40_000])
def test_arrays_that_are_added_together_give_the_sums_of_each_alone(size: int) -> None:
    rng = np.random.default_rng(size)
    shapes = {"a": (3,), "b": (), "c": (size,), "d": (2, 0), "e": (7, 5)}
    model = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    updates = [{k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(3)]
    whole, out_of_order = PartialMean(model), PartialMean(model)
    for number, update in enumerate(updates, 1):
        whole.add(update, number)
        out_of_order.add({key: update[key] for key in reversed(update)}, number)
    for key in shapes:
        alone = ExactMean()
        for number, update in enumerate(updates, 1):
            alone.add({key: update[key]}, number)
        expected = alone.result({key: model[key]})[key]
        assert whole.result()[key].tobytes() == out_of_order.result()[key].tobytes() == expected.tobytes()
