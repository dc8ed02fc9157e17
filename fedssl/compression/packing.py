"""Many arrays as one vector of few bytes: one header on the wire instead of one an array.

The vector is sent whole or at some positions, as codes with a scale an array; a digest of the names and shapes in their
order goes with it, so that both ends mean the same by a position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from fedssl.compression import coding
from fedssl.errors import ProtocolError
from fedssl.parts import Arrays

VALUES, SCALES, GAPS, LAYOUT = "packed/values", "packed/scales", "packed/gaps", "packed/layout"


def join(arrays: Arrays) -> np.ndarray:
    """All arrays, in the order given, as one (n,) float32 vector."""
    return np.concatenate([np.zeros(0, np.float32), *(value.reshape(-1) for value in arrays.values())])


def cut(vector: np.ndarray, like: Mapping[str, np.ndarray]) -> Arrays:
    """A vector as arrays of these names and shapes; copies, so that each can outlive the vector."""
    pieces = zip(like.items(), pairwise(_bounds(like)), strict=True)
    return {key: vector[start:end].reshape(value.shape).copy() for (key, value), (start, end) in pieces}


def pack(
    arrays: Arrays, kind: str, positions: np.ndarray | None = None, rng: np.random.Generator | None = None
) -> tuple[Arrays, np.ndarray]:
    """Pack float32 arrays.

    Args:
        arrays: finite values.
        kind: float32, float16 or int8.
        positions: what is sent of their vector, increasing; None for all of it.
        rng: for rounding at random; see `coding.to_codes`.

    Returns:
        The arrays for the wire, and the (n,) float32 vector that the receiver will get from them.
    """
    vector, bounds = join(arrays), _bounds(arrays)
    kept = vector if positions is None else vector[positions]
    wire = {VALUES: kept, LAYOUT: _layout(arrays)}
    if kind != "float32":
        pieces = [kept[start:end] for start, end in pairwise(_within(bounds, positions))]
        scales = [coding.scale_of(piece, kind) for piece in pieces]
        codes = [coding.to_codes(piece, scale, kind, rng) for piece, scale in zip(pieces, scales, strict=True)]
        wire[VALUES] = np.concatenate([np.zeros(0, coding.KINDS[kind]), *codes])
        wire[SCALES] = np.array(scales, np.float32)
    if positions is not None:
        wire[GAPS] = coding.to_gaps(positions)
    return wire, _vector(wire, bounds, positions)


def unpack(wire: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray], kind: str, sparse: bool, who: str) -> Arrays:
    """What `pack` made of float32 arrays with these names and shapes, after a check of every type and size.

    Raises:
        ProtocolError: it is not these arrays, or not packed as `kind` and `sparse` say.
    """
    bounds = _bounds(like)
    kinds = {VALUES: coding.KINDS[kind], LAYOUT: np.uint8}
    kinds |= ({SCALES: np.float32} if kind != "float32" else {}) | ({GAPS: np.uint8} if sparse else {})
    packed = {key: value for key, value in wire.items() if key in (VALUES, SCALES, GAPS, LAYOUT)}
    sound = {key: value.dtype for key, value in packed.items()} == kinds and all(v.ndim == 1 for v in packed.values())
    positions = coding.from_gaps(packed[GAPS]) if sound and sparse else None
    if sound:
        count = bounds[-1] if positions is None else len(positions)
        inside = positions is None or not len(positions) or positions[-1] < bounds[-1]
        scaled = SCALES not in kinds or len(packed[SCALES]) == len(like)
        sound = len(packed[VALUES]) == count and inside and scaled
    if not sound or not np.array_equal(packed[LAYOUT], _layout(like)):
        raise ProtocolError(
            f"{who} packed other arrays than it was asked for, or packed them in another way: it runs another method, "
            "encoder, compression or version"
        )
    return cut(_vector(packed, bounds, positions), like)


def unpacked(wire: Arrays) -> Arrays:
    """The arrays beside the packed ones."""
    return {key: value for key, value in wire.items() if key not in (VALUES, SCALES, GAPS, LAYOUT)}


def size_bytes(like: Mapping[str, np.ndarray], kind: str, count: int | None = None) -> int:
    """Bytes of arrays like these once packed; with `count` positions, at most."""
    size = sum(value.size for value in like.values())
    scales = 0 if kind == "float32" else 4 * len(like)
    gaps = 0 if count is None else count + size // 255
    kept = size if count is None else count
    return kept * np.dtype(coding.KINDS[kind]).itemsize + scales + gaps + len(_layout({}))


def _bounds(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where each array begins in the vector of all, and where the last one ends."""
    return np.cumsum([0, *(value.size for value in arrays.values())], dtype=np.int64)


def _within(bounds: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    """The same bounds among the entries that are sent."""
    return bounds if positions is None else np.searchsorted(positions, bounds)


def _vector(wire: Mapping[str, np.ndarray], bounds: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    """The vector that was packed, with zeros where nothing was sent."""
    values = wire[VALUES]
    if SCALES in wire:
        values = coding.from_codes(values, np.repeat(wire[SCALES], np.diff(_within(bounds, positions))))
    if positions is None:
        return values
    vector = np.zeros(bounds[-1], np.float32)
    vector[positions] = values
    return vector


def _layout(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(8,) uint8 that differ for other names or shapes."""
    text = repr([(name, tuple(map(int, value.shape))) for name, value in arrays.items()])
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8)
