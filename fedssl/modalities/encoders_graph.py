"""A network that turns batches of graphs into features (B, dim)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.modalities.graphs import GraphBatch
from fedssl.networks.norms import norm1d

READOUTS = ("sum", "mean")


@dataclass(frozen=True)
class GIN:
    """A graph isomorphism network: h <- MLP((1 + eps) h + sum of the neighbours' h), then a sum or mean over the nodes.

    The MLP has two linear maps, each followed by a norm over the node's channels and a ReLU. `group` and `layer` treat
    every node by itself; `batch` takes statistics over the nodes of all graphs of the batch and so couples them.

    Args:
        layers: number of rounds of message passing; how far a node sees.
        width: channels of every layer.
        norm: "batch", "group", "layer" or "none".
        eps: weight of a node itself beside its neighbours, above 1.
        learn_eps: learn an offset to eps, one number a layer.
        readout: "sum" keeps the size of a graph in its features, "mean" does not.
        jumping: concatenate the readouts of all layers (layers * width features) rather than take the last (width).

    Raises:
        ConfigError: layers or width below 1, an unknown norm or readout.

    References:
        Xu et al. 2019, arXiv:1810.00826 (eq. 4.1 and 4.2; here without the readout of the input).
    """

    modality: ClassVar[str] = "graphs"
    layers: int = 3
    width: int = 32
    norm: str = "group"
    eps: float = 0.0
    learn_eps: bool = True
    readout: str = "sum"
    jumping: bool = True

    def __post_init__(self) -> None:
        for name, value in (("layers", self.layers), ("width", self.width)):
            if value < 1:
                raise ConfigError(f"encoder.{name} is {value} but a network needs layers of channels; use at least 1.")
        if self.readout not in READOUTS:
            raise ConfigError(f"encoder.readout is {self.readout!r}, which is not known; use {' or '.join(READOUTS)}.")

    def make(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """The network for graphs whose nodes have `shape` (F,), and its feature size."""
        sizes = [shape[0], *[self.width] * self.layers]
        layers = [_Layer(a, b, self.norm, self.eps, self.learn_eps) for a, b in pairwise(sizes)]
        network = _Network(layers, mean=self.readout == "mean", jumping=self.jumping)
        return network, self.width * (self.layers if self.jumping else 1)


class _Network(nn.Module):
    def __init__(self, layers: list[_Layer], *, mean: bool, jumping: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.mean, self.jumping = mean, jumping

    def forward(self, batch: GraphBatch) -> Tensor:
        source, target = batch.edges
        h, read = batch.x, []
        for layer in self.layers:
            h = layer(h, source, target)
            read.append(h)
        if not self.jumping:
            read = read[-1:]
        nodes = torch.cat(read, 1)  # (N, dim)
        nodes = nodes.to(_at_least_float32(nodes))
        total = nodes.new_zeros(batch.count, nodes.shape[1]).index_add(0, batch.graph, nodes)
        return total / batch.sizes.unsqueeze(1) if self.mean else total


class _Layer(nn.Module):
    """One round of message passing, summed in float32 also under autocast."""

    def __init__(self, fan_in: int, width: int, norm: str, eps: float, learn_eps: bool) -> None:
        super().__init__()
        # A norm over channels forgets the scale of its input; with a bias, one neighbour more still shows.
        bias = norm != "batch"
        self.linear1, self.norm1 = nn.Linear(fan_in, width, bias), norm1d(norm, width)
        self.linear2, self.norm2 = nn.Linear(width, width, bias), norm1d(norm, width)
        self.own = 1 + eps
        self.eps = nn.Parameter(torch.zeros(())) if learn_eps else None

    def forward(self, h: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = h.to(_at_least_float32(h))
        own = h * (self.own if self.eps is None else self.own + self.eps)
        h = own.index_add(0, target, h.index_select(0, source))
        h = F.relu(self.norm1(self.linear1(h)))
        return F.relu(self.norm2(self.linear2(h)))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
