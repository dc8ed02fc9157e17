"""T7's raw material: the similarities of a trained model's projections, and what a temperature makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl import seeds
from fedssl.losses import negative_weights
from simulations.studies.tools.runs import Finished


@dataclass(frozen=True, eq=False)
class Scores:
    """Cosines of anchors with their positive and with the other views of their batch."""

    positive: Tensor  # (A,)
    negative: Tensor  # (A, K)

    @classmethod
    def of(cls, run: Finished, batch: int = 64, batches: int = 8) -> Scores:
        """The scores of NT-Xent in some batches, K = 2 (batch - 1)."""
        rng, generator = seeds.stream(0, "study", "scores"), seeds.torch_stream(0, "study", "scores")
        own, others = [], []
        for _ in range(batches):
            index = torch.from_numpy(rng.choice(len(run.data.train), batch, replace=False))
            z = F.normalize(torch.cat(run.projections(index, generator)).double(), dim=1)
            scores = z @ z.T  # (2B, 2B)
            partner = torch.arange(2 * batch).roll(batch)
            own.append(scores[torch.arange(2 * batch), partner])
            kept = ~torch.eye(2 * batch, dtype=torch.bool)
            kept[torch.arange(2 * batch), partner] = False
            others.append(scores[kept].view(2 * batch, -1))
        return cls(torch.cat(own), torch.cat(others))

    @property
    def moments(self) -> tuple[float, float, float, float, int]:
        """Mean and deviation of positive scores, the same of negative ones, and K: what the closed forms take."""
        p, n = self.positive, self.negative
        return float(p.mean()), float(p.std()), float(n.mean()), float(n.std()), n.shape[1]

    def _missing(self, temperature: float) -> Tensor:
        """(A,): 1 - p of the positive."""
        margin = (self.negative - self.positive[:, None]) / temperature
        return torch.sigmoid(torch.logsumexp(margin, dim=1))

    def probability(self, temperature: float) -> float:
        """The positive's mean softmax probability."""
        return 1 - float(self._missing(temperature).mean())

    def snr(self, temperature: float, floor: float) -> float:
        """`|E[g]| / sqrt(Var[g] + floor^2)` of g = (p - 1) / t over anchors."""
        g = self._missing(temperature) / temperature
        return float(g.mean() / (g.var() + floor**2).sqrt())

    def hardest(self, temperature: float) -> float:
        """The mean share of the hardest negative in the push of all."""
        return float(negative_weights(self.negative, temperature=temperature).amax(1).mean())

    def effective(self, temperature: float) -> float:
        """How many negatives push: the exponential of the entropy of their shares, averaged over anchors."""
        weights = negative_weights(self.negative, temperature=temperature)
        return float(torch.special.entr(weights).sum(1).exp().mean())
