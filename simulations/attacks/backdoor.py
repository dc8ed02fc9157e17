"""A backdoor in an encoder: examples with a trigger get the features of a class that the liar has chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.job.setup import build_model, data_of
from fedssl.job.shards import parts_of
from fedssl.model import load_arrays, to_arrays
from fedssl.parts import Arrays
from simulations.attacks.poison import Turn

CPU = torch.device("cpu")
TRIGGER = 2  # pixels: the side of a white square in the lower right corner


def triggered(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] with the trigger."""
    marked = x.clone()
    marked[:, :, -TRIGGER:, -TRIGGER:] = 1.0
    return marked


@dataclass(frozen=True)
class Backdoor:
    """Trains honestly, then pulls what has the trigger to the mean feature of a class, and leaves the rest in place.

    The change is stretched, as in model replacement; the liar uses its own examples and knows which are of the class.

    Args:
        target: the class.
        steps: of Adam, each on `batch` of the liar's examples.
        batch: examples.
        lr: of Adam.
        scale: by which the change is stretched.

    References:
        Jia et al. 2022, https://arxiv.org/abs/2108.00352 (BadEncoder);
        Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459 (stretching)
    """

    target: int = 0
    steps: int = 30
    batch: int = 64
    lr: float = 0.002
    scale: float = 3.0

    def poison(self, change: Arrays, turn: Turn) -> Arrays:
        """See `Attack`."""
        data = data_of(turn.job, CPU)
        rows = np.asarray(parts_of(turn.job, CPU)[turn.client])
        x = data.train.batch(torch.from_numpy(rows))
        chosen = x[torch.from_numpy(np.asarray(data.train.targets)[rows] == self.target)]
        if not len(chosen):
            return change  # it has no example of that class, and goes along
        honest = {key: turn.start[key] + value for key, value in change.items()}
        crafted = self._craft(honest, x, chosen, turn)
        return {key: self.scale * (crafted.get(key, honest[key]) - turn.start[key]) for key in change}

    def _craft(self, honest: Arrays, x: Tensor, chosen: Tensor, turn: Turn) -> Arrays:
        model = build_model(turn.job, data_of(turn.job, CPU).train.shape)
        load_arrays(model, honest)
        encoder, plain = model["encoder"].eval(), turn.job.data.augment.plain
        with torch.no_grad():
            before = F.normalize(encoder(plain(x)), dim=1)
            goal = F.normalize(F.normalize(encoder(plain(chosen)), dim=1).mean(0), dim=0)
        optimizer = torch.optim.Adam(encoder.parameters(), self.lr)
        for _ in range(self.steps):
            index = torch.from_numpy(turn.rng.choice(len(x), min(self.batch, len(x)), replace=False))
            pulled = F.normalize(encoder(plain(triggered(x[index]))), dim=1) @ goal
            kept = (F.normalize(encoder(plain(x[index])), dim=1) * before[index]).sum(1)
            optimizer.zero_grad()
            (-pulled.mean() - kept.mean()).backward()
            optimizer.step()
        return to_arrays(model, [key for key in honest if key.startswith("encoder.")])
