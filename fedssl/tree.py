"""Arithmetic on dictionaries of arrays, and a weighted mean that does not depend on the order of its terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedssl.errors import ProtocolError
from fedssl.parts import Arrays

_CHUNK = 1 << 15  # elements a pass: five float64 work arrays of this size stay in the second-level cache


def size_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of the values of all arrays."""
    return sum(value.nbytes for value in arrays.values())


def squared_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Sum of squared differences over all floating arrays of `a`, in float64."""
    total = 0.0
    for key, value in a.items():
        if np.issubdtype(value.dtype, np.floating):
            difference = value.astype(np.float64).ravel() - b[key].astype(np.float64).ravel()
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
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ProtocolError(
                f"{who} sent {key!r} with values that are not finite: its training diverged; lower local.lr"
            )


def _total(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    total = high + low
    return np.where(low == 0, high, total)  # -0.0 stays -0.0


class ExactMean:
    """A running weighted mean over float arrays in O(model) memory, independent of the order of arrival.

    Each coordinate keeps an unevaluated sum of two float64 (Knuth's TwoSum). A float32 value times a whole weight
    below 2**29 is exact in float64, and the pair is exact as long as the terms of one coordinate span less than about
    2**70; then the result is the correctly rounded sum, whatever the order, and equal values give exactly that value
    back. Weights of networks span far less; beyond it (1e30 beside 1e-30) the order can show.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._high: Arrays = {}
        self._low: Arrays = {}

    def add(self, arrays: Mapping[str, np.ndarray], weight: float) -> None:
        """Add `weight` times the arrays. The arrays are only read and can be freed afterwards.

        Raises:
            ProtocolError: the weight is not positive and finite.
        """
        if not (np.isfinite(weight) and weight > 0):
            raise ProtocolError(
                f"an update has weight {weight}: weights must be positive, so a client needs an example"
            )
        if not self.count:
            self._high = {key: np.full(value.size, -0.0) for key, value in arrays.items()}
            self._low = {key: np.zeros(value.size) for key, value in arrays.items()}
        if {k: v.size for k, v in arrays.items()} != {k: v.size for k, v in self._high.items()}:
            raise ProtocolError("an update has other arrays than the one before: clients disagree on the model")
        for key, value in arrays.items():
            high, low, flat = self._high[key], self._low[key], value.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                a, b = high[part], flat[part].astype(np.float64)
                b *= weight
                total = a + b
                shadow = total - a  # what of b arrived in the total
                a -= total - shadow  # error of a
                b -= shadow  # error of b
                low[part] += a + b
                high[part] = total
        self.weight += weight
        self.count += 1

    def result(self, model: Mapping[str, np.ndarray]) -> Arrays:
        """The mean, with the shapes and types of `model`.

        Raises:
            ProtocolError: nothing was added.
        """
        if not self.count:
            raise ProtocolError("no client sent an update this round: there is nothing to merge")
        mean = {
            key: (_total(self._high[key], self._low[key]) / self.weight).reshape(model[key].shape) for key in self._high
        }
        return like(mean, model)


class PartialMean:
    """A running weighted mean over updates that may lack arrays: each array over the updates that have it.

    An array that no update has keeps its present value: a client that could not train it has no say in it. Each array
    is an `ExactMean` of its own, so with updates that lack nothing the result is that of one over the whole.

    Args:
        now: the present values of all arrays that an update may have.
    """

    def __init__(self, now: Mapping[str, np.ndarray]) -> None:
        self.weight = 0.0  # of all updates
        self.count = 0
        self._now = now
        self._means: dict[str, ExactMean] = {}

    def add(self, arrays: Mapping[str, np.ndarray], weight: float) -> None:
        """Add an update, as `ExactMean.add`.

        Raises:
            ProtocolError: the weight is not positive and finite, or an array is unknown or of another size.
        """
        unknown = sorted(arrays.keys() - self._now.keys())
        if unknown:
            raise ProtocolError(f"an update has an array {unknown[0]!r} that is not of this model: it is refused")
        for key, value in arrays.items():
            self._means.setdefault(key, ExactMean()).add({key: value}, weight)
        self.weight += weight
        self.count += 1

    def result(self) -> Arrays:
        """The mean, with the names, shapes and types of `now`.

        Raises:
            ProtocolError: nothing was added.
        """
        if not self.count:
            raise ProtocolError("no client sent an update this round: there is nothing to merge")
        means = {key: mean.result({key: self._now[key]})[key] for key, mean in self._means.items()}
        return {key: means[key] if key in means else value.copy() for key, value in self._now.items()}


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, as ("a.b.c", value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
