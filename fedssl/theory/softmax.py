"""InfoNCE as classification (T1), instance discrimination as a linear classifier (T2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, matrix, positive


def info_nce_logits(
    anchor: ArrayLike, positives: ArrayLike, negatives: ArrayLike, temperature: float, *, similarity: str = "cosine"
) -> Array:
    """Writes InfoNCE as a (1 + K)-way classification: the logits of each anchor, the true class always column 0.

    `cross_entropy(info_nce_logits(...), 0)` is InfoNCE; nothing else is in the loss.

    Args:
        anchor: (B, D).
        positives: (B, D), row i belongs to anchor i.
        negatives: (K, D), shared by all anchors; K >= 1.
        temperature: > 0.
        similarity: "cosine", in which a zero vector has similarity 0 with everything, or "dot".

    Returns:
        (B, 1 + K), similarity / temperature.

    Raises:
        ConfigError: shapes that do not fit, an unknown similarity or a temperature that is not above 0.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, equation 4
    """
    a, p, n = matrix("anchor", anchor), matrix("positives", positives), matrix("negatives", negatives)
    if a.shape != p.shape or a.shape[1] != n.shape[1]:
        raise ConfigError(
            f"The anchors are {a.shape}, the positives {p.shape} and the negatives {n.shape}, so they cannot be "
            "compared; pass one positive for each anchor and one dimension for all."
        )
    if similarity not in ("cosine", "dot"):
        raise ConfigError(f"The similarity {similarity!r} is not known; use 'cosine' or 'dot'.")
    if similarity == "cosine":
        a, p, n = unit_rows(a), unit_rows(p), unit_rows(n)
    own = (a * p).sum(1, keepdims=True)  # (B, 1)
    return np.concatenate([own, a @ n.T], axis=1) / positive("The temperature", temperature)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Gives the softmax cross-entropy of each row, `-log softmax(logits)[label]`.

    Args:
        logits: (B, C).
        labels: (B,) or one integer for all rows, in [0, C).

    Returns:
        (B,), each value >= 0 and `log C` for equal logits.

    Raises:
        ConfigError: logits that are no matrix or labels out of range.
    """
    s = matrix("logits", logits)
    y = _labels(np.broadcast_to(np.asarray(labels), (len(s),)), s.shape[1])
    peak = s.max(1, keepdims=True)
    total = np.log(np.exp(s - peak).sum(1)) + peak[:, 0]
    loss: Array = np.maximum(total - s[np.arange(len(s)), y], 0.0)
    return loss


def instance_classifier(keys: ArrayLike, temperature: float) -> tuple[Array, Array]:
    """Gives the linear classifier that instance discrimination trains: one class an example, the key its weights.

    With `weight, bias = instance_classifier(keys, t)` and a query q of length 1, the cross-entropy of
    `weight @ q + bias` for class i is InfoNCE with positive `keys[i]` and all other keys as negatives.

    Args:
        keys: (N, D), the memory bank; normalised here, a zero row stays zero.
        temperature: > 0.

    Returns:
        Weight (N, D), the unit keys divided by the temperature, and bias (N,), all 0.

    Raises:
        ConfigError: keys that are no matrix or a temperature that is not above 0.

    References:
        Wu et al. 2018, https://arxiv.org/abs/1805.01978
    """
    k = unit_rows(matrix("keys", keys))
    return k / positive("The temperature", temperature), np.zeros(len(k))


def imprint_classifier(keys: ArrayLike, labels: ArrayLike, classes: int) -> Array:
    """Builds a cosine classifier without training: the mean of each class's unit keys, normalised again.

    Federated: the rows of several clients' classifiers may not be averaged to get the classifier of all keys, because
    their lengths, which say how many keys agree, are gone. Concatenate, or sum the unit keys before normalising.

    Args:
        keys: (N, D) embeddings; normalised first, so that long keys count no more than short ones.
        labels: (N,) integers in [0, classes).
        classes: number of classes, C.

    Returns:
        (C, D) rows of length 1; a class without keys, or whose keys cancel, gets a row of zeros and so never wins
        against a class with a positive similarity.

    Raises:
        ConfigError: keys that are no matrix, or labels that do not fit.

    References:
        Qi et al. 2018, https://arxiv.org/abs/1712.07136
    """
    k = unit_rows(matrix("keys", keys))
    y = _labels(np.asarray(labels), at_least("classes", classes, 1))
    if len(y) != len(k):
        raise ConfigError(f"{len(y)} labels were given for {len(k)} keys; pass one label for each key.")
    total = np.zeros((classes, k.shape[1]))
    np.add.at(total, y, k)
    count = np.maximum(np.bincount(y, minlength=classes), 1)[:, None]
    mean = total / count
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return unit_rows(np.where(length > 1e-12, mean, 0.0))  # keys that cancel leave rounding, not a direction


def unit_rows(x: Array) -> Array:
    """Rows (..., D) at length 1; a zero row stays zero."""
    peak = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(peak > 0, peak, 1.0)  # squares of very long or short rows would leave float64
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


def _labels(y: NDArray[np.generic], classes: int) -> NDArray[np.int64]:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ConfigError(f"The labels are {y.dtype} of the shape {y.shape}; pass one integer for each row.")
    found = y.astype(np.int64)
    if len(found) and not (found.min() >= 0 and found.max() < classes):
        raise ConfigError(
            f"The labels range from {found.min()} to {found.max()}, but there are {classes} classes; number them from "
            f"0 to {classes - 1} and leave examples without label out."
        )
    return found
