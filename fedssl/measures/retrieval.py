"""Retrieval across modalities: whether the nearest example of the other modality is of the same class."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl.errors import ConfigError

# (name in probes.json, what it is)
PROBES = (
    ("first_linear", "first modality alone, linear"),
    ("second_linear", "second modality alone, linear"),
    ("first_to_second", "retrieval, first to second"),
    ("second_to_first", "retrieval, second to first"),
)


def retrieval(queries: ArrayLike, query_labels: ArrayLike, gallery: ArrayLike, gallery_labels: ArrayLike) -> float:
    """Looks up each query's most similar example of the gallery, by cosine; of equal ones the first.

    Args:
        queries: (N, D) features of one modality.
        query_labels: (N,).
        gallery: (M, D) features of the other modality.
        gallery_labels: (M,).

    Returns:
        The share of queries whose find has their label, in [0, 1]: about the share of a class where the modalities have
        nothing to do with each other, 1 where each class of one lies nearest to its own of the other.

    Raises:
        ConfigError: arrays that do not fit.

    References:
        Radford et al. 2021, https://arxiv.org/abs/2103.00020
    """
    (a, y), (b, z) = ((np.asarray(x), np.asarray(t)) for x, t in ((queries, query_labels), (gallery, gallery_labels)))
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and y.shape == a.shape[:1] and z.shape == b.shape[:1]):
        raise ConfigError(
            f"Queries {a.shape} with labels {y.shape} do not fit a gallery {b.shape} with labels {z.shape}; pass "
            "(N, D), (N,), (M, D) and (M,)."
        )
    if not (len(a) and len(b)):
        raise ConfigError(f"{len(a)} queries and a gallery of {len(b)} say nothing; pass at least one of each.")
    return float(np.mean(z[np.argmax(_unit(a) @ _unit(b).T, axis=1)] == y))


def across(
    first_bank: ArrayLike, second_bank: ArrayLike, first: ArrayLike, second: ArrayLike, labels: ArrayLike
) -> dict[str, float]:
    """Retrieval among test examples in both directions, each modality centred by the mean of its bank.

    Towers that were trained to agree still put their modalities into different cones (the modality gap): a contrastive
    loss ranks candidates of one modality, which a common shift hardly changes. A cosine across the gap says nothing.

    Args:
        first_bank, second_bank: (N, D) features of training examples, for the means.
        first, second: (M, D) features of test examples, row by row the same.
        labels: (M,) of the test examples.

    Returns:
        `first_to_second_accuracy` and `second_to_first_accuracy`, as `retrieval` measures them. With only the class in
        common a perfect pair of towers gets 1 although it cannot tell which of a class was the partner.

    Raises:
        ConfigError: arrays that do not fit.

    References:
        Liang et al. 2022, https://arxiv.org/abs/2203.02053 (the gap).
    """
    a, b = (np.asarray(x) - np.asarray(bank).mean(0) for x, bank in ((first, first_bank), (second, second_bank)))
    return {
        "first_to_second_accuracy": retrieval(a, labels, b, labels),
        "second_to_first_accuracy": retrieval(b, labels, a, labels),
    }


def _unit(x: NDArray[np.generic]) -> NDArray[np.float64]:
    """Rows at length 1 in float64; a zero row stays zero."""
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norm > 0, norm, 1.0))
