"""What was learnt: features of merged and client encoders, measured on labelled data that training never sees."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import diagnostics, probes, seeds
from fedssl.job import Job
from fedssl.job.setup import build_model
from fedssl.measures import retrieval
from fedssl.measures.corruptions import SEVERITIES, corrupt
from fedssl.measures.outputs import CHAIN, Outputs, outputs, readable
from fedssl.method import Augment
from fedssl.modalities.pairs import SIDES
from fedssl.modalities.timeseries import Statistics
from fedssl.model import Model, load_arrays, tensors, to_arrays
from fedssl.parts import Arrays, part_of

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


@dataclass(frozen=True)
class Seen:
    """What the parts of one model give for the examples that are measured, without augmentation but for the views."""

    queries: Outputs  # of the test set
    bank: Outputs  # of the training set
    views: tuple[Outputs, Outputs]  # of the test set, two augmentations of at most 512 examples


class Evaluator:
    """Measures models of one job; holds one of each architecture and the data, all on the job's device.

    Args:
        job: what is evaluated.
        data: with `.train` and `.test` on the device; without targets only label-free diagnostics are measured.
        device: where features are computed.

    Attributes:
        bank: the rows of the training set that are measured.
    """

    def __init__(self, job: Job, data: Any, device: torch.device) -> None:
        self._job, self._device = job, device
        self._train, self._test = data.train, data.test
        self._models: dict[str, Model] = {}  # by the name of their encoder in `encoders`, the server's own by ""
        self._model = self._model_of(None)
        self._encoder: nn.Module = self._model["encoder"]
        rng = seeds.stream(job.seed, "evaluate")
        limit = job.evaluate.examples
        self.bank, self._queries = (_sample(len(part), limit, rng) for part in (self._train, self._test))

    @property
    def labelled(self) -> bool:
        """Whether probes are possible."""
        return self._train.targets is not None and self._test.targets is not None

    @property
    def parameters(self) -> list[str]:
        """The names of the arrays that are weights: no buffers, and no summaries of data."""
        names = [name for name, _ in self._model.named_parameters()]
        return [name for name in names if part_of(name) not in self._job.method.summaries]

    def partial(self, keys: Collection[str]) -> set[str]:
        """The parts of which these are some of the arrays and not all, and the heads on top of one."""
        names = [name for name, _ in tensors(self._model)]
        short = {part_of(name) for name in names if name not in keys}
        first = min([i for i, part in enumerate(CHAIN) if part in short], default=len(CHAIN))
        return short | set(CHAIN[first:])

    def look(self, arrays: Arrays, keys: Collection[str], client: int | None = None) -> Seen:
        """Pass the examples through a model; each encoder sees each set once.

        Args:
            arrays: of the whole model.
            keys: those that are the model's own; the parts of the others are not looked at.
            client: whose model, where clients have encoders of their own; None: the server's.
        """
        model = self._model_of(client)
        parts = _load(model, arrays, keys)
        sets = ((self._test, self._queries), (self._train, self.bank))
        queries, bank = (outputs(model, self._plain(data, rows), parts) for data, rows in sets)
        first, second = (outputs(model, [view], parts) for view in self._views())
        return Seen(queries, bank, (first, second))

    def queries(self, arrays: Arrays, keys: Collection[str]) -> Outputs:
        """As `look` at the server's model, of the test set alone."""
        return outputs(self._model, self._plain(self._test, self._queries), _load(self._model, arrays, keys))

    def _model_of(self, client: int | None) -> Model:
        name = self._job.encoder_name(client)
        if name not in self._models:
            self._models[name] = build_model(self._job, self._train.shape, client=client).to(self._device)
        return self._models[name]

    def _plain(self, data: Any, rows: np.ndarray) -> Iterator[Any]:
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(data.device)
        return (self._job.data.augment.plain(data.batch(part)) for part in torch.split(index, _BATCH))

    def _features(self, encoder: Mapping[str, np.ndarray], data: Any, rows: np.ndarray) -> Tensor:
        prefix = "encoder."
        load_arrays(self._encoder, {k.removeprefix(prefix): v for k, v in encoder.items() if k.startswith(prefix)})
        return encode(self._encoder, data, rows, self._job.data.augment)

    def knn(self, seen: Seen) -> float:
        """kNN accuracy of the encoder's features; only of labelled data."""
        return probes.knn(
            seen.bank["encoder"].numpy(),
            self._train.targets[self.bank],
            seen.queries["encoder"].numpy(),
            self._test.targets[self._queries],
            k=self._job.evaluate.knn_k,
        )

    def spectrum(self, arrays: Arrays) -> list[float]:
        """Eigenvalues of the feature covariance on the test set, descending."""
        return [float(v) for v in diagnostics.spectrum(self._features(arrays, self._test, self._queries))]

    def _views(self) -> Sequence[Any]:
        generator = seeds.torch_stream(self._job.seed, "evaluate", "views", device=self._device)
        rows = torch.from_numpy(self._queries[:_BATCH]).to(self._device)
        return self._job.data.augment.views(self._test.batch(rows), generator, 2)

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


def _load(model: Model, arrays: Arrays, keys: Collection[str]) -> tuple[str, ...]:
    """Fill those parts of a model that can be read where these keys are known, and name them."""
    parts, own = readable(model, keys), {name for name, _ in tensors(model)}
    load_arrays(model, {key: value for key, value in arrays.items() if part_of(key) in parts and key in own})
    return parts


def _sample(n: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(n) if n <= limit else np.sort(rng.choice(n, limit, replace=False))
