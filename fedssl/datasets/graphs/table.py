"""Graphs of any sizes in few tensors, and the one way from edge lists to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Groups, Labels, Shard, check_columns
from fedssl.errors import ConfigError
from fedssl.method import Examples
from fedssl.modalities.graphs import GraphBatch

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Graphs:
    """G undirected graphs, with targets (G,) int64 and groups (G,), or None where there are none.

    Labels are read by probes and partitioners only. `Graphs.of` builds one from any edge list.

    Attributes:
        x: (N, F) float32, the features of all nodes, graph after graph.
        links: (2, M) int64, the ends of each link as rows of x; each link once, graph after graph.
        node_offsets: (G + 1,) int64; the nodes of graph g are node_offsets[g] to node_offsets[g + 1].
        link_offsets: (G + 1,) int64, the same for its links.

    Raises:
        ConfigError: no graphs, a graph without nodes, links that leave their graph, values that are not finite, or
            arrays whose kinds or lengths do not fit.
    """

    x: Tensor
    links: Tensor
    node_offsets: Tensor
    link_offsets: Tensor
    targets: Labels | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.x.shape[1] == 0 or self.x.dtype != torch.float32:
            raise ConfigError(
                f"Node features of shape {tuple(self.x.shape)} and type {self.x.dtype} were found; "
                "give float32 of shape (N, F), with F at least 1 (a constant or the degree where there is nothing)."
            )
        if len(self) < 1:
            raise ConfigError("This data set holds no graph, so nothing can be trained; give at least one.")
        for name, offsets, n in (
            ("node_offsets", self.node_offsets, len(self.x)),
            ("link_offsets", self.link_offsets, self.links.shape[1]),
        ):
            steps = offsets.diff()
            if len(offsets) != len(self) + 1 or offsets[0] != 0 or offsets[-1] != n or bool((steps < 0).any()):
                raise ConfigError(f"{name} does not cut {n} rows into {len(self)} graphs; give ascending 0 to {n}.")
        sizes = self.node_offsets.diff()
        if bool((sizes < 1).any()):
            raise ConfigError(f"Graph {int((sizes < 1).nonzero()[0])} has no node; leave graphs without nodes out.")
        owner = torch.repeat_interleave(self.link_offsets.diff())
        low, high = self.node_offsets[owner], self.node_offsets[owner + 1]
        out = ((self.links < low) | (self.links >= high)).any(0) | (self.links[0] == self.links[1])
        if bool(out.any()):
            raise ConfigError(
                f"{int(out.sum())} links leave their graph or return to the same node, the first is number "
                f"{int(out.nonzero()[0])}; use Graphs.of, or correct them."
            )
        if not bool(torch.isfinite(self.x).all()):
            raise ConfigError("Some node features are not finite numbers; fill the gaps or leave those graphs out.")
        check_columns(len(self), self.targets, self.groups)

    @classmethod
    def of(
        cls,
        x: Array,
        edges: Array,
        node_offsets: Array,
        targets: Labels | None = None,
        groups: Groups | None = None,
    ) -> Graphs:
        """From edges in any order and direction, once or several times; self loops are left out.

        Args:
            x: (N, F) node features, graph after graph.
            edges: (2, E) whole numbers from 0 on, rows of x.
            node_offsets: (G + 1,).
            targets, groups: (G,), or None.

        Raises:
            ConfigError: as the class, and edges to nodes that do not exist or of other graphs.
        """
        n = len(x)
        offsets = np.asarray(node_offsets, np.int64)
        if edges.ndim != 2 or len(edges) != 2 or (edges.size and (edges.min() < 0 or edges.max() >= n)):
            raise ConfigError(
                f"Edges of shape {edges.shape} do not join the {n} nodes; give (2, E) numbers from 0 to {n - 1}."
            )
        low, high = np.minimum(*edges).astype(np.int64), np.maximum(*edges).astype(np.int64)
        number = np.unique((low * n + high)[low != high])
        links = np.stack((number // max(1, n), number % max(1, n)))  # sorted by the lower end, so graph after graph
        return cls(
            torch.from_numpy(np.ascontiguousarray(x, np.float32)),
            torch.from_numpy(links),
            torch.from_numpy(offsets),
            torch.from_numpy(np.searchsorted(links[0], offsets)),
            targets,
            groups,
        )

    def __len__(self) -> int:
        return len(self.node_offsets) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(F,)."""
        return (self.x.shape[1],)

    @property
    def device(self) -> torch.device:
        """Where the graphs are."""
        return self.x.device

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """A client's graphs."""
        return Shard.of(self, rows)

    def batch(self, index: Tensor) -> GraphBatch:
        """The graphs at (B,) int64 positions, copied, on the device. The sizes decide shapes, so it waits for it."""
        at = index.to(self.device)
        start, sizes = self.node_offsets[at], self.node_offsets[at + 1] - self.node_offsets[at]
        graph, nodes = _spans(start, sizes)
        owner, rows = _spans(self.link_offsets[at], self.link_offsets[at + 1] - self.link_offsets[at])
        moved = sizes.cumsum(0) - sizes - start  # from rows of the table to rows of the batch
        links = self.links.index_select(1, rows) + moved[owner]
        return GraphBatch(self.x.index_select(0, nodes), links, graph, len(at))

    def to(self, device: str | torch.device) -> Graphs:
        """The same data on `device`."""
        nodes, ends = self.node_offsets.to(device), self.link_offsets.to(device)
        return Graphs(self.x.to(device), self.links.to(device), nodes, ends, self.targets, self.groups)

    def subset(self, index: Tensor | NDArray[np.int64]) -> Graphs:
        """The graphs at these positions, in this order, copied."""
        rows = torch.as_tensor(index, dtype=torch.int64).cpu()
        pick = rows.numpy()
        batch, at = self.batch(rows), rows.to(self.device)
        links = self.link_offsets[at + 1] - self.link_offsets[at]
        targets = None if self.targets is None else self.targets[pick]
        groups = None if self.groups is None else self.groups[pick]
        return Graphs(batch.x, batch.links, _offsets(batch.sizes), _offsets(links), targets, groups)

    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each node feature: what data.augment.mean and .std can be set to."""
        variance, mean = torch.var_mean(self.x.double(), 0, correction=0)
        return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def degrees(edges: Array, nodes: int) -> NDArray[np.int64]:
    """(N,) how many neighbours each node has, from a (2, E) edge list as `Graphs.of` takes it."""
    low, high = np.minimum(*edges).astype(np.int64), np.maximum(*edges).astype(np.int64)
    number = np.unique((low * nodes + high)[low != high])
    return np.bincount(np.concatenate((number // max(1, nodes), number % max(1, nodes))), minlength=nodes)


def _offsets(lengths: Tensor) -> Tensor:
    """(n + 1,) from (n,): 0 and where each span ends."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def _spans(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """For each span its number, `length` times, and the positions start .. start + length - 1, one after the other."""
    owner = torch.repeat_interleave(length)
    before = length.cumsum(0) - length
    return owner, torch.arange(len(owner), device=owner.device) + (start - before)[owner]
