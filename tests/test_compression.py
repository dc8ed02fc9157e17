"""Compression as arithmetic: grids, gaps, the largest entries, error feedback; every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import assert_same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedssl import config, tree
from fedssl.compression import Compression, coding, packing
from fedssl.errors import ConfigError, ProtocolError
from fedssl.parts import Arrays

F32 = np.float32
TINY, HUGE = float(np.finfo(F32).smallest_subnormal), float(F32(coding.LARGEST))
FINITE = st.floats(-HUGE, HUGE, width=32) | st.sampled_from([0.0, -0.0, TINY, -TINY, 1e-38, 1.0, HUGE, -HUGE])
VECTOR = arrays(F32, st.integers(0, 40), elements=FINITE)
ARRAY = arrays(F32, array_shapes(min_dims=0, max_dims=3, min_side=0), elements=FINITE)
KINDS, SHARES = st.sampled_from(list(coding.KINDS)), st.sampled_from([None, 0.0, 0.4, 1.0])
OPTIONS = [
    {"values": "float16"},
    {"values": "int8"},
    {"keep": 0.3},
    {"keep": 0.3, "values": "float16"},
    {"keep": 0.2, "values": "int8"},
    {"keep": 0.2, "values": "int8", "scope": "array"},
    {"keep": 0.2, "values": "int8", "error_feedback": False},
    {"values": "int8", "error_feedback": False},
    {"down": "float16"},
]
rng = np.random.default_rng(0)
NOW: Arrays = {
    "b.weight": rng.normal(size=(3, 4)).astype(F32),
    "a.scale": np.array(0.5, F32),
    "a.empty": np.zeros((0, 2), F32),
    "a.half": rng.normal(size=5).astype(np.float16),
    "a.double": rng.normal(size=(2, 2)),
    "b.running_var": np.array([1e-6, 50.0], F32),
    "b.seen": np.array(3),
    "b.mask": np.array([True, False]),
}
PARAMETERS = frozenset({"b.weight", "a.scale", "a.empty", "a.half", "a.double"})


def near(now: Arrays, size: float, seed: int = 1) -> Arrays:
    """Values after training: parameters moved by about `size`, buffers by more."""
    draw = np.random.default_rng(seed)
    moved = {k: now[k] + (size * draw.normal(size=now[k].shape)).astype(now[k].dtype) for k in sorted(PARAMETERS)}
    buffers = {"b.running_var": np.array([1e-7, 80.0], F32), "b.seen": np.array(9), "b.mask": np.array([True, True])}
    return {k: np.asarray(v, now[k].dtype) for k, v in (moved | buffers).items()}


def sent(chosen: Compression, trained: Arrays, now: Arrays, residual: Arrays) -> tuple[Arrays, Arrays]:
    """What reaches the server, and the residual."""
    wire, left = chosen.pack(trained, now, residual, PARAMETERS, np.random.default_rng(7))
    return chosen.unpack(wire, now, "client 0", PARAMETERS), left


# --- numbers


@given(VECTOR)
@settings(deadline=None)
def test_int8_errs_by_half_a_step_and_leaves_an_exact_rest(values: np.ndarray) -> None:
    scale = coding.scale_of(values, "int8")
    codes = coding.to_codes(values, scale, "int8")
    back = coding.from_codes(codes, scale)
    assert codes.dtype == np.int8
    assert back.dtype == F32
    assert np.isfinite(back).all()
    assert (np.abs(back.astype(float) - values) <= 0.5 * float(scale) * (1 + 1e-5)).all()
    assert not values.any() or float(scale) * 127 <= float(np.abs(values).max()) * (1 + 1e-6) + 127 * TINY
    assert ((values - back) + back == values).all(), "what is sent and what is left are the value, exactly"


@given(VECTOR)
@settings(deadline=None)
def test_float16_errs_by_its_last_digit_and_leaves_an_exact_rest(values: np.ndarray) -> None:
    scale = coding.scale_of(values, "float16")
    back = coding.from_codes(coding.to_codes(values, scale, "float16"), scale)
    error, largest = np.abs(back.astype(float) - values), float(np.abs(values).max(initial=0))
    assert (error <= np.maximum(2.0**-11 * np.abs(values.astype(float)), 2.0**-39 * largest)).all()
    assert ((values - back) + back == values).all()
    assert scale == 2.0 ** round(np.log2(float(scale))), "a power of two costs no digit"


def test_grids_by_hand() -> None:
    values = np.array([254, -254, 3, 1, -1, 0], F32)
    assert coding.scale_of(values, "int8") == 2
    assert coding.to_codes(values, F32(2), "int8").tolist() == [127, -127, 2, 0, 0, 0], "ties to the even step"
    assert coding.scale_of(np.array([3.0], F32), "float16") == 2.0**-13, "3 = 0.75 * 2^2, to 0.75 * 2^15"
    assert coding.to_codes(np.array([1e-9, 3e-8], F32), F32(2.0**-39), "float16").tolist()[1] == pytest.approx(16493, 1)
    for kind in coding.KINDS:
        assert coding.scale_of(np.zeros(3, F32), kind) == coding.scale_of(np.zeros(0, F32), kind) == 1


def test_rounding_at_random_has_the_value_as_its_mean() -> None:
    values = np.repeat(np.array([100.0, 0.3, -0.3, -57.9], F32), 20_000)
    scale = coding.scale_of(values, "int8")
    back = coding.from_codes(coding.to_codes(values, scale, "int8", np.random.default_rng(0)), scale)
    assert (np.abs(back - values) <= scale * (1 + 1e-5)).all()
    for part, value in zip(back.reshape(4, -1), values[::20_000], strict=True):
        assert abs(part.mean(dtype=float) - value) < 5 * float(scale) / 2 / np.sqrt(20_000)
    assert (back[20_000:40_000] == 0).any(), "0.3 is below half a step, and still heard"
    assert (back[20_000:40_000] > 0).any()


@given(st.sets(st.integers(0, 5000), max_size=200))
@example(set())
@example({0})
@example({254})
@example({255})
@example({256, 511, 767})
@settings(deadline=None)
def test_gaps_round_trip_within_their_bound(chosen: set[int]) -> None:
    positions = np.array(sorted(chosen), np.int64)
    gaps = coding.to_gaps(positions)
    assert gaps.dtype == np.uint8
    assert np.array_equal(coding.from_gaps(gaps), positions)
    assert len(gaps) <= len(positions) + 5001 // 255


@given(VECTOR, st.integers(0, 45))
@settings(deadline=None)
def test_the_largest_are_those_of_a_stable_sort(values: np.ndarray, count: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-abs(float(values[i])), i))[:count]
    assert coding.largest(values, count).tolist() == sorted(i for i in order if values[i] != 0)


# --- arrays


@given(st.dictionaries(st.sampled_from("abc"), ARRAY), KINDS, SHARES)
@settings(deadline=None)
def test_packed_arrays_come_back(given_arrays: Arrays, kind: str, share: float | None) -> None:
    tensors = {key: np.asarray(given_arrays[key]) for key in sorted(given_arrays)}
    vector = packing.join(tensors)
    positions = None if share is None else coding.largest(vector, round(share * len(vector)))
    wire, arriving = packing.pack(tensors, kind, positions)
    back = packing.unpack(wire, tensors, kind, positions is not None, "client 0")
    assert_same(back, packing.cut(arriving, tensors))
    if kind == "float32" and share is None:
        assert_same(back, tensors)
    left = np.ones(len(vector), bool) if positions is None else np.isin(np.arange(len(vector)), positions)
    assert not arriving[~left].any()
    limit = packing.size_bytes(tensors, kind, None if positions is None else len(positions))
    assert tree.size_bytes(wire) <= limit
    if positions is None:
        assert tree.size_bytes(wire) == limit


def test_a_scale_is_an_arrays_own() -> None:
    tensors = {"a": np.array([1270.0, 5], F32), "b": np.array([0.0127, 0.00005], F32)}
    wire, _ = packing.pack(tensors, "int8", np.array([0, 2, 3]))
    assert wire[packing.SCALES].tolist() == pytest.approx([10, 1e-4])
    assert wire[packing.VALUES].tolist() == [127, 127, 0]
    assert wire[packing.GAPS].tolist() == [0, 1, 0]


def test_foreign_and_damaged_packets_are_refused() -> None:
    model = {"a": np.zeros(600, F32), "b": np.zeros((2, 2), F32)}
    wire, _ = packing.pack({"a": np.ones(600, F32), "b": np.eye(2, dtype=F32)}, "int8", np.array([1, 599, 600, 603]))
    assert packing.unpack(wire, model, "int8", True, "client 3")["b"].tolist() == [[1, 0], [0, 1]]
    spoilt: list[Any] = [
        {packing.GAPS: np.array([1, 255, 255, 87, 0, 3], np.uint8)},  # beyond the end
        {packing.GAPS: wire[packing.GAPS][:-1]},
        {packing.GAPS: wire[packing.GAPS].astype(np.int64)},
        {packing.VALUES: wire[packing.VALUES][:-1]},
        {packing.VALUES: wire[packing.VALUES].astype(F32)},
        {packing.VALUES: wire[packing.VALUES].reshape(2, 2)},
        {packing.SCALES: np.ones(3, F32)},
        {packing.LAYOUT: np.zeros(8, np.uint8)},
    ]
    for spoil in spoilt:
        with pytest.raises(ProtocolError, match="client 3 packed other arrays"):
            packing.unpack(wire | spoil, model, "int8", True, "client 3")
    for name in wire:
        with pytest.raises(ProtocolError, match="client 3"):
            packing.unpack({k: v for k, v in wire.items() if k != name}, model, "int8", True, "client 3")
    for other in (
        {"a": np.zeros(600, F32), "c": np.zeros((2, 2), F32)},
        {"a": np.zeros(600, F32), "b": np.zeros(4, F32)},
    ):
        with pytest.raises(ProtocolError, match="client 3"):
            packing.unpack(wire, other, "int8", True, "client 3")
    with pytest.raises(ProtocolError):
        packing.unpack(wire, model, "int8", False, "client 3")


# --- updates


def test_without_compression_the_very_arrays_travel() -> None:
    trained = near(NOW, 0.1)
    for chosen in (Compression(), config.compose([]).job.compression):
        wire, left = chosen.pack(trained, NOW, {}, PARAMETERS, rng)
        assert wire is trained
        assert left == {}
        assert chosen.unpack(wire, NOW, "", PARAMETERS) is wire
        assert chosen.pack_down(NOW, PARAMETERS) is NOW
        assert chosen.unpack_down(NOW, NOW, PARAMETERS) is NOW
        assert not chosen.remembers


def test_an_update_by_hand() -> None:
    now = {"a.w": np.array([1, 2, 3, 4], F32), "b.w": np.array([10, 20], F32), "b.n": np.array(7)}
    trained = {"a.w": np.array([1, 4, 3.25, 4], F32), "b.w": np.array([10.5, 12], F32), "b.n": np.array(8)}
    half = Compression(keep=0.5)
    wire, left = half.pack(trained, now, {}, {"a.w", "b.w"}, rng)
    assert wire[packing.VALUES].tolist() == [2, 0.5, -8]
    assert wire[packing.GAPS].tolist() == [1, 2, 0]
    assert wire["b.n"] == 8
    assert {k: v.tolist() for k, v in left.items()} == {"a.w": [0, 0, 0.25, 0], "b.w": [0, 0]}
    back = half.unpack(wire, now, "", {"a.w", "b.w"})
    assert {k: v.tolist() for k, v in back.items()} == {"a.w": [1, 4, 3, 4], "b.w": [10.5, 12], "b.n": 8}
    wire, left = half.pack(now, now, left, {"a.w", "b.w"}, rng)
    assert wire[packing.VALUES].tolist() == [0.25], "what was left is sent later"
    assert not any(v.any() for v in left.values())
    each = Compression(keep=0.5, scope="array").pack(trained, now, {}, {"a.w", "b.w"}, rng)[0]
    assert each[packing.VALUES].tolist() == [2, 0.25, -8], "half of each array"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-30])
def test_an_update_arrives_near_and_fits(options: dict[str, Any], size: float) -> None:
    chosen, trained = Compression(**options), near(NOW, size)
    wire, left = chosen.pack(trained, NOW, {}, PARAMETERS, np.random.default_rng(7))
    back = chosen.unpack(wire, NOW, "client 0", PARAMETERS)
    tree.check_same(back, NOW, "client 0")
    for key in NOW:
        assert back[key].dtype == NOW[key].dtype
    for key in NOW.keys() - PARAMETERS:
        assert back[key].tobytes() == trained[key].tobytes(), "buffers are not coded"
    assert tree.size_bytes(wire) <= chosen.up_bytes(NOW, PARAMETERS)
    if chosen.keep == 1:
        assert tree.size_bytes(wire) == chosen.up_bytes(NOW, PARAMETERS)
        step = float(np.abs(trained["b.weight"] - NOW["b.weight"]).max()) / (100 if chosen.values == "int8" else 1000)
        assert np.abs(back["b.weight"] - trained["b.weight"]).max() <= max(step, 4e-7)
    assert set(left) == (PARAMETERS if chosen.remembers else set())


@pytest.mark.parametrize("options", [o for o in OPTIONS if Compression(**o).remembers], ids=str)
def test_what_is_sent_and_what_is_left_add_up(options: dict[str, Any]) -> None:
    chosen, zero = Compression(**options), {"w": np.zeros(200, F32)}
    left: Arrays = {}
    total, arrived = np.zeros(200), np.zeros(200)
    for at in range(30):
        change = np.random.default_rng(at).normal(size=200).astype(F32)
        before = left.get("w", F32(0))
        wire, left = chosen.pack({"w": change}, zero, left, {"w"}, rng)
        back = chosen.unpack(wire, zero, "", {"w"})["w"]
        assert (back + left["w"] == change + before).all(), "exactly, in float32"
        total, arrived = total + change, arrived + back
    assert np.abs(total - arrived - left["w"]).max() < 1e-4, "over the rounds nothing is lost"
    assert np.abs(arrived).max() > 3


def test_a_fixed_point_stays_to_the_sign_of_a_zero() -> None:
    now = NOW | {"b.weight": np.array([-0.0, 0.0, 1e-42], F32)}
    for options in OPTIONS:
        back, left = sent(Compression(**options), now, now, {})
        assert_same({k: back[k] for k in sorted(now)}, {k: now[k] for k in sorted(now)})
        assert not any(value.any() for value in left.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_a_number_is_refused_by_name(bad: float) -> None:
    trained = near(NOW, 0.1)
    trained["b.weight"][1, 2] = bad
    for options in OPTIONS:
        with pytest.raises(ProtocolError, match=r"'b.weight' has values that are not finite"):
            Compression(**options).pack(trained, NOW, {}, PARAMETERS, rng)


def test_arrays_that_a_client_lacks_are_no_part_of_the_packet() -> None:
    chosen, trained = Compression(keep=0.5, values="int8"), near(NOW, 0.1)
    fewer, asked = ({k: v for k, v in some.items() if not k.startswith("b.")} for some in (trained, NOW))
    back, left = sent(chosen, fewer, asked, {})
    assert back.keys() == asked.keys()
    assert left.keys() == asked.keys() & PARAMETERS
    wire, _ = chosen.pack(fewer, asked, {}, PARAMETERS, rng)
    with pytest.raises(ProtocolError, match="client 0"):
        chosen.unpack(wire, NOW, "client 0", PARAMETERS)


def test_the_way_down_keeps_three_digits() -> None:
    chosen = Compression(down="float16")
    wire = chosen.pack_down(NOW, PARAMETERS)
    assert tree.size_bytes(wire) == chosen.down_bytes(NOW, PARAMETERS) < tree.size_bytes(NOW)
    back = chosen.unpack_down(wire, NOW, PARAMETERS)
    tree.check_same(back, NOW, "")
    for key, value in NOW.items():
        assert back[key].dtype == value.dtype
        assert np.allclose(back[key].astype(float), value.astype(float), rtol=2**-10, atol=0)
        assert key in PARAMETERS or back[key].tobytes() == value.tobytes()
    with pytest.raises(ProtocolError, match="the server packed"):
        chosen.unpack_down(wire, {k: v for k, v in NOW.items() if k != "a.scale"}, PARAMETERS)


def test_options_that_make_no_sense() -> None:
    for options, said in (
        ({"keep": 0.0}, "compression.keep=0.0 is a share"),
        ({"keep": 1.5}, "in \\(0, 1\\]"),
        ({"values": "int4"}, "use float32 or float16 or int8"),
        ({"scope": "layer"}, "use model or array"),
        ({"down": "int8"}, "use float32 or float16"),
    ):
        with pytest.raises(ConfigError, match=said):
            Compression(**options)  # type: ignore[arg-type]
