"""T2: classifiers imprinted from keys and heads trained on them, for everybody's keys and for each client's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedssl import probes, seeds
from fedssl.errors import ResumeError
from fedssl.flower import state_files
from fedssl.rundir import RunDirectory
from fedssl.theory import imprint_classifier
from simulations.studies.tools.runs import Finished

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
SPACES = ("keys", "features")
_SCALE = 10.0  # of the cosines in a head that is trained from an imprinted one: 1 / temperature


@dataclass(frozen=True)
class Encoded:
    """The digits as a run's encoder sees them: keys are what instance discrimination compares, unit projections."""

    train: dict[str, Array]  # space -> (N, D)
    test: dict[str, Array]
    labels: Ints  # (N,)
    held: Ints  # (M,), of the test set
    shards: list[NDArray[np.int64]]  # each client's rows of the training set
    seed: int

    @classmethod
    def of(cls, finished: Finished) -> Encoded:
        """Encode both parts of the data without augmentation."""
        data = finished.data

        def both(table: object) -> dict[str, Array]:
            return {s: _unit(finished.features(table, projected=s == "keys")) for s in SPACES}

        labels, held = (np.asarray(part.targets) for part in (data.train, data.test))
        return cls(both(data.train), both(data.test), labels, held, finished.shards, finished.job.seed)

    @property
    def classes(self) -> int:
        """10 of the digits."""
        return int(self.labels.max()) + 1

    def accuracy(self, weight: Array, space: str = "keys", of: Sequence[int] | None = None) -> float:
        """Of a cosine classifier on the test set, or on its examples of some classes."""
        chosen = np.isin(self.held, self.classes_or(of))
        return float(np.mean((self.test[space][chosen] @ weight.T).argmax(1) == self.held[chosen]))

    def classes_or(self, some: Sequence[int] | None) -> list[int]:
        """These classes, or all."""
        return list(range(self.classes)) if some is None else list(some)

    def imprinted(self, rows: Ints | None = None, space: str = "keys") -> Array:
        """(C, D) from these rows of the training set, all by default."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        return imprint_classifier(self.train[space][rows], self.labels[rows], self.classes)

    def trained(self, rows: Ints | None = None, space: str = "keys", of: Sequence[int] | None = None) -> float:
        """Accuracy of the linear probe that these rows train."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        chosen = np.isin(self.held, self.classes_or(of))
        x, held = self.train[space][rows], self.test[space][chosen]
        return probes.linear(x, self.labels[rows], held, self.held[chosen], seed=self.seed).accuracy

    def drawn(self, per_class: int, draw: int) -> Ints:
        """Rows of a draw of labels, the same for every encoder of a seed."""
        rng = seeds.stream(self.seed, "study", "imprinting", per_class, draw)
        groups = [np.flatnonzero(self.labels == c) for c in range(self.classes)]
        return np.concatenate([rng.choice(g, min(per_class, len(g)), replace=False) for g in groups])

    def few(self, per_class: int, draws: int) -> dict[str, float]:
        """Mean accuracies with few labels: imprinted and trained from the same labels."""
        found: dict[str, list[float]] = {}
        for draw in range(draws):
            rows = self.drawn(per_class, draw)
            for space in SPACES:
                found.setdefault(f"imprinted {space}", []).append(self.accuracy(self.imprinted(rows, space), space))
                x, y = self.train[space], self.labels
                head = probes.few_label(x[rows], y[rows], self.test[space], self.held, per_class=per_class, repeats=1,
                                        seed=self.seed)  # fmt: skip
                found.setdefault(f"head on {space}", []).append(head.mean)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def everything(self) -> dict[str, float]:
        """The same with all labels."""
        imprinted = {f"imprinted {s}": self.accuracy(self.imprinted(space=s), s) for s in SPACES}
        return imprinted | {f"head on {s}": self.trained(space=s) for s in SPACES}

    def clients(self) -> dict[str, float]:
        """Clients' own classifiers (means over clients), and global ones by several ways to join them."""
        keys, y = self.train["keys"], self.labels
        own = [self.imprinted(rows) for rows in self.shards]
        counts = np.stack([np.bincount(y[rows], minlength=self.classes) for rows in self.shards])  # (M, C)
        homes = [np.flatnonzero(count).tolist() for count in counts]
        sums = [_sums(keys[rows], y[rows], self.classes) for rows in self.shards]
        pairs = list(zip(own, homes, strict=True))
        many = list(zip(self.shards, homes, strict=True))
        return {
            "own, imprinted, all classes": float(np.mean([self.accuracy(w) for w in own])),
            "own, imprinted, own classes": float(np.mean([self.accuracy(w, of=home) for w, home in pairs])),
            "own, head, all classes": float(np.mean([self.trained(rows) for rows, _ in many])),
            "own, head, own classes": float(np.mean([self.trained(rows, of=home) for rows, home in many])),
            "union of keys": self.accuracy(self.imprinted()),
            "sums of unit keys": self.accuracy(_unit(np.sum(sums, axis=0))),
            "mean of classifiers": self.accuracy(_unit(np.mean(own, axis=0))),
            "mean weighted by counts": self.accuracy(_unit(np.einsum("mc,mcd->cd", counts, np.stack(own)))),
        }

    def descent(self, start: Array, rows: Ints, at: Sequence[int]) -> list[float]:
        """Accuracies after these numbers of steps of a head that is trained on keys from given weights."""
        weight = torch.from_numpy(start).clone().requires_grad_()
        x, y = torch.from_numpy(self.train["keys"][rows]), torch.from_numpy(self.labels[rows])
        optimizer = torch.optim.SGD([weight], lr=0.1)
        found = []
        for step in range(max(at) + 1):
            if step in at:
                found.append(self.accuracy(weight.detach().numpy()))
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(_SCALE * x @ weight.T, y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return found

    def random(self) -> Array:
        """(C, D) rows of length 1."""
        rng = seeds.stream(self.seed, "study", "imprinting", "random")
        return _unit(rng.standard_normal((self.classes, self.train["keys"].shape[1])))


def stored(run: RunDirectory, encoded: Encoded) -> float:
    """Accuracy of the classifier of the keys that the clients' banks hold, as their own models left them.

    Raises:
        ResumeError: a client has no state.
    """
    keys, labels = [], []
    for client, rows in enumerate(encoded.shards):
        path = state_files.newest(run.clients, client, 10**6)
        if path is None:
            raise ResumeError(f"client {client} of {run.path} has no state: start the run anew")
        keys.append(np.asarray(state_files.read(path).local["bank.keys"], dtype=np.float64))
        labels.append(encoded.labels[rows])
    weight = imprint_classifier(np.concatenate(keys), np.concatenate(labels), encoded.classes)
    return encoded.accuracy(weight)


def _sums(keys: Array, labels: Ints, classes: int) -> Array:
    """(C, D): what a client would send so that the server's classifier equals that of all keys."""
    total = np.zeros((classes, keys.shape[1]))
    np.add.at(total, labels, keys)
    return total


def _unit(x: NDArray[np.floating]) -> Array:
    x = np.asarray(x, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norm > 0, norm, 1.0))
