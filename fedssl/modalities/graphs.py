"""Views of graphs: a batch of them as one large graph, and augmentation that treats each graph by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedssl.constants import constant
from fedssl.errors import ConfigError

CHOOSE = ("all", "one")
_OPERATIONS = ("subgraph", "node_drop", "edge_drop", "feature_mask")


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """B undirected graphs as one graph without links between them.

    Attributes:
        x: (N, F) float, the features of all nodes, graph after graph.
        links: (2, M) int64, the two ends of each link as rows of x; a link is stored once, in either direction.
        graph: (N,) int64, ascending: which graph each node belongs to, 0 to B - 1.
        count: B.

    Raises:
        ConfigError: tensors whose shapes do not fit.
    """

    x: Tensor
    links: Tensor
    graph: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.graph.shape != self.x.shape[:1] or self.links.ndim != 2 or len(self.links) != 2:
            raise ConfigError(
                f"Nodes {tuple(self.x.shape)}, links {tuple(self.links.shape)} and graph {tuple(self.graph.shape)} are "
                "no batch of graphs; give (N, F), (2, M) and (N,)."
            )

    def __len__(self) -> int:
        return self.count

    @property
    def edges(self) -> Tensor:
        """(2, 2 M) int64: every link in both directions, as message passing takes it."""
        return torch.cat((self.links, self.links.flip(0)), 1)

    @property
    def sizes(self) -> Tensor:
        """(B,) int64: the number of nodes of each graph."""
        return self.graph.new_zeros(self.count).index_add(0, self.graph, torch.ones_like(self.graph))

    def to(self, device: str | torch.device) -> GraphBatch:
        """The same graphs on `device`."""
        return GraphBatch(self.x.to(device), self.links.to(device), self.graph.to(device), self.count)

    def split(self, size: int) -> list[GraphBatch]:
        """Consecutive pieces of at most `size` graphs, as `Tensor.split` cuts rows."""
        firsts = range(0, self.count, size)
        at = torch.tensor([*firsts, self.count], device=self.graph.device)
        bounds = torch.searchsorted(self.graph, at).tolist()
        owner = self.graph[self.links[0]]  # (M,)
        pieces = []
        for first, start, end in zip(firsts, bounds[:-1], bounds[1:], strict=True):
            links = self.links[:, (owner >= first) & (owner < first + size)] - start
            pieces.append(
                GraphBatch(self.x[start:end], links, self.graph[start:end] - first, min(size, self.count - first))
            )
        return pieces

    def kept(self, nodes: Tensor, links: Tensor) -> GraphBatch:
        """What is left with the nodes (N,) bool and, of the links between them, those of (M,) bool."""
        links = links & nodes[self.links].all(0)
        number = nodes.cumsum(0) - 1
        return GraphBatch(self.x[nodes], number[self.links[:, links]], self.graph[nodes], self.count)


@dataclass(frozen=True)
class GraphViews:
    """Keeps a connected piece of each graph, then drops nodes and links, then masks features.

    Each is off at 0, or at (1, 1) for subgraphs. No graph is ever left without a node.

    Args:
        subgraph: smallest and largest share of the nodes kept, 0 < a <= b <= 1. The piece grows from a random node,
            always by the neighbour that a random delay reaches first; it is smaller where the graph falls apart.
        node_drop: probability that a node is removed, with its links.
        edge_drop: probability that a link is removed, in both directions.
        feature_mask: probability that the features of a node become 0 (after normalisation), all of them together.
        choose: "all" applies every operation; "one" applies one of those that are on, drawn for each graph.
        local_subgraph: share that local views keep (multi-crop); read where a method asks for them.
        mean: normalisation of node features, one number per feature, or one for all; one-hot features need none.
        std: one number per feature, or one for all.

    Raises:
        ConfigError: a value outside its range.

    References:
        You et al. 2020, arXiv:2010.13902 (GraphCL: the four operations, and one of them at random).
    """

    modality: ClassVar[str] = "graphs"
    reads: ClassVar[str] = "a fedssl.modalities.graphs.GraphBatch of nodes with the data's features"
    subgraph: tuple[float, ...] = (1.0, 1.0)
    node_drop: float = 0.2
    edge_drop: float = 0.2
    feature_mask: float = 0.2
    choose: str = "all"
    local_subgraph: tuple[float, ...] = (0.3, 0.6)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("node_drop", "edge_drop", "feature_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"augment.{name} is {getattr(self, name)} but it is a probability; choose it between 0 and 1."
                )
        for name in ("subgraph", "local_subgraph"):
            share = getattr(self, name)
            if len(share) != 2 or not 0 < share[0] <= share[1] <= 1:
                raise ConfigError(f"augment.{name} is {share} but needs two numbers 0 < smallest <= largest <= 1.")
        if self.choose not in CHOOSE:
            raise ConfigError(f"augment.choose is {self.choose!r}, which is not known; use {' or '.join(CHOOSE)}.")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not self.mean or len(self.std) not in (1, len(self.mean)) or min(self.std) <= 0 or not finite:
            raise ConfigError(
                f"augment.mean {self.mean} and augment.std {self.std} cannot normalise; give one mean per node "
                "feature, or one for all, and as many standard deviations above 0."
            )

    def views(self, x: GraphBatch, generator: torch.Generator, count: int) -> list[GraphBatch]:
        """Draws `count` independent views of every graph.

        View i depends on graph i and the generator only, and `x` is left as it is.

        Args:
            x: B graphs.
            generator: the only source of randomness; numbers are drawn on its device.
            count: number of views.

        Returns:
            `count` batches of B normalised graphs.
        """
        return [self._view(x, generator) for _ in range(count)]

    def local_views(self, x: GraphBatch, generator: torch.Generator, count: int) -> list[GraphBatch]:
        """Draws `count` views of small connected pieces (multi-crop, Caron et al. 2020, arXiv:2006.09882)."""
        small = replace(self, subgraph=self.local_subgraph, choose="all")
        return [small._view(x, generator) for _ in range(count)]

    def plain(self, x: GraphBatch) -> GraphBatch:
        """Only normalises the node features, for evaluation.

        Raises:
            ConfigError: the nodes have another number of features than `mean`.
        """
        if not any(self.mean) and all(std == 1 for std in self.std):
            return x
        if len(self.mean) not in (1, x.x.shape[1]):
            raise ConfigError(
                f"The nodes have {x.x.shape[1]} features but data.augment.mean has {len(self.mean)} numbers; "
                "give one per feature, or one for all."
            )
        mean, std = (constant(tuple(values), x.x) for values in (self.mean, self.std))
        return replace(x, x=(x.x - mean) / std)

    def _view(self, x: GraphBatch, generator: torch.Generator) -> GraphBatch:
        x = self.plain(x)
        nodes, links = (torch.ones(n, dtype=torch.bool, device=x.graph.device) for n in (len(x.x), x.links.shape[1]))
        on = self._chosen(x, generator)
        if "subgraph" in on:
            share = self.subgraph[0] + (self.subgraph[1] - self.subgraph[0]) * _uniform((x.count,), generator, x.x)
            share = torch.where(on["subgraph"], share, 1.0)
            nodes = connected(x, (share * x.sizes).ceil().long().clamp(min=1), generator)
        if "node_drop" in on:
            u = _uniform((len(x.x),), generator, x.x)
            spared = u >= self.node_drop * on["node_drop"][x.graph]
            score = torch.where(nodes, u, -1.0)
            nodes = nodes & (spared | (score == _largest(score, x)[x.graph]))
        if "edge_drop" in on:
            rate = self.edge_drop * on["edge_drop"][x.graph[x.links[0]]]
            links = _uniform((len(links),), generator, x.x) >= rate
        if "feature_mask" in on:
            masked = _uniform((len(x.x), 1), generator, x.x) < self.feature_mask * on["feature_mask"][x.graph, None]
            x = replace(x, x=x.x.masked_fill(masked, 0.0))
        return x.kept(nodes, links)

    def _chosen(self, x: GraphBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """The operations that are on, each with (B,) bool: whether a graph undergoes it."""
        on = [name for name in _OPERATIONS if self.subgraph[0] < 1 or name != "subgraph"]
        on = [name for name in on if name == "subgraph" or getattr(self, name) > 0]
        if self.choose == "all" or not on:
            return {name: torch.ones(x.count, dtype=torch.bool, device=x.graph.device) for name in on}
        drawn = (_uniform((x.count,), generator, x.x) * len(on)).long()
        return {name: drawn == i for i, name in enumerate(on)}


def connected(x: GraphBatch, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) bool: a random connected piece of each graph, with `wanted` (B,) nodes or all of one component.

    First-passage percolation: a random node of each graph is reached at time 0, every other node a random exponential
    delay after its first neighbour; the nodes reached first are taken. On the way it waits for the device once for each
    step along the longest path, so large graphs of large diameter cost most.
    """
    u = _uniform((2, len(x.x)), generator, x.x).double()
    place = torch.arange(len(x.x), device=x.graph.device)
    best = torch.where(u[0] == _largest(u[0], x)[x.graph], place, len(place))
    first = place.new_full((x.count,), len(place)).scatter_reduce(0, x.graph, best, "amin")
    delay = 1e-9 - torch.log1p(-u[1])  # never 0: a node comes after the one it is reached from
    time = torch.full_like(delay, math.inf).index_fill(0, first, 0.0)
    source, target = x.edges
    while True:
        earlier = time.scatter_reduce(0, target, time[source] + delay[target], "amin")
        if torch.equal(earlier, time):
            break
        time = earlier
    order = time.argsort(stable=True)
    order = order[x.graph[order].argsort(stable=True)]  # by graph, then by time
    before = x.sizes.cumsum(0) - x.sizes
    rank = torch.empty_like(place).index_copy_(0, order, place) - before[x.graph]
    return (rank < wanted[x.graph]) & time.isfinite()


def _largest(values: Tensor, x: GraphBatch) -> Tensor:
    """(B,) the largest of the nodes' values (N,), each at least -1, in each graph."""
    return values.new_full((x.count,), -1.0).scatter_reduce(0, x.graph, values, "amax")


def _uniform(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(like.device)
