"""Finished runs as models: what a study measures beyond what a run reports itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedssl import probes
from fedssl.config import Plan
from fedssl.datasets.base import Data
from fedssl.errors import ResumeError
from fedssl.evaluation import encode
from fedssl.job import Job, split
from fedssl.job.setup import build_model, data_of
from fedssl.model import Model, load_arrays
from fedssl.rundir import RunDirectory

CPU = torch.device("cpu")
CENTRAL = ("federation.clients=1", "partition=iid")  # one client that holds everything
QUICK = ("device=cpu", "evaluate.every=0", "evaluate.final=false")  # runs that a study probes itself


@dataclass(frozen=True)
class Finished:
    """A finished run's job, merged model in evaluation mode, and data, on the CPU."""

    job: Job
    model: Model
    data: Data

    @classmethod
    def of(cls, rundir: RunDirectory) -> Finished:
        """The model of the last checkpoint.

        Raises:
            ResumeError: the run has none.
        """
        job, point = Plan.of(rundir.config()).job, rundir.latest()
        if point is None:
            raise ResumeError(f"{rundir.path} has no checkpoint: `fedssl resume {rundir.path}`")
        data = data_of(job, CPU)
        model = build_model(job, data.train.shape)
        load_arrays(model, point.arrays)
        return cls(job, model.eval(), data)

    @classmethod
    def untrained(cls, rundir: RunDirectory) -> Finished:
        """The run's model before the first round."""
        job = Plan.of(rundir.config()).job
        data = data_of(job, CPU)
        return cls(job, build_model(job, data.train.shape).eval(), data)

    @property
    def shards(self) -> list[np.ndarray]:
        """Each client's rows of the training set."""
        return split(self.job, self.data.train)

    def features(self, table: Any, *, projected: bool = False) -> np.ndarray:
        """(N, D) of a part of the data, not augmented: the encoder's output, or the projector's on top of it."""
        z = encode(self.model["encoder"], table, np.arange(len(table)), self.job.data.augment)
        with torch.inference_mode():
            return (self.model["projector"](z) if projected else z).numpy()

    def projections(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, D) of two views of each example, as in training: batch normalisation reads the batch."""
        first, second = self.job.data.augment.views(self.data.train.batch(index), generator, 2)
        self.model["projector"].train()
        with torch.no_grad():
            found = tuple(self.model["projector"](self.model["encoder"](view)) for view in (first, second))
        self.model["projector"].eval()
        return found[0], found[1]

    def few_label(self, per_class: int = 5) -> float:
        """Accuracy in [0, 1] of logistic regression on a few labels a class, mean over `evaluate.repeats` draws."""
        x, held = (self.features(part) for part in (self.data.train, self.data.test))
        y, held_y, repeats = self.data.train.targets, self.data.test.targets, self.job.evaluate.repeats
        found = probes.few_label(x, y, held, held_y, per_class=per_class, repeats=repeats, seed=self.job.seed)
        return found.mean


def by_client(rundir: RunDirectory, key: str) -> list[list[float]]:
    """A measure that clients report: one list a round, in the order of the clients."""
    rows = rundir.rows("clients.jsonl")
    rounds = sorted({row["round"] for row in rows})
    return [[r[key] for r in sorted(rows, key=_client) if r["round"] == at and key in r] for at in rounds]


def _client(row: dict[str, Any]) -> int:
    return int(row["client"])


def by_round(rundir: RunDirectory, key: str) -> list[float]:
    """A measure by round: its mean over the clients, weighted by their examples."""
    each = zip(by_client(rundir, key), by_client(rundir, "examples"), strict=True)
    return [float(np.average(values, weights=examples)) for values, examples in each]
