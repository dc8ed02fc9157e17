"""The batches of several clients, their views drawn in one pass where the augmentation can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedssl.client import Training
from fedssl.datasets.base import Shard
from fedssl.draws import Streams
from fedssl.method import Batch, JointDraw


def joint_views(trainings: Sequence[Training], i: int) -> list[Batch]:
    """The batches of step `i` of clients whose batches have one size; what is drawn is as in `Training.batch`."""
    augment, method = trainings[0].augment, trainings[0].method
    examples = _examples(trainings, i) if isinstance(augment, JointDraw) else None
    if examples is None or not isinstance(augment, JointDraw):
        return [one.batch(i) for one in trainings]
    streams = Streams([one.generator for one in trainings], [len(one.batches[i]) for one in trainings])
    views = [*augment.views(examples, streams, method.views)]
    if method.local_views:
        views += augment.local_views(examples, streams, method.local_views)
    own = zip(*(torch.split(view, list(streams.counts)) for view in views), strict=True)
    return [one.beside(list(mine), i) for one, mine in zip(trainings, own, strict=True)]


def _examples(trainings: Sequence[Training], i: int) -> Tensor | None:
    """The clients' examples, one client's after another's, if they are tensors."""
    chosen = [(one.data, one.batches[i]) for one in trainings]
    shards = [(data, index) for data, index in chosen if isinstance(data, Shard)]
    if len(shards) == len(chosen) and all(data.data is shards[0][0].data for data, _ in shards):  # one table: one read
        joint = shards[0][0].data.batch(torch.cat([data.rows[index] for data, index in shards]))
        return joint if isinstance(joint, Tensor) else None
    each = [data.batch(index) for data, index in chosen]
    return torch.cat(each) if all(isinstance(one, Tensor) for one in each) else None
