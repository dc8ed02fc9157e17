"""The workload in pfl-research (Granqvist et al. 2024, arXiv:2404.06430): its FedAvg, simulated in one process.

It asks for an older dp-accounting than fedssl does, so it lives in a folder of its own: see docs/engines.md.
"""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedssl import seeds
from fedssl.job import Job, split
from fedssl.job.setup import build_model
from fedssl.method import Batch, Step
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from fedssl.progress import Reporter

TITLE = "pfl-research"


def federate(job: Job, reporter: Reporter) -> Arrays:
    """Train as `benchmarks.workload.by_hand` does, with pfl-research's loops in place of those; its last arrays."""
    torch.set_num_threads(job.threads)
    data, local = job.data.load().train, job.local
    clients = [torch.as_tensor(rows) for rows in split(job, data)]
    model, generator = build_model(job, data.shape).train(), seeds.torch_stream(job.seed, TITLE)

    class Pretraining(nn.Module):
        """What pfl-research calls a model: a loss of what it has sliced from a user's rows."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def loss(self, rows: Tensor, _: Tensor) -> Tensor:
            views = job.data.augment.views(data.batch(rows), generator, job.method.views)
            return job.method.loss(self.parts, Batch(list(views), rows), Step(1, 1, 0, 1)).loss

        def metrics(self, *_: Tensor) -> dict[str, Any]:
            return {}

    class Rounds(TrainingProcessCallback):  # type: ignore[misc]  # pfl-research is untyped
        """Tells the reporter of each round."""

        def after_central_iteration(self, _: Any, __: Any, *, central_iteration: int) -> tuple[bool, Any]:
            reporter.round(central_iteration + 1, {})
            return False, Metrics()

    def user(client: int) -> Any:
        rows = clients[client][torch.randperm(len(clients[client]), generator=generator)]
        return Dataset((rows, rows))  # its evaluation takes features and labels

    users = FederatedDataset(user, MinimizeReuseUserSampler(range(len(clients))))
    pretraining, rounds = Pretraining(), job.federation.rounds

    def descent(parameters: Any, lr: float) -> Any:
        return torch.optim.SGD(parameters, lr, local.momentum, weight_decay=local.weight_decay)

    reporter.begin(TITLE, 0, rounds)
    FederatedAveraging().run(
        NNAlgorithmParams(
            rounds, evaluation_frequency=rounds + 1, train_cohort_size=len(clients), val_cohort_size=None
        ),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        PyTorchModel(pretraining, descent, torch.optim.SGD(pretraining.parameters(), 1.0)),
        NNTrainHyperParams(local.batch_size, local_num_epochs=local.epochs, local_learning_rate=local.lr),
        callbacks=[Rounds()],
        send_metrics_to_platform=False,
    )
    return to_arrays(model)
