"""Arithmetic on dictionaries of arrays, and a weighted mean that does not depend on the order of its terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from fedssl.errors import ProtocolError
from fedssl.parts import Arrays

_CHUNK = 1 << 14  # elements a pass: five float64 work arrays of this size stay in the second-level cache


def size_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of the values of all arrays."""
    return sum(value.nbytes for value in arrays.values())


def squared_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Sum of squared differences over all floating arrays of `a`, in float64."""
    total = 0.0
    for key, value in a.items():
        if value.dtype.kind == "f":
            difference = np.subtract(value, b[key], dtype=np.float64).ravel()
            difference *= difference
            total += float(difference.sum())  # not a BLAS product, whose last bit depends on where the array lies
    return total


def like(arrays: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray]) -> Arrays:
    """Give arrays the types of `model`; integers and booleans are rounded to the nearest value."""
    out: Arrays = {}
    for key, value in arrays.items():
        kind = model[key].dtype
        if kind != value.dtype and not np.issubdtype(kind, np.floating):
            value = np.rint(value)
        out[key] = np.asarray(value).astype(kind, copy=False)
    return out


def check_same(arrays: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray], who: str) -> None:
    """Raise a ProtocolError unless both have the same names and shapes and every floating value is finite."""
    if arrays.keys() != model.keys():
        odd = sorted(arrays.keys() ^ model.keys())
        raise ProtocolError(
            f"{who} sent other arrays than it was asked for (first difference: {odd[0]!r}): "
            "it runs another method, encoder or version"
        )
    for key, value in arrays.items():
        if value.shape != model[key].shape:
            raise ProtocolError(f"{who} sent {key!r} with shape {value.shape}, not {model[key].shape}: it is refused")
        if value.dtype.kind not in "biuf":
            raise ProtocolError(f"{who} sent {key!r} of type {value.dtype}, which is not a number: it is refused")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ProtocolError(
                f"{who} sent {key!r} with values that are not finite: its training diverged; lower local.lr"
            )


class _Sums:
    """Sums of named arrays, laid end to end: each an unevaluated sum of two float64 (Knuth's TwoSum), or of one.

    Args:
        sizes: of the arrays, by name.
        exact: whether there are two.
    """

    def __init__(self, sizes: Mapping[str, int], exact: bool = True) -> None:
        self.sizes = dict(sizes)
        ends = np.cumsum([0, *self.sizes.values()]).tolist()
        self._begins = dict(zip(self.sizes, ends, strict=False))
        self._exact, self._high, self._low = exact, np.full(ends[-1], -0.0), np.zeros(ends[-1] if exact else 0)
        self._scratch = np.empty((3, min(_CHUNK, ends[-1])))

    def add(self, arrays: Mapping[str, np.ndarray], weight: float) -> None:
        """Add `weight` times some of the arrays; neighbours are added at once, however small they are."""
        term, begun, filled = self._scratch[0], 0, 0
        for key, value in arrays.items():
            begin, flat = self._begins[key], value.reshape(-1)
            if begin != begun + filled:
                self._fold(begun, filled, weight)
                begun, filled = begin, 0
            done = 0
            while done < flat.size:
                count = min(flat.size - done, len(term) - filled)
                term[filled : filled + count] = flat[done : done + count]
                done, filled = done + count, filled + count
                if filled == len(term):
                    self._fold(begun, filled, weight)
                    begun, filled = begun + filled, 0
        self._fold(begun, filled, weight)

    def _fold(self, begin: int, count: int, weight: float) -> None:
        high, low = self._high[begin : begin + count], self._low[begin : begin + count]
        term, total, shadow = self._scratch[:, :count]
        term *= weight
        if not self._exact:
            high += term
            return
        np.add(high, term, out=total)
        np.subtract(total, high, out=shadow)  # what of the term arrived in the total
        term -= shadow  # error of the term
        np.subtract(total, shadow, out=shadow)
        np.subtract(high, shadow, out=shadow)  # error of the sum so far
        shadow += term
        low += shadow
        high[:] = total

    def total(self, key: str) -> np.ndarray:
        """The sum of an array, flat."""
        part = slice(self._begins[key], self._begins[key] + self.sizes[key])
        high, low = self._high[part], self._low[part]
        if not self._exact:
            return high
        return np.where(low == 0, high, high + low)  # -0.0 stays -0.0


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ProtocolError(f"an update has weight {weight}: weights must be positive, so a client needs an example")


class ExactMean:
    """A running weighted mean over float arrays in O(model) memory, independent of the order of arrival.

    Each coordinate keeps an unevaluated sum of two float64. A float32 value times a whole weight
    below 2**29 is exact in float64, and the pair is exact as long as the terms of one coordinate span less than about
    2**70; then the result is the correctly rounded sum, whatever the order, and equal values give exactly that value
    back. Weights of networks span far less; beyond it (1e30 beside 1e-30) the order can show.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._sums = _Sums({})

    def add(self, arrays: Mapping[str, np.ndarray], weight: float) -> None:
        """Add `weight` times the arrays. The arrays are only read and can be freed afterwards.

        Raises:
            ProtocolError: the weight is not positive and finite.
        """
        _check_weight(weight)
        sizes = {key: value.size for key, value in arrays.items()}
        if not self.count:
            self._sums = _Sums(sizes)
        if sizes != self._sums.sizes:
            raise ProtocolError("an update has other arrays than the one before: clients disagree on the model")
        self._sums.add(arrays, weight)
        self.weight += weight
        self.count += 1

    def result(self, model: Mapping[str, np.ndarray]) -> Arrays:
        """The mean, with the shapes and types of `model`.

        Raises:
            ProtocolError: nothing was added.
        """
        if not self.count:
            raise ProtocolError("no client sent an update this round: there is nothing to merge")
        mean = {key: (self._sums.total(key) / self.weight).reshape(model[key].shape) for key in self._sums.sizes}
        return like(mean, model)


class PartialMean:
    """A running weighted mean over updates that may lack arrays: each array over the updates that have it.

    An array that no update has keeps its present value: a client that could not train it has no say in it. Each array
    is summed as by an `ExactMean` of its own, so with updates that lack nothing the result is that of one over the
    whole.

    Args:
        now: the present values of all arrays that an update may have.
        exact: False sums in plain float64, in half of the memory and less than half of the time; the order of arrival
            then shows in the last bits of float64.
    """

    def __init__(self, now: Mapping[str, np.ndarray], exact: bool = True) -> None:
        self.weight = 0.0  # of all updates
        self.count = 0
        self._now = now
        self._weights: dict[str, float] = {}
        self._sums = _Sums({key: value.size for key, value in now.items()}, exact)

    def add(self, arrays: Mapping[str, np.ndarray], weight: float) -> None:
        """Add an update, as `ExactMean.add`.

        Raises:
            ProtocolError: the weight is not positive and finite, or an array is unknown or of another size.
        """
        _check_weight(weight)
        unknown = sorted(arrays.keys() - self._now.keys())
        if unknown:
            raise ProtocolError(f"an update has an array {unknown[0]!r} that is not of this model: it is refused")
        if any(value.size != self._sums.sizes[key] for key, value in arrays.items()):
            raise ProtocolError("an update has other arrays than the one before: clients disagree on the model")
        self._sums.add(arrays, weight)
        for key in arrays:
            self._weights[key] = self._weights.get(key, 0.0) + weight
        self.weight += weight
        self.count += 1

    def result(self) -> Arrays:
        """The mean, with the names, shapes and types of `now`.

        Raises:
            ProtocolError: nothing was added.
        """
        if not self.count:
            raise ProtocolError("no client sent an update this round: there is nothing to merge")
        means = {
            key: (self._sums.total(key) / weight).reshape(self._now[key].shape) for key, weight in self._weights.items()
        }
        means = like(means, self._now)
        return {key: means[key] if key in means else value.copy() for key, value in self._now.items()}


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, as ("a.b.c", value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
