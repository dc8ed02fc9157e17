"""What of an update goes over the wire: the largest entries, in few bits, the rest remembered for the next round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedssl import tree
from fedssl.compression import coding, packing
from fedssl.errors import ConfigError, ProtocolError
from fedssl.parts import Arrays


@dataclass(frozen=True)
class Compression:
    """Lossy coding of what a client's training changed, relative to what the client received.

    All parameters, in order of their names, are one vector. Its `keep` largest entries are sent as `values` with one
    scale an array. Buffers travel as they are: a running variance must not become negative by rounding. The server adds
    what arrives to its present values before any strategy sees it. With the defaults nothing is coded: trained values
    travel, bit for bit.

    With error feedback (Seide et al. 2014; Stich et al. 2018, https://arxiv.org/abs/1809.07599) a client adds what was
    not sent to its next update: sent + residual is the update, exactly in float32. The residual is state of the client.
    Without, nothing is remembered, and int8 rounds at random so that its error has the mean 0 (Alistarh et al. 2017,
    https://arxiv.org/abs/1610.02132).

    Attributes:
        keep: share of the floating entries that is sent, in (0, 1].
        scope: where the largest are sought: in the whole model, or in each array.
        values: float32, float16 or int8.
        error_feedback: whether what is not sent is remembered.
        down: float32, or float16 for what the server sends; it keeps its own values in full.
    """

    keep: float = 1.0
    scope: str = "model"
    values: str = "float32"
    error_feedback: bool = True
    down: str = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"compression.keep={self.keep} is a share of the entries: give a number in (0, 1]")
        for name, value, allowed in (
            ("scope", self.scope, ("model", "array")),
            ("values", self.values, tuple(coding.KINDS)),
            ("down", self.down, ("float32", "float16")),
        ):
            if value not in allowed:
                raise ConfigError(f"compression.{name}={value} is unknown: use {' or '.join(allowed)}")

    @property
    def lossless(self) -> bool:
        """Whether an update arrives as it was sent off."""
        return self.keep == 1 and self.values == "float32"

    @property
    def untouched(self) -> bool:
        """Whether trained values travel as they are: without rounding of either way there is no need of a change."""
        return self.lossless and self.down == "float32"

    @property
    def remembers(self) -> bool:
        """Whether clients keep a residual."""
        return self.error_feedback and not self.lossless

    def pack(
        self,
        trained: Arrays,
        now: Mapping[str, np.ndarray],
        residual: Arrays,
        parameters: Collection[str],
        rng: np.random.Generator,
    ) -> tuple[Arrays, Arrays]:
        """On the client: what to send, and the residual to keep.

        Args:
            trained: what the client has to say.
            now: the values that it received.
            residual: of its last round; empty at its first.
            parameters: the names of the model's parameters.
            rng: only drawn from without error feedback.

        Raises:
            ProtocolError: a change is not finite, or larger than half of float32's range.
        """
        if self.untouched:
            return trained, {}
        changes = {k: _change(value, now[k], residual.get(k)) for k, value in _coded(trained, parameters).items()}
        for key, change in changes.items():
            if not (np.abs(change) <= coding.LARGEST).all():
                raise ProtocolError(
                    f"the update of {key!r} has values that are not finite, or too large for float32: the training "
                    "diverged; lower local.lr"
                )
        rounding = None if self.error_feedback else rng
        packed, arriving = packing.pack(changes, self.values, self._positions(changes), rounding)
        left = packing.cut(packing.join(changes) - arriving, changes) if self.remembers else {}
        return _others(trained, changes) | packed, left

    def unpack(self, wire: Arrays, now: Mapping[str, np.ndarray], who: str, parameters: Collection[str]) -> Arrays:
        """On the server: a client's trained values as far as they have arrived.

        Args:
            wire: what came.
            now: the arrays that the client was asked for, in the server's full precision.
            who: sent it, for the message of a refusal.
            parameters: the names of the model's parameters.

        Raises:
            ProtocolError: the update is not one of these arrays under these options.
        """
        if self.untouched:
            return wire
        changes = packing.unpack(wire, _coded(now, parameters), self.values, self.keep < 1, who)
        return packing.unpacked(wire) | {key: _moved(now[key], change) for key, change in changes.items()}

    def pack_down(self, now: Arrays, parameters: Collection[str]) -> Arrays:
        """On the server: what an instruction carries."""
        if self.down == "float32":
            return now
        coded = {key: value.astype(np.float32, copy=False) for key, value in _coded(now, parameters).items()}
        return _others(now, coded) | packing.pack(coded, self.down)[0]

    def unpack_down(self, wire: Arrays, model: Mapping[str, np.ndarray], parameters: Collection[str]) -> Arrays:
        """On the client: the values to start from, with the shapes and types of `model`.

        Raises:
            ProtocolError: what came is not this model.
        """
        if self.down == "float32":
            return wire
        values = packing.unpack(wire, _coded(model, parameters), self.down, False, "the server")
        return packing.unpacked(wire) | tree.like(values, model)

    def up_bytes(self, model: Mapping[str, np.ndarray], parameters: Collection[str]) -> int:
        """Bytes of an update of these arrays; where entries are left out, at most."""
        if self.untouched:
            return tree.size_bytes(model)
        coded = _coded(model, parameters)
        sizes = [value.size for value in coded.values()]
        kept = sum(map(self._count, sizes if self.scope == "array" else [sum(sizes)]))
        packed = packing.size_bytes(coded, self.values, kept if self.keep < 1 else None)
        return tree.size_bytes(_others(model, coded)) + packed

    def down_bytes(self, model: Mapping[str, np.ndarray], parameters: Collection[str]) -> int:
        """Bytes of an instruction's arrays."""
        if self.down == "float32":
            return tree.size_bytes(model)
        coded = _coded(model, parameters)
        return tree.size_bytes(_others(model, coded)) + packing.size_bytes(coded, self.down)

    def _count(self, size: int) -> int:
        return min(size, ceil(self.keep * size))

    def _positions(self, changes: Arrays) -> np.ndarray | None:
        """Which entries are sent; None for all."""
        if self.keep == 1:
            return None
        if self.scope == "model":
            vector = packing.join(changes)
            return coding.largest(vector, self._count(len(vector)))
        found, start = [np.zeros(0, np.int64)], 0
        for change in changes.values():
            found.append(start + coding.largest(change.reshape(-1), self._count(change.size)))
            start += change.size
        return np.concatenate(found)


def _coded(arrays: Mapping[str, np.ndarray], parameters: Collection[str]) -> Arrays:
    """The arrays that are packed, in the order that both ends agree on."""
    names = sorted(key for key, value in arrays.items() if np.issubdtype(value.dtype, np.floating))
    return {key: arrays[key] for key in names if key in parameters}


def _others(arrays: Mapping[str, np.ndarray], coded: Collection[str]) -> Arrays:
    """The arrays that travel as they are."""
    return {key: value for key, value in arrays.items() if key not in coded}


def _change(trained: np.ndarray, now: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    kind = np.promote_types(trained.dtype, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
        change = (trained.astype(kind, copy=False) - now.astype(kind, copy=False)).astype(np.float32, copy=False)
        return np.asarray(change if residual is None else change + residual)


def _moved(now: np.ndarray, change: np.ndarray) -> np.ndarray:
    """now + change in the type of `now`; where nothing changed it stays as it is, to the sign of a zero."""
    kind = np.promote_types(now.dtype, np.float32)
    moved = now.astype(kind, copy=False) + change
    return np.asarray(np.where(change == 0, now, moved), now.dtype)
