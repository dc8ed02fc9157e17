"""What a federation is measured by: everybody's probes, and what its encoders are worth to each of its clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl import diagnostics, probes, seeds
from fedssl.flower import state_files
from fedssl.model import load_arrays
from fedssl.parts import Arrays, part_of
from fedssl.rundir import RunDirectory
from fedssl.theory import imprint_classifier
from simulations.studies.tools.runs import Finished

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FIVE, ONE, LINEAR, KNN = "5 labels a class", "1 label a class", "all labels, linear", "all labels, kNN"
MEAN, WORST = "clients, mean", "clients, worst"
OWN_MEAN, OWN_WORST, OWN_ALL = "own encoders, mean", "own encoders, worst", "own encoders, all classes"
CKA, GAP, DRIFT = "CKA between clients", "merge gap of kNN", "drift"
RANK = "effective rank of features"
DRAWS = 50  # of five labels a class, for what a client gets


@dataclass(frozen=True)
class Probed:
    """Frozen features of both parts of the data, and labels, which only probes see."""

    train: NDArray[np.float32]  # (N, D)
    test: NDArray[np.float32]  # (M, D)
    labels: Ints  # (N,)
    held: Ints  # (M,)
    seed: int

    @classmethod
    def of(cls, finished: Finished) -> Probed:
        """The features of a run's encoder as it is now."""
        data = finished.data
        train, test = (finished.features(part) for part in (data.train, data.test))
        return cls(train, test, np.asarray(data.train.targets), np.asarray(data.test.targets), finished.job.seed)

    @property
    def classes(self) -> int:
        """C."""
        return int(max(self.labels.max(), self.held.max())) + 1

    def accuracies(self) -> dict[str, float]:
        """On the whole test set, in [0, 1], and the rank of the features there."""
        sets = (self.train, self.labels, self.test, self.held)
        one, five = (probes.few_label(*sets, per_class=n, repeats=10, seed=self.seed).mean for n in (1, 5))
        return {
            FIVE: five,
            ONE: one,
            LINEAR: probes.linear(*sets, seed=self.seed).accuracy,
            KNN: probes.knn(*sets),
            RANK: diagnostics.effective_rank(torch.from_numpy(self.test)),
        }

    def recalls(self, draws: int = DRAWS) -> Floats:
        """(C,) the accuracy on each class of the nearest class mean of five labels a class, mean of draws."""
        x, held = (_unit(part - self.train.mean(0)) for part in (_unit(self.train), _unit(self.test)))
        hits = np.zeros(self.classes)
        for draw in range(draws):
            rng = seeds.stream(self.seed, "study", "recalls", draw)
            groups = [np.flatnonzero(self.labels == c) for c in range(self.classes)]
            rows = np.concatenate([rng.choice(g, min(5, len(g)), replace=False) for g in groups])
            weight = imprint_classifier(x[rows], self.labels[rows], self.classes)
            right = (held @ weight.T).argmax(1) == self.held
            hits += np.bincount(self.held, right, self.classes)
        return np.asarray(hits / draws / np.maximum(np.bincount(self.held, minlength=self.classes), 1))


def distributions(shards: Sequence[Ints], labels: Ints, classes: int) -> Floats:
    """(K, C) the share of each class in each client's examples; rows sum to 1."""
    counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in shards])
    return np.asarray(counts / counts.sum(1, keepdims=True))


def for_clients(recalls: Floats, shares: Floats) -> Floats:
    """(K,) what each client gets: accuracies by class, (C,) or each client's own (K, C), weighted by its labels."""
    return np.asarray((recalls * shares).sum(1))


def measured(run: RunDirectory) -> dict[str, float]:
    """Every measure of a finished run; those of own encoders where clients keep some of its arrays."""
    finished = Finished.of(run)
    merged = Probed.of(finished)
    shares = distributions(finished.shards, merged.labels, merged.classes)
    gets = for_clients(merged.recalls(), shares)
    found = merged.accuracies() | {MEAN: float(gets.mean()), WORST: float(gets.min())}
    if own := own_arrays(run, len(shares)):
        recalls = np.stack([_recalls_with(finished, arrays) for arrays in own])
        theirs = for_clients(recalls, shares)
        found |= {OWN_MEAN: float(theirs.mean()), OWN_WORST: float(theirs.min()), OWN_ALL: float(recalls.mean())}
    rows = run.rows()
    for name, key in ((CKA, "client_cka"), (GAP, "merge_gap_knn"), (DRIFT, "drift")):
        if values := [row[key] for row in rows if row.get(key) is not None]:
            found[name] = float(np.mean(values))
    return found


def own_arrays(run: RunDirectory, clients: int) -> list[Arrays]:
    """The arrays of the encoder that each client keeps at home; empty where none keeps any."""
    states = [state_files.newest(run.clients, client, 10**6) for client in range(clients)]
    found: list[Arrays] = []
    for path in states:
        if path is None:
            return []
        state = state_files.read(path)
        found.append({k: v for k, v in (state.local | state.mine).items() if part_of(k) == "encoder"})
    return found if any(found) else []


def _recalls_with(finished: Finished, arrays: Arrays) -> Floats:
    load_arrays(finished.model, arrays)
    return Probed.of(finished).recalls()


def _unit(x: NDArray[np.floating]) -> Floats:
    x = np.asarray(x, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norm > 0, norm, 1.0))
