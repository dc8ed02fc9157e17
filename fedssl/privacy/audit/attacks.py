"""From scores of members and others to findings: area, rates at few false alarms, a lower bound of epsilon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.privacy.audit.bounds import guess_bound
from fedssl.privacy.audit.membership import trained
from fedssl.privacy.audit.roc import Estimate, area, rate_at

Floats = NDArray[np.float64]
CONFIDENCE = 0.95  # of each interval, and of all lower bounds of one audit together


@dataclass(frozen=True, eq=False)
class Attack:
    """One attack's scores: larger says "member"."""

    name: str
    members: Floats  # (n,)
    others: Floats  # (m,)
    how: str  # in a few words
    rows: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # which examples they are of; None: all in order


@dataclass(frozen=True)
class Finding:
    """What an attack shows. All of it is of one trained model and the unit of privacy "record"."""

    name: str
    how: str
    members: int
    others: int
    auc: Estimate
    tpr_1: Estimate  # true-positive rate at 1 % false alarms
    tpr_01: Estimate  # at 0.1 %
    epsilon: float  # lower bound; all bounds of one audit hold together at CONFIDENCE
    unit: str = "record"


def attacks(members: Mapping[str, Floats], others: Mapping[str, Floats], *, seed: int) -> Iterator[Attack]:
    """The attacks that `membership.statistics` of both groups allows, cheapest first.

    Args:
        members, others: name -> (n, F) and (m, F).
        seed: of the halves that trained attacks learn from.
    """
    for name, part in (("encoder views", "encoder"), ("projector views", "projector")):
        if name in members:
            inside, outside = members[name].mean(1), others[name].mean(1)
            yield Attack(f"EncoderMI-T, {part}", inside, outside, "mean cosine of its augmentations")
    yield _by_halves("EncoderMI-V", "encoder views", members, others, seed, "logistic regression on those cosines")
    if "loss" in members:
        yield Attack("loss", members["loss"][:, 0], others["loss"][:, 0], "minus the training objective")
    if "agreement" in members:
        yield Attack("agreement", members["agreement"][:, 0], others["agreement"][:, 0], "prediction with its target")
    yield _by_halves("norm", "norm", members, others, seed, "logistic regression on the length of the features")


def finding(attack: Attack, epsilon: float, *, seed: int) -> Finding:
    """Judge an attack whose lower bound is known; the seed is of the bootstrap."""
    members, others = attack.members, attack.others
    return Finding(
        attack.name,
        attack.how,
        len(members),
        len(others),
        area(members, others, seed=seed),
        rate_at(members, others, 0.01),
        rate_at(members, others, 0.001),
        epsilon,
    )


def paired_bound(
    attack: Attack,
    *,
    delta: float,
    confidence: float,
    classes: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None] = (None, None),
    seed: int,
    replaced: bool = True,
) -> float:
    """A lower bound of epsilon from one finished run, if examples were divided into members and others at random.

    Each member is paired with an other, of its class where the division was by class. Given the pairs, which of the two
    was trained on is a fair coin of its own, so the one-run audit applies; a coin replaces a record by another.

    Args:
        attack: the scores.
        delta, confidence: see `bounds.one_run_lower_bound`.
        classes: of all members and all others, or None; those of `attack.rows` are read.
        seed: of pairs and coins.
        replaced: whether epsilon is claimed for added or removed records, of which the pairs say half as much; False
            where it is claimed for replaced ones.
    """
    rng = seeds.stream(seed, "audit", "pairs")
    first, second = _pairs(len(attack.members), len(attack.others), _chosen(classes, attack), rng)
    difference = attack.members[first] - attack.others[second]
    coins = rng.random(len(difference)) < 0.5
    if len(difference) < 2:
        return 0.0
    scores = np.where(coins, difference, -difference)
    return guess_bound(scores, coins, delta=delta, confidence=confidence, replaced=replaced)


def _pairs(
    n: int, m: int, classes: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    inside, outside = classes
    if inside is None or outside is None:
        inside, outside = np.zeros(n, np.int64), np.zeros(m, np.int64)
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for label in np.intersect1d(inside, outside):
        a, b = (rng.permutation(np.flatnonzero(group == label)) for group in (inside, outside))
        pairs.append((a[: len(b)], b[: len(a)]))
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def _by_halves(
    name: str, of: str, members: Mapping[str, Floats], others: Mapping[str, Floats], seed: int, how: str
) -> Attack:
    inside, outside, rows = trained(members[of], others[of], seed=seed)
    return Attack(name, inside, outside, f"{how}; knows half of both groups", rows)


def _chosen(
    classes: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None], attack: Attack
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """The classes of the examples that an attack scores."""
    inside, outside = classes
    if attack.rows is None or inside is None or outside is None:
        return inside, outside
    return inside[attack.rows[0]], outside[attack.rows[1]]
