"""What was learnt: features of merged and client encoders, measured on labelled data that training never sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import diagnostics, probes, retrieval, seeds
from fedssl.corruptions import SEVERITIES, corrupt
from fedssl.job import Job
from fedssl.method import Augment
from fedssl.modalities.pairs import SIDES
from fedssl.modalities.timeseries import Statistics
from fedssl.model import load_arrays, to_arrays
from fedssl.parts import Arrays
from fedssl.setup import build_model

_BATCH = 512
FEW_LABELS: Mapping[str, dict[str, Any]] = {
    "one_label": {"per_class": 1},
    "five_labels": {"per_class": 5},
    "one_percent": {"fraction": 0.01},
    "ten_percent": {"fraction": 0.1},
}


@torch.inference_mode()
def encode(encoder: nn.Module, data: Any, rows: np.ndarray, augment: Augment) -> Tensor:
    """(N, D) float32 on the host: the encoder's outputs for these rows of a data set, without augmentation."""
    encoder.eval()
    index = torch.from_numpy(np.ascontiguousarray(rows)).to(data.device)
    outputs = [encoder(augment.plain(data.batch(part))).float().cpu() for part in torch.split(index, _BATCH)]
    return torch.cat(outputs)


class Evaluator:
    """Measures encoders of one job; holds one encoder and the data, both on the job's device.

    Args:
        job: what is evaluated.
        data: with `.train` and `.test` on the device; without targets only label-free diagnostics are measured.
        device: where features are computed.
    """

    def __init__(self, job: Job, data: Any, device: torch.device) -> None:
        self._job, self._device = job, device
        self._train, self._test = data.train, data.test
        encoder, _ = job.encoder.make(self._train.shape)
        self._encoder: nn.Module = encoder.to(device)
        rng = seeds.stream(job.seed, "evaluate")
        limit = job.evaluate.examples
        self._bank, self._queries = (_sample(len(part), limit, rng) for part in (self._train, self._test))

    @property
    def labelled(self) -> bool:
        """Whether probes are possible."""
        return self._train.targets is not None and self._test.targets is not None

    def _features(self, encoder: Mapping[str, np.ndarray], data: Any, rows: np.ndarray) -> Tensor:
        prefix = "encoder."
        load_arrays(self._encoder, {k.removeprefix(prefix): v for k, v in encoder.items() if k.startswith(prefix)})
        return encode(self._encoder, data, rows, self._job.data.augment)

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        return probes.knn(
            bank.numpy(),
            self._train.targets[self._bank],
            queries.numpy(),
            self._test.targets[self._queries],
            k=self._job.evaluate.knn_k,
        )

    def merged(self, arrays: Arrays) -> dict[str, float]:
        """The row of a merged model: kNN accuracy where labels exist, and the collapse diagnostics."""
        bank = self._features(arrays, self._train, self._bank)
        queries = self._features(arrays, self._test, self._queries)
        row = collapse(queries)
        first, second = self._views(arrays)
        row["alignment"] = diagnostics.alignment(first, second)
        if self.labelled:
            row["knn_accuracy"] = self._knn(bank, queries)
        return row

    def spectrum(self, arrays: Arrays) -> list[float]:
        """Eigenvalues of the feature covariance on the test set, descending."""
        return [float(v) for v in diagnostics.spectrum(self._features(arrays, self._test, self._queries))]

    @torch.inference_mode()
    def _views(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        generator = seeds.torch_stream(self._job.seed, "evaluate", "views", device=self._device)
        rows = torch.from_numpy(self._queries[:_BATCH]).to(self._device)
        self._encoder.eval()
        x = self._test.batch(rows)
        first, second = (self._encoder(v).float().cpu() for v in self._job.data.augment.views(x, generator, 2))
        return first, second

    def clients(self, encoders: Sequence[Arrays], merged: Mapping[str, float]) -> dict[str, float]:
        """Client encoders before the merge: means, their mutual linear CKA, and the merge gap.

        The gap is merged minus mean client: positive where merging helps.
        """
        queries, rows = [], []
        for encoder in encoders:
            queries.append(self._features(encoder, self._test, self._queries))
            row = {"rankme": diagnostics.rankme(queries[-1]), "feature_std": diagnostics.feature_std(queries[-1])}
            if self.labelled:
                row["knn_accuracy"] = self._knn(self._features(encoder, self._train, self._bank), queries[-1])
            rows.append(row)
        out = {f"client_{key}": float(np.mean([row[key] for row in rows])) for key in rows[0]}
        for key in ("knn_accuracy", "rankme"):
            if f"client_{key}" in out:
                out[f"merge_gap_{key.removesuffix('_accuracy')}"] = merged[key] - out[f"client_{key}"]
        if len(queries) > 1:
            out["client_cka"] = float(np.mean([diagnostics.linear_cka(a, b) for a, b in combinations(queries, 2)]))
        return out

    def probe(self, arrays: Arrays) -> dict[str, float]:
        """Linear and few-label probes on the whole labelled data; empty without labels."""
        if not self.labelled:
            return {}
        train = self._features(arrays, self._train, np.arange(len(self._train)))
        out = self._probed(train, self._features(arrays, self._test, np.arange(len(self._test))))
        return out | (self._modalities(arrays) if self._job.data.augment.modality == "pairs" else {})

    def without_encoder(self) -> dict[str, dict[str, float]]:
        """The same probes on the normalised examples themselves, and on simple statistics of time series.

        What an encoder must beat to be worth its training. Costs more than the probes of an encoder, because examples
        have more numbers than features.

        Returns:
            The probes by name; empty without labels, and for examples that are no single tensor.
        """
        modality = self._job.data.augment.modality
        named: dict[str, nn.Module] = {"raw values": nn.Flatten()} if modality in ("images", "timeseries") else {}
        if modality == "timeseries":
            named["window statistics"] = Statistics()
        everything = [(data, np.arange(len(data))) for data in (self._train, self._test)]
        if not self.labelled:
            return {}
        return {
            name: self._probed(*(encode(network, data, rows, self._job.data.augment) for data, rows in everything))
            for name, network in named.items()
        }

    def _probed(self, bank: Tensor, queries: Tensor) -> dict[str, float]:
        """Every probe of the features (N, D) of the training set, on those of the test set."""
        train, test = bank.numpy(), queries.numpy()
        labels = self._train.targets, self._test.targets
        linear = probes.linear(train, labels[0], test, labels[1], seed=self._job.seed)
        out = {"linear_accuracy": linear.accuracy}
        out["knn_accuracy"] = probes.knn(train, labels[0], test, labels[1], k=self._job.evaluate.knn_k)
        for name, amount in FEW_LABELS.items():
            few = probes.few_label(
                train, labels[0], test, labels[1], repeats=self._job.evaluate.repeats, seed=self._job.seed, **amount
            )
            out[f"{name}_accuracy"], out[f"{name}_std"] = few.mean, few.std
        return out

    def _modalities(self, arrays: Arrays) -> dict[str, float]:
        """Of pairs: what each modality is worth alone, and how well one finds the other."""
        y, held_y, out = self._train.targets, self._test.targets, {}
        banks, found = (
            {side: self._features(arrays, data.only(side), np.arange(len(data))).numpy() for side in SIDES}
            for data in (self._train, self._test)
        )
        for side in SIDES:
            linear = probes.linear(banks[side], y, found[side], held_y, seed=self._job.seed)
            out[f"{side}_linear_accuracy"] = linear.accuracy
        return out | retrieval.across(banks["first"], banks["second"], found["first"], found["second"], held_y)

    def robustness(self, arrays: Arrays, kinds: Sequence[str]) -> dict[str, list[float]]:
        """Linear-probe accuracy on the test set as it is and corrupted: kind -> accuracies by severity; `clean` first.

        The classifier is trained once, on clean features.

        Raises:
            ConfigError: an unknown kind, or data that cannot be corrupted.
        """
        train, test = np.arange(len(self._train)), np.arange(len(self._test))
        features = self._features(arrays, self._train, train).numpy()
        settings = [(kind, severity) for kind in kinds for severity in SEVERITIES]
        augment = self._job.data.augment
        versions = [self._features(arrays, self._test, test).numpy()]
        for kind, severity in settings:
            corrupted = _Corrupted(self._test, kind, severity, self._job.seed)
            versions.append(encode(self._encoder, corrupted, test, augment).numpy())
        clean, *rest = probes.linear_on_each(
            features, self._train.targets, versions, self._test.targets, seed=self._job.seed
        )
        out = {"clean": [clean]}
        for (kind, _), accuracy in zip(settings, rest, strict=True):
            out.setdefault(kind, []).append(accuracy)
        return out

    def random_encoder(self) -> Arrays:
        """The encoder before any training: what every probe must be compared with."""
        return to_arrays(build_model(self._job, self._train.shape))


class _Corrupted:
    """A table whose examples are corrupted as they are read."""

    def __init__(self, data: Any, kind: str, severity: int, seed: int) -> None:
        self._data, self._how, self.device = data, (kind, severity, seed), data.device

    def batch(self, index: Tensor) -> Tensor:
        return corrupt(self._data.batch(index), *self._how)


def collapse(features: Tensor) -> dict[str, float]:
    """The label-free diagnostics of one feature matrix (N, D)."""
    return {
        "rankme": diagnostics.rankme(features),
        "effective_rank": diagnostics.effective_rank(features),
        "feature_std": diagnostics.feature_std(features),
        "uniformity": diagnostics.uniformity(features),
    }


def _sample(n: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(n) if n <= limit else np.sort(rng.choice(n, limit, replace=False))
