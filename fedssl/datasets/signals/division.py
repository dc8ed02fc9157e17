"""Which series are held out: the file's own choice, whole subjects, whole recordings, or a stratified share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedssl.datasets.base import Data
from fedssl.datasets.signals.table import Array, Signals
from fedssl.datasets.split import Indices, stratified
from fedssl.errors import ConfigError

SPLIT_SEED = 20240229  # of the data, not of the run: every run has the same test set
TESTS = ("auto", "file", "groups", "recordings", "random")


def check_test(test: str, fraction: float) -> None:
    """Refuse options that `divided` does not know.

    Raises:
        ConfigError: an unknown word, or a share that leaves one part empty.
    """
    if test not in TESTS:
        raise ConfigError(f"data.test is {test!r}, which is not known; use one of {', '.join(TESTS)}.")
    if not 0 < fraction < 1:
        raise ConfigError(f"data.test_fraction is {fraction} but both parts need examples; choose it between 0 and 1.")


def divided(
    whole: Signals,
    classes: tuple[str, ...],
    test: str,
    fraction: float,
    held: NDArray[np.bool_] | None = None,
    recordings: Array | None = None,
    strata: Array | None = None,
) -> Data:
    """Training and test part of one table.

    Args:
        whole: all series.
        classes: their names.
        test: "file" takes `held`; "groups" holds out whole groups (subjects that training never sees); "recordings"
            holds out whole recordings of every group that has two or more, so that every group trains; "random" holds
            out a share of each class, which leaks where series overlap; "auto" is the first of file, groups and random
            that the data allow.
        fraction: about how much is held out, strictly between 0 and 1; not read by "file".
        held: (N,) the file's own division.
        recordings: (N,) to which recording each series belongs, unique within a group.
        strata: (N,) within which recordings are held out; the groups unless given.

    Raises:
        ConfigError: the data lack what the division needs, or a part would be empty.
    """
    groups = whole.groups
    if test == "auto":
        test = "file" if held is not None else "random" if groups is None or len(np.unique(groups)) < 2 else "groups"
    needed = {"file": held, "groups": groups, "recordings": recordings}
    if test in needed and needed[test] is None:
        what = {"file": "division of its own", "groups": "groups", "recordings": "recordings"}[test]
        raise ConfigError(f"data.test={test} was asked for but this data set has no {what}; use another data.test.")
    if test == "file" and held is not None:
        train, out = np.flatnonzero(~held), np.flatnonzero(held)
        if min(len(train), len(out)) == 0:
            raise ConfigError(
                f"The data's own division has {len(train)} series for training and {len(out)} for testing; "
                "both need some, so use data.test=random or another one."
            )
    elif test == "groups" and groups is not None:
        train, out = whole_units(np.zeros(len(whole), np.int64), groups, fraction)
    elif test == "recordings" and recordings is not None:
        alike = np.zeros(len(whole), np.int64) if groups is None else groups
        train, out = whole_units(alike if strata is None else strata, recordings, fraction)
    else:
        train, out = stratified(len(whole) if whole.targets is None else whole.targets, fraction, SPLIT_SEED)
    return Data(whole.subset(train), whole.subset(out), classes)


def whole_units(strata: Array, units: Array, fraction: float) -> tuple[Indices, Indices]:
    """Divides examples by whole units (recordings, subjects), with about `fraction` of each stratum's held out.

    Of a stratum of two or more units at least one is held out and at least one stays; of one unit none is held out.

    Args:
        strata: (N,) such as the subject of each example, or all alike.
        units: (N,) such as its recording; examples of one unit and stratum stay together.
        fraction: of the units, strictly between 0 and 1.

    Returns:
        Sorted positions of the first and of the second part.

    Raises:
        ConfigError: nothing could be held out.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    held = np.zeros(len(units), bool)
    for stratum in np.unique(strata):
        members = strata == stratum
        there = np.unique(units[members])
        count = min(len(there) - 1, max(1, round(fraction * len(there))))
        held |= members & np.isin(units, rng.permutation(there)[:count])
    if not held.any():
        raise ConfigError(
            "Nothing can be held out whole while some of it stays: no group has two recordings, or there is one "
            "group; use another data.test."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)
