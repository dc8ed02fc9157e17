"""Supervised FedAvg, the baseline: the same encoder, views, shards, steps and schedule, with labels in the loss.

Labels meet training here and nowhere else in the project: the library's client has none to give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedssl import seeds
from fedssl.client import fit
from fedssl.datasets.base import Data, Shard
from fedssl.evaluation import encode
from fedssl.files import read_arrays, write_arrays
from fedssl.gradient import PlainGradient
from fedssl.job import Job, split
from fedssl.job.setup import data_of
from fedssl.job.shards import as_held
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model, load_arrays, seed_parameters, to_arrays
from fedssl.parts import Arrays, Coupling, Part
from fedssl.tree import ExactMean
from simulations.studies.federated.measures import MEAN, WORST, Probed, distributions, for_clients
from simulations.studies.tools.runs import CPU

Ints = NDArray[np.int64]
HEAD = "own head"


@dataclass(frozen=True)
class Supervised(SSLMethod):
    """Cross-entropy of a linear head on one view of each example; it exists for one client, whose labels it holds."""

    labels: Tensor  # (n,) of the client's examples
    classes: int
    views = 1
    coupling = Coupling.none
    parts = (Part("encoder"), Part("head"))

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and linear head."""
        return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(sizes.dim, self.classes)})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The mean over the batch."""
        h = model["encoder"](batch.views[0])
        each = F.cross_entropy(model["head"](h), self.labels[batch.index], reduction="none")  # (B,)
        return LossOutput(each.mean(), each, h.detach(), {})


@dataclass(frozen=True)
class Baseline:
    """Supervised FedAvg on the split of a job, with its local training but for the learning rate.

    Attributes:
        job: gives encoder, data, split, local training, rounds and seed; all clients take part in every round.
        folder: where trained models are kept, so that each is trained once.
    """

    job: Job
    folder: Path

    @cached_property
    def data(self) -> Data:
        """The job's, on the CPU."""
        return data_of(self.job, CPU)

    @cached_property
    def shards(self) -> list[Ints]:
        """Each client's rows of the training set."""
        return split(self.job, self.data.train)

    def best(self, rates: Sequence[float]) -> float:
        """The learning rate whose model is right most often on a fifth of every client's examples, held out for it."""
        if len(rates) == 1:
            return rates[0]
        rng = seeds.stream(self.job.seed, "study", "validation")
        mixed = [rng.permutation(rows) for rows in self.shards]
        kept = [np.sort(rows[len(rows) // 5 :]) for rows in mixed]
        held = np.concatenate([rows[: len(rows) // 5] for rows in mixed])
        labels = np.asarray(self.data.train.targets)[held]

        def accuracy(rate: float) -> float:
            _, said = self._read(self.trained(rate, kept, "validation"), self.data.train, held)
            return float((said == labels).mean())

        return max(rates, key=accuracy)

    def measured(self, rate: float) -> dict[str, float]:
        """The probes of the features as of any encoder, and the head: on everybody's test set and for each client."""
        train, test = self.data.train, self.data.test
        labels, held = np.asarray(train.targets), np.asarray(test.targets)
        arrays = self.trained(rate, self.shards)
        x, _ = self._read(arrays, train, np.arange(len(train)))
        z, said = self._read(arrays, test, np.arange(len(test)))
        probed = Probed(x, z, labels, held, self.job.seed)
        shares = distributions(self.shards, labels, probed.classes)
        recalls = np.bincount(held, said == held, probed.classes) / np.bincount(held, minlength=probed.classes)
        gets = for_clients(recalls, shares)
        head = {HEAD: float((said == held).mean()), MEAN: float(gets.mean()), WORST: float(gets.min())}
        return head | probed.accuracies() | {"learning rate": rate}

    def trained(self, rate: float, shards: Sequence[Ints], what: str = "all") -> Arrays:
        """The model after all rounds: from the file, or trained now."""
        path = self.folder / f"{self.job.fingerprint}-{what}-{rate:g}.safetensors"
        if path.exists():
            return read_arrays(path)[0]
        arrays = self._train(rate, shards)
        write_arrays(path, arrays)
        return arrays

    def _train(self, rate: float, shards: Sequence[Ints]) -> Arrays:
        job, local, model = self.job, replace(self.job.local, lr=rate), self._model()
        now, seen = to_arrays(model), as_held(job, CPU)
        methods = [self._method(rows) for rows in shards]
        for at in range(1, job.federation.rounds + 1):
            mean = ExactMean()
            for client, (rows, method) in enumerate(zip(shards, methods, strict=True)):
                load_arrays(model, now)
                fit(
                    method,
                    model,
                    Shard.of(seen, rows),
                    job.data.augment,
                    local,
                    gradient=PlainGradient(),
                    round=at,
                    rounds=job.federation.rounds,
                    seed=job.seed,
                    client=client,
                )
                mean.add(to_arrays(model), len(rows))
            now = mean.result(now)
        return now

    def _method(self, rows: Ints) -> Supervised:
        return Supervised(torch.from_numpy(np.asarray(self.data.train.targets)[rows]), len(self.data.classes))

    def _model(self) -> Model:
        shape = self.data.train.shape
        encoder, dim = self.job.encoder.make(shape)
        model = self._method(np.arange(1)).init(encoder, Sizes(dim, 0, shape))
        seed_parameters(model, self.job.seed)  # by name, so the encoder starts as that of any method
        return model

    def _read(self, arrays: Arrays, table: object, rows: Ints) -> tuple[NDArray[np.float32], Ints]:
        """Features (N, D) of these rows, not augmented, and the classes (N,) that the head says."""
        model = self._model()
        load_arrays(model, arrays)
        h = encode(model["encoder"], table, rows, self.job.data.augment)
        with torch.inference_mode():
            return h.numpy(), model["head"](h).argmax(1).numpy()
