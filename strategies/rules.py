"""The arithmetic of the federated rules: pure functions of arrays, each with the paper's equation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedssl import tree
from fedssl.errors import ProtocolError
from fedssl.parts import Arrays, part_of
from fedssl.tree import ExactMean


def of_parts(arrays: Mapping[str, np.ndarray], parts: Collection[str]) -> Arrays:
    """The arrays that belong to these parts."""
    return {key: value for key, value in arrays.items() if part_of(key) in parts}


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """`||a - b||_2` over all floating arrays of `a`, as one vector."""
    return math.sqrt(tree.squared_distance(a, b))


def mean_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """The mean over arrays of `||a_l - b_l||_2`; 0 without arrays. The released codes of FedU and FedEMA use it."""
    each = [distance({key: value}, b) for key, value in a.items()]
    return sum(each) / len(each) if each else 0.0


def blend(now: Mapping[str, np.ndarray], mine: Mapping[str, np.ndarray], share: float) -> Arrays:
    """`share * mine + (1 - share) * now`, for the arrays of `mine`; counters are the server's.

    Computed in float64 and rounded once, so that a share of 0 or 1 gives exactly one of the two.
    """
    out: Arrays = {}
    for key, own in mine.items():
        if np.issubdtype(own.dtype, np.floating):
            mixed = share * own.astype(np.float64) + (1.0 - share) * now[key].astype(np.float64)
            out[key] = mixed.astype(own.dtype)
        else:
            out[key] = now[key]
    return out


def fedema_share(divergence: float, scale: float, cap: float) -> float:
    """`mu = min(lambda_k * ||theta_g - theta_k||, cap)` (Zhuang et al. 2022, equation 5), how much a client keeps."""
    return min(scale * divergence, cap)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of the angle between two arrays as vectors, in float64; 1 where either is 0 and none is defined."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return min(1.0, float((x * y).sum()) / norms) if norms > 0 else 1.0


def weighted_mean(arrays: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> Arrays:
    """`sum_k w_k a_k / sum_k w_k`, with the shapes and types of the first; counters are rounded."""
    mean = ExactMean()
    for one, weight in zip(arrays, weights, strict=True):
        mean.add(one, weight)
    return mean.result(arrays[0])


def layerwise(now: Arrays, arrays: Sequence[Arrays], weights: Sequence[float], normalise: bool) -> Arrays:
    """L-DAWA: `w_l <- sum_k c_k delta_kl w_kl` with `delta_kl = cos(w_kl, now_l)` and weights c that sum to 1.

    The deltas are below 1, so the norm of every array shrinks with each round; with `normalise` they are divided by
    their weighted mean, which makes the sum convex again. Counters are averaged without a delta.

    References:
        Rehman et al. 2023, https://arxiv.org/abs/2307.07393, equations 3 and 4
    """
    total = sum(weights)
    out: Arrays = {}
    for key, value in now.items():
        each = [one[key] for one in arrays]
        if not np.issubdtype(value.dtype, np.floating):
            out[key] = weighted_mean([{key: one} for one in each], weights)[key]
            continue
        factors = [w / total * cosine(one, value) for w, one in zip(weights, each, strict=True)]
        scale = sum(factors) if normalise else 1.0
        if scale == 0.0:
            raise ProtocolError(
                f"the clients' {key!r} are orthogonal to the server's, so L-DAWA has nothing to normalise by: "
                "use strategy.normalise=false, or strategy=fedavg"
            )
        merged = sum(f / scale * one.astype(np.float64) for f, one in zip(factors, each, strict=True))
        out[key] = np.asarray(merged).astype(value.dtype).reshape(value.shape)
    return out


def loss_weights(losses: Sequence[float]) -> list[float]:
    """`e^{-l_k} / sum_j e^{-l_j}` (Rehman et al. 2022, FedVSSL, equation 3); they do not overflow."""
    lowest = min(losses)
    raw = [math.exp(lowest - loss) for loss in losses]
    return [value / sum(raw) for value in raw]


def others_mean(mean: np.ndarray, clients: int, own: np.ndarray | None) -> tuple[np.ndarray, int]:
    """`(sum_j C_j - C_k) / (K - 1)` from the mean of K clients' matrices, and over how many clients it is.

    Without an own one, because this client was not among the K, it is the mean as it is; where it was the only one,
    zero over none.

    References:
        Jing et al. 2024 (FedSC), https://arxiv.org/abs/2405.03949, R_ext
    """
    if own is None or clients == 0:
        return mean, clients
    if clients == 1:
        return np.zeros_like(mean), 0
    rest = (clients * mean.astype(np.float64) - own.astype(np.float64)) / (clients - 1)
    return rest.astype(mean.dtype), clients - 1


def inverse_weight(divergence: float, floor: float) -> float:
    """`1 / max(divergence, floor)`, proportional to it and whole, so that a mean does not depend on the order."""
    return float(round(2**20 / max(divergence, floor)))


def refreshed_rows(old: np.ndarray, new: np.ndarray, momentum: float) -> np.ndarray:
    """`momentum * old + (1 - momentum) * new` at length 1, for rows (N, D); where one is zero, the other.

    FedCA's dictionary over rounds: zeros are places without an example.
    """
    mixed = momentum * old.astype(np.float64) + (1 - momentum) * new.astype(np.float64)
    length = np.sqrt((mixed * mixed).sum(1, keepdims=True))
    return (mixed / np.where(length > 0, length, 1.0)).astype(old.dtype)
