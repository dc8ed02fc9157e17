"""Graphs: the batch, its views, the network, the loaders, and federated runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import execute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedssl
from fedssl import config
from fedssl.config import Plan
from fedssl.datasets.base import Shard
from fedssl.datasets.graphs.synthetic import KINDS, SyntheticGraphs
from fedssl.datasets.graphs.table import Graphs, degrees
from fedssl.datasets.graphs.tu import TuFolder, TuNpz
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient
from fedssl.job.setup import build_model
from fedssl.measures.corruptions import corrupt
from fedssl.method import Batch, MultiCrop, Step
from fedssl.modalities.encoders_graph import GIN
from fedssl.modalities.graphs import GraphBatch, GraphViews, connected
from fedssl.model import seed_parameters

REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tu_graphs.npz"
OFF = GraphViews(node_drop=0, edge_drop=0, feature_mask=0)
ALL = GraphViews(subgraph=(0.5, 0.9))
SMALL = SyntheticGraphs(train=60, test=20, size=12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graphs(n: int = 8, size: int = 14, seed: int = 0) -> GraphBatch:
    table = SyntheticGraphs(train=n, test=1, size=size, seed=seed).load().train
    batch: GraphBatch = table.batch(torch.arange(n))
    return batch


def one(views: GraphViews, x: GraphBatch, seed: int = 0) -> GraphBatch:
    return views.views(x, generator(seed), 1)[0]


def same(a: GraphBatch, b: GraphBatch) -> bool:
    return a.count == b.count and all(
        torch.equal(p, q) for p, q in ((a.x, b.x), (a.links, b.links), (a.graph, b.graph))
    )


def marked(x: GraphBatch) -> GraphBatch:
    """Each node with its own number as its feature, so that views say which nodes they kept."""
    return replace(x, x=torch.arange(1.0, len(x.x) + 1).unsqueeze(1))


def pairs(x: GraphBatch) -> set[tuple[int, int]]:
    """The links, by the numbers of `marked`."""
    ends = x.x[x.links, 0].int()
    return {(int(min(a, b)), int(max(a, b))) for a, b in ends.T}


def components(nodes: list[int], links: set[tuple[int, int]]) -> int:
    root = {node: node for node in nodes}

    def find(node: int) -> int:
        while root[node] != node:
            node = root[node]
        return node

    for a, b in links:
        root[find(a)] = find(b)
    return len({find(node) for node in nodes})


# --- the batch


def test_a_batch_of_graphs_is_cut_as_rows_are() -> None:
    x = graphs(7)
    for size in (1, 2, 3, 7, 100):
        pieces = x.split(size)
        assert [len(piece) for piece in pieces] == [len(part) for part in torch.arange(7).split(size)]
        shift = 0
        links = []
        for piece in pieces:
            links.append(piece.links + shift)
            shift += len(piece.x)
        assert torch.equal(torch.cat([piece.x for piece in pieces]), x.x)
        assert torch.equal(torch.cat([piece.sizes for piece in pieces]), x.sizes)
        assert torch.equal(torch.cat(links, 1), x.links)
    assert same(x.to("cpu"), x)
    assert len(x) == 7
    assert torch.equal(x.edges[:, x.links.shape[1] :], x.links.flip(0))


def test_tensors_that_are_no_batch_are_refused() -> None:
    x = graphs()
    for bad in ({"x": x.x[1:]}, {"links": x.links.T}, {"graph": x.graph.unsqueeze(1)}):
        with pytest.raises(ConfigError, match="no batch of graphs"):
            replace(x, **bad)


# --- views


@pytest.mark.parametrize("views", [ALL, replace(ALL, choose="one"), GraphViews()])
def test_views_are_seeded_differ_and_leave_the_graphs_alone(views: GraphViews) -> None:
    x = graphs()
    before = replace(x, x=x.x.clone(), links=x.links.clone(), graph=x.graph.clone())
    first, second = views.views(x, generator(), 2)
    again = views.views(x, generator(), 2)
    assert same(first, again[0])
    assert same(second, again[1])
    assert not same(first, second)
    assert same(x, before)
    state = torch.get_rng_state()
    one(views, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(views, MultiCrop)


@pytest.mark.parametrize("views", [ALL, replace(ALL, choose="one"), GraphViews()])
def test_a_view_depends_on_its_own_graph_only(views: GraphViews) -> None:
    x = graphs()
    node, link = int((x.graph == 3).nonzero()[0]), int((x.graph[x.links[0]] == 3).nonzero()[0])
    features, links = x.x.clone(), x.links.clone()
    features[node] = 7.0
    last = int((x.graph == 3).nonzero()[-1])
    links[:, link] = torch.tensor([last, last - 1])  # another link in its place
    changed = replace(x, x=features, links=links)
    changes = 0
    for seed in range(10):
        here, there = one(views, x, seed).split(1), one(views, changed, seed).split(1)
        assert all(same(a, b) for i, (a, b) in enumerate(zip(here, there, strict=True)) if i != 3)
        changes += not same(here[3], there[3])
    assert changes > 3


def test_everything_off_only_normalises() -> None:
    x = graphs()
    assert same(one(OFF, x), x)
    assert OFF.plain(x) is x
    shifted = replace(OFF, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 1.0, 2.0, 4.0))
    expected = (x.x - torch.tensor([0.1, 0.2, 0.3, 0.4])) / torch.tensor([0.5, 1.0, 2.0, 4.0])
    assert torch.equal(one(shifted, x).x, expected)
    assert torch.equal(shifted.plain(x).x, expected)
    with pytest.raises(ConfigError, match="4 features"):
        replace(OFF, mean=(0.1, 0.2)).plain(x)


def test_an_edge_goes_in_both_directions_and_as_often_as_it_says() -> None:
    x = marked(graphs(100))
    out = one(replace(OFF, edge_drop=0.3), x)
    assert torch.equal(out.x, x.x)
    assert pairs(out) < pairs(x)
    assert out.links.shape[1] / x.links.shape[1] == pytest.approx(0.7, abs=0.04)
    directed = {(int(a), int(b)) for a, b in out.edges.T}
    assert {(b, a) for a, b in directed} == directed
    assert one(replace(OFF, edge_drop=1), x).links.shape[1] == 0


def test_a_masked_node_loses_all_its_features() -> None:
    x = graphs(100)
    out = one(replace(OFF, feature_mask=0.3), x)
    gone = (out.x == 0).all(1)
    assert torch.equal(out.x[~gone], x.x[~gone])
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(out.links, x.links)
    assert one(replace(OFF, feature_mask=1), x).x.abs().sum() == 0


@pytest.mark.parametrize("rate", [0.3, 0.97, 1.0])
def test_dropped_nodes_take_their_links_and_leave_at_least_one_node(rate: float) -> None:
    x = marked(graphs(100))
    out = one(replace(OFF, node_drop=rate), x)
    kept = {int(v) for v in out.x[:, 0]}
    assert pairs(out) == {(a, b) for a, b in pairs(x) if a in kept and b in kept}
    assert out.sizes.min() >= 1
    assert torch.equal(out.graph, x.graph[out.x[:, 0].long() - 1])
    if rate == 1:
        assert torch.equal(out.sizes, torch.ones_like(out.sizes))
    if rate < 0.5:
        assert len(out.x) / len(x.x) == pytest.approx(1 - rate, abs=0.03)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.75, 1.0])
def test_a_subgraph_is_one_connected_piece_of_the_size_it_says(share: float) -> None:
    x = marked(graphs(60))
    wanted = (share * x.sizes).ceil().long()
    kept = connected(x, wanted, generator())
    for g in range(x.count):
        own = [int(v) for v in x.x[(x.graph == g), 0]]
        piece = [int(v) for v in x.x[(x.graph == g) & kept, 0]]
        inside = {(a, b) for a, b in pairs(x) if a in piece and b in piece}
        assert components(piece, inside) == 1
        if components(own, {(a, b) for a, b in pairs(x) if a in own and b in own}) == 1:
            assert len(piece) == int(wanted[g])
        assert 1 <= len(piece) <= int(wanted[g])
    out = one(replace(OFF, subgraph=(share, share)), x) if share < 1 else x
    assert out.count == x.count
    assert out.sizes.min() >= 1


def test_a_subgraph_may_be_anywhere_and_goes_along_a_path() -> None:
    path = GraphBatch(
        torch.arange(10.0).unsqueeze(1), torch.stack((torch.arange(9), torch.arange(1, 10))), torch.zeros(10).long(), 1
    )
    seen = torch.zeros(10)
    for seed in range(200):
        kept = connected(path, torch.tensor([4]), generator(seed))
        places = kept.nonzero()[:, 0]
        assert len(places) == 4
        assert int(places[-1] - places[0]) == 3
        seen += kept
    assert float(seen.min()) > 10


def test_one_operation_a_graph_where_asked() -> None:
    x = marked(graphs(300))
    out = one(GraphViews(node_drop=1, edge_drop=1, feature_mask=1, choose="one"), x)
    alone = out.sizes == 1
    masked = torch.zeros(300, dtype=torch.bool).index_put((out.graph[out.x[:, 0] == 0],), torch.tensor(True))
    linked = torch.zeros(300, dtype=torch.bool).index_put((out.graph[out.links[0]],), torch.tensor(True))
    assert torch.equal(alone.int() + masked.int() + (~alone & ~linked).int(), torch.ones(300).int())
    for count in (alone, masked, ~linked & ~alone):
        assert 70 < int(count.sum()) < 130


def test_local_views_are_smaller() -> None:
    x = graphs(50)
    first, second = OFF.local_views(x, generator(), 2)
    share = first.sizes / x.sizes
    assert not same(first, second)
    assert 0.3 <= float(share.median()) <= 0.65
    assert float(share.max()) <= 0.75  # rounded up


@pytest.mark.parametrize(
    "bad",
    [
        {"node_drop": 1.5},
        {"edge_drop": -0.1},
        {"feature_mask": float("nan")},
        {"subgraph": (0.0, 1.0)},
        {"subgraph": (0.9, 0.5)},
        {"subgraph": (0.5,)},
        {"local_subgraph": (0.5, 1.5)},
        {"choose": "two"},
        {"mean": ()},
        {"std": (0.0,)},
        {"mean": (float("inf"),)},
    ],
)
def test_view_values_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"augment.{next(iter(bad))}|augment.std"):
        GraphViews(**bad)


# --- the network


def network(encoder: GIN, features: int = 4, seed: int = 0) -> nn.Module:
    net, _ = encoder.make((features,))
    seed_parameters(net, seed)
    return net


def slow_norm(kind: str, h: Tensor, groups: int) -> Tensor:
    """Over the nodes (batch) or over groups of channels of each node, by loops."""
    out = torch.empty_like(h)
    if kind == "none":
        return h
    if kind == "batch":
        for c in range(h.shape[1]):
            out[:, c] = (h[:, c] - h[:, c].mean()) / (h[:, c].var(correction=0) + 1e-5).sqrt()
        return out
    for i in range(len(h)):
        for part in torch.arange(h.shape[1]).chunk(groups):
            values = h[i, part]
            out[i, part] = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    return out


def slow_gin(net: Any, encoder: GIN, x: GraphBatch) -> Tensor:
    """The same from a dense adjacency matrix, node by node."""
    n = len(x.x)
    adjacency = torch.zeros(n, n)
    for a, b in x.links.T.tolist():
        adjacency[a, b] += 1
        adjacency[b, a] += 1
    h, read = x.x.double(), []
    for layer in net.layers:
        own = 1 + encoder.eps + (0.0 if layer.eps is None else layer.eps.item())
        rows = []
        for i in range(n):
            total = own * h[i]
            for j in range(n):
                total = total + adjacency[i, j] * h[j]
            rows.append(total)
        h = torch.stack(rows)
        groups = getattr(layer.norm1, "num_groups", 1)
        h = slow_norm(encoder.norm, F.linear(h, layer.linear1.weight, layer.linear1.bias), groups).clamp(min=0)
        h = slow_norm(encoder.norm, F.linear(h, layer.linear2.weight, layer.linear2.bias), groups).clamp(min=0)
        pooled = torch.zeros(x.count, h.shape[1], dtype=h.dtype)
        for i, g in enumerate(x.graph.tolist()):
            pooled[g] += h[i] / (int((x.graph == g).sum()) if encoder.readout == "mean" else 1)
        read.append(pooled)
    return torch.cat(read if encoder.jumping else read[-1:], 1)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize(
    ("readout", "jumping", "learn", "eps"), [("sum", True, True, 0.0), ("mean", False, False, 0.3)]
)
def test_gin_equals_a_slow_dense_reference(norm: str, readout: str, jumping: bool, learn: bool, eps: float) -> None:
    encoder = GIN(layers=3, width=32, norm=norm, readout=readout, jumping=jumping, learn_eps=learn, eps=eps)
    net = network(encoder).double()
    x = graphs(4, size=8)
    x = replace(x, x=x.x.double())
    out = net(x)
    assert out.shape == (4, encoder.make((4,))[1]) == (4, 96 if jumping else 32)
    torch.testing.assert_close(out, slow_gin(net, encoder, x), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["group", "layer", "none"]), st.sampled_from(["sum", "mean"]))
def test_features_do_not_depend_on_the_order_of_nodes_links_and_directions(seed: int, norm: str, readout: str) -> None:
    rng = np.random.default_rng(seed)
    net = network(GIN(width=16, norm=norm, readout=readout), features=3).double()
    n = int(rng.integers(1, 12))
    x = torch.from_numpy(rng.normal(size=(n, 3)))
    low, high = np.triu_indices(n, 1)
    chosen = rng.random(len(low)) < 0.4
    links = torch.from_numpy(np.stack((low[chosen], high[chosen])))
    plain = GraphBatch(x, links, torch.zeros(n, dtype=torch.int64), 1)
    order = rng.permutation(n)
    place = torch.from_numpy(np.argsort(order))
    shuffled = place[links][:, torch.from_numpy(rng.permutation(links.shape[1]))]
    turned = torch.from_numpy(rng.random(links.shape[1]) < 0.5)
    shuffled = torch.where(turned, shuffled.flip(0), shuffled)
    moved = GraphBatch(x[torch.from_numpy(order)], shuffled, plain.graph, 1)
    torch.testing.assert_close(net(plain), net(moved), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_without_batch_norm_a_feature_depends_on_its_own_graph_only(norm: str) -> None:
    net = network(GIN(norm=norm))
    x = graphs(6)
    whole = net(x)
    torch.testing.assert_close(whole, torch.cat([net(piece) for piece in x.split(1)]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, torch.cat([net(piece) for piece in x.split(4)]), rtol=1e-5, atol=1e-5)
    features = x.x.clone()
    features[x.graph == 2] = 0
    changed = net(replace(x, x=features))
    assert torch.equal(whole[[0, 1, 3, 4, 5]], changed[[0, 1, 3, 4, 5]])
    assert not torch.equal(whole[2], changed[2])


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_a_norm_over_channels_still_counts_equal_neighbours(norm: str) -> None:
    """Nodes alike, with 1 to 3 neighbours alike: a norm without a bias before it would see no difference."""
    net = network(GIN(layers=1, norm=norm, readout="mean"), features=2)
    rings = [Graphs.of(np.ones((n, 2)), np.stack(np.triu_indices(n, 1)), np.array([0, n])) for n in (2, 3, 4)]
    out = torch.cat([net(ring.batch(torch.tensor([0]))) for ring in rings])
    assert torch.pdist(out).min().item() > 1e-3


def test_single_nodes_and_graphs_without_links_have_features_and_gradients() -> None:
    net = network(GIN(readout="mean"), features=2)
    x = GraphBatch(torch.ones(3, 2), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1, 1]), 2)
    out = net(x)
    torch.testing.assert_close(out[0], out[1])
    net(graphs(3).__class__(torch.rand(3, 2), torch.tensor([[1], [2]]), x.graph, 2)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_bf16_is_close_to_float32() -> None:
    net = network(GIN())
    x = graphs(8)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    assert half.dtype == torch.float32
    half.sum().backward()
    assert F.cosine_similarity(half, net(x)).min().item() > 0.999


@pytest.mark.parametrize("bad", [{"layers": 0}, {"width": 0}, {"readout": "max"}])
def test_networks_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"encoder.{next(iter(bad))}"):
        GIN(**bad)
    with pytest.raises(ConfigError, match="norm"):
        GIN(norm="instance").make((3,))


# --- the table


def test_a_table_gives_the_graphs_it_was_asked_for() -> None:
    table = SMALL.load().train
    index = torch.tensor([5, 0, 59, 5])
    batch = table.batch(index)
    for i, piece in zip(index.tolist(), batch.split(1), strict=True):
        start, end = (int(v) for v in table.node_offsets[i : i + 2])
        first, last = (int(v) for v in table.link_offsets[i : i + 2])
        assert torch.equal(piece.x, table.x[start:end])
        assert torch.equal(piece.links, table.links[:, first:last] - start)
    assert (table.shape, len(table), table.device.type) == ((4,), 60, "cpu")
    part = table.to("cpu").subset(np.array([5, 0, 59]))
    assert same(part.batch(torch.arange(3)), table.batch(index[:3]))
    assert part.targets is not None
    assert part.targets.tolist() == table.targets[[5, 0, 59]].tolist()
    assert part.groups.tolist() == table.groups[[5, 0, 59]].tolist()
    shard = table.shard(np.array([7, 3]), 0)
    assert isinstance(shard, Shard)
    assert same(shard.batch(torch.tensor([1])), table.batch(torch.tensor([3])))
    assert len(table.constants()[0]) == 4
    assert sum(table.constants()[0]) == pytest.approx(1)
    assert (
        Graphs.of(np.ones((2, 1)), np.zeros((2, 0), int), np.array([0, 1, 2])).subset(torch.tensor([1])).groups is None
    )


def test_an_edge_list_may_be_in_any_order_direction_and_number() -> None:
    edges = np.array([[4, 0, 1, 1, 3, 2, 4], [3, 1, 0, 2, 4, 2, 3]])
    table = Graphs.of(np.ones((5, 1)), edges, np.array([0, 3, 5]), np.array([0, 1]))
    assert table.links.tolist() == [[0, 1, 3], [1, 2, 4]]
    assert table.link_offsets.tolist() == [0, 2, 3]
    assert degrees(edges, 5).tolist() == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.ones(5)}, "shape"),
        ({"x": np.ones((5, 0))}, "F at least 1"),
        ({"x": np.full((5, 1), np.nan)}, "finite"),
        ({"edges": np.array([[0], [3]])}, "leave their graph"),
        ({"edges": np.array([[0], [9]])}, "0 to 4"),
        ({"edges": np.array([[-1], [0]])}, "0 to 4"),
        ({"edges": np.array([0, 1])}, "join"),
        ({"node_offsets": np.array([0])}, "no graph"),
        ({"node_offsets": np.array([0, 3, 3, 5])}, "no node"),
        ({"node_offsets": np.array([0, 3, 6])}, "node_offsets"),
        ({"targets": np.array([0])}, "one per example"),
        ({"groups": np.array([0])}, "one per example"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    good = {"x": np.ones((5, 1)), "edges": np.array([[0, 3], [1, 4]]), "node_offsets": np.array([0, 3, 5])}
    with pytest.raises(ConfigError, match=words):
        Graphs.of(**{**good, **change})


def test_links_of_a_node_to_itself_are_refused_by_the_table() -> None:
    good = SMALL.load().train
    with pytest.raises(ConfigError, match="same node"):
        replace(good, links=torch.zeros_like(good.links))


def test_graphs_cannot_be_corrupted_as_images() -> None:
    with pytest.raises(ConfigError, match="images and time series"):
        corrupt(graphs(), "noise", 1, 0)  # type: ignore[arg-type]


# --- drawn graphs


def test_drawn_graphs_come_from_their_seed() -> None:
    one, two = SMALL.load(), SMALL.load()
    assert same(one.train.batch(torch.arange(60)), two.train.batch(torch.arange(60)))
    other = replace(SMALL, seed=1).load()
    assert not same(one.train.batch(torch.arange(60)), other.train.batch(torch.arange(60)))
    assert one.classes == ("tree", "grid", "cliques", "stars", "ring")
    assert np.bincount(one.train.targets).tolist() == [12] * 5
    sizes = one.train.node_offsets.diff()
    assert 4 <= int(sizes.min()) < 12 < int(sizes.max()) <= 20
    styles = SyntheticGraphs().load().train
    assert len(np.unique(styles.groups)) == 20


@pytest.mark.parametrize(("kind", "n"), [(k, n) for k in range(5) for n in (4, 7, 12, 25)])
def test_each_class_links_all_its_nodes(kind: int, n: int) -> None:
    links = KINDS[kind][1](n, np.random.default_rng(0))
    count = degrees(links, n)
    assert components(list(range(n)), {(int(a), int(b)) for a, b in links.T}) == 1
    assert len(np.unique(np.sort(links, 0), axis=1).T) == links.shape[1]
    if KINDS[kind][0] == "tree":
        assert count.sum() == 2 * (n - 1)
    if KINDS[kind][0] == "ring":
        assert set(count) == {2}
    if KINDS[kind][0] == "cliques":
        assert count.max() == (3 if n == 4 else 4)


@pytest.mark.parametrize("bad", [{"classes": 6}, {"classes": 1}, {"train": 0}, {"size": 4}, {"noise": 2.0}])
def test_drawn_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="classes|at least 1 graph"):
        SyntheticGraphs(**bad)


# --- the TU collection: six graphs of two classes, three nodes a graph

INDICATOR = np.repeat(np.arange(6), 3)
EDGES = np.concatenate([np.array([[0, 1, 1, 2], [1, 0, 2, 1]]) + 3 * g for g in range(6)], 1)
LABELS = np.array([-1, 1, -1, 1, -1, 1])
NODES = np.tile([3, 8, 3], 6)


def folder(path: Path, name: str = "DS", **files: np.ndarray | str | None) -> TuFolder:
    path.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"A": EDGES.T + 1, "graph_indicator": INDICATOR + 1, "graph_labels": LABELS, **files}
    for kind, value in content.items():
        if isinstance(value, str):
            (path / f"{name}_{kind}.txt").write_text(value)
        elif value is not None:
            np.savetxt(path / f"{name}_{kind}.txt", value, fmt="%g", delimiter=", ")
    return TuFolder(str(path), name, test_fraction=1 / 3, degree_cap=2)


def npz(path: Path, **arrays: np.ndarray | None) -> TuNpz:
    content: dict[str, Any] = {
        "DS_node_offsets": np.arange(0, 19, 3, dtype=np.int32),
        "DS_edge_index": EDGES.astype(np.int32),
        "DS_graph_labels": (LABELS > 0).astype(np.uint8),
        "DS_graph_label_values": np.array([-1, 1], np.int32),
        **{f"DS_{kind}" if kind != "other" else kind: value for kind, value in arrays.items()},
    }
    np.savez(path / "file.npz", **{key: value for key, value in content.items() if value is not None})
    return TuNpz(str(path / "file.npz"), "DS", test_fraction=1 / 3, degree_cap=2)


@pytest.mark.parametrize("source", [folder, npz])
def test_both_forms_of_the_collection_give_the_same_graphs(tmp_path: Path, source: Callable[..., Any]) -> None:
    data = source(tmp_path, node_labels=NODES).load()
    assert (len(data.train), len(data.test), data.classes) == (4, 2, ("-1", "1"))
    assert sorted(data.test.targets.tolist()) == [0, 1]
    batch = data.train.batch(torch.arange(4))
    assert torch.equal(batch.x, torch.tensor([[1.0, 0], [0, 1], [1, 0]]).repeat(4, 1))
    assert batch.links.T.tolist() == [[i, i + 1] for i in range(12) if i % 3 < 2]
    assert data.train.groups is None
    both = replace(source(tmp_path, node_labels=NODES), features="both").load()
    assert torch.equal(both.train.x, torch.tensor([[0.0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [0, 1, 0, 1, 0]]).repeat(4, 1))
    assert replace(source(tmp_path, node_labels=NODES), features="degrees").load().train.shape == (3,)


def test_without_node_labels_the_degree_is_the_feature(tmp_path: Path) -> None:
    data = folder(tmp_path).load()
    assert torch.equal(data.train.x[:3], torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 1, 0]]))
    capped = replace(folder(tmp_path), degree_cap=1).load()
    assert torch.equal(capped.train.x[:3], torch.tensor([[0.0, 1]]).repeat(3, 1))


def test_the_folder_form_allows_nodes_in_any_order_several_labels_and_attributes(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(18)
    place = np.argsort(order)
    labels = np.stack((NODES, INDICATOR % 3), 1)
    attributes = np.stack((np.arange(18) / 8, -np.ones(18)), 1)
    source = folder(
        tmp_path / "DS",
        A=place[EDGES].T + 1,
        graph_indicator=INDICATOR[order] + 1,
        node_labels=labels[order],
        node_attributes=attributes[order],
    )
    data = replace(source, root=str(tmp_path), attributes=True).load()
    assert data.train.shape == (7,)
    sizes = data.train.node_offsets.diff()
    assert torch.equal(sizes, torch.full_like(sizes, 3))
    inside = sorted(float(v) for v in torch.cat([data.train.x[:, 5], data.test.x[:, 5]]))
    assert inside == (np.arange(18) / 8).tolist()
    middle = data.train.x[:, 1] == 1  # the nodes with label 8: both others hang on them
    assert torch.equal(middle[data.train.links].sum(0), torch.ones(8).long())
    assert folder(tmp_path / "bare", graph_labels=None).load().classes == ()


def test_several_data_sets_become_groups_with_columns_and_classes_of_their_own(tmp_path: Path) -> None:
    folder(tmp_path / "A", "A", node_labels=NODES)
    folder(tmp_path / "B", "B", node_labels=NODES + INDICATOR)
    folder(tmp_path / "C", "C")
    source = TuFolder(str(tmp_path), "A+B", test_fraction=1 / 3, degree_cap=2)
    data = source.load()
    assert data.classes == ("A -1", "A 1", "B -1", "B 1")
    assert data.train.groups.tolist() == [0] * 4 + [1] * 4
    assert data.train.targets.tolist() == [
        group * 2 + target % 2 for group, target in zip(data.train.groups, data.train.targets, strict=True)
    ]
    first = data.train.batch(torch.arange(4)).x
    assert data.train.shape == (2 + len(np.unique(NODES + INDICATOR)),)
    assert float(first[:, 2:].sum()) == 0
    shared = replace(source, features="degrees").load()
    assert shared.train.shape == (3,)
    mixed = replace(source, name="C+A").load().train
    assert mixed.shape == (3 + 2,)
    assert float(mixed.x[:12, 3:].sum()) == 0
    assert float(mixed.x[12:, :3].sum()) == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"A": "1, 2\n3, x\n"}, "no table of numbers"),
        ({"A": "1, 2, 3\n"}, "pairs"),
        ({"A": "1, 99\n"}, "1 to 18"),
        ({"A": "1, 4\n"}, "leave their graph"),
        ({"graph_indicator": None}, "graph_indicator"),
        ({"graph_indicator": ""}, "graph_indicator"),
        ({"graph_indicator": INDICATOR}, "from 1"),
        ({"graph_labels": LABELS[:3]}, "6 graphs"),
        ({"graph_labels": "0.5\n" * 6}, "no table of numbers"),
        ({"node_labels": NODES[:5]}, "5 lines for 18 nodes"),
        ({"node_attributes": "nan\n" * 18}, "finite"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(folder(tmp_path, **files), attributes="node_attributes" in files).load()


def test_a_folder_without_links_loads(tmp_path: Path) -> None:
    assert folder(tmp_path, A="").load().train.links.shape == (2, 0)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"edge_index": None}, "choose data.name from another file"),
        ({"node_offsets": np.array([0, 9, 6, 18])}, "offsets"),
        ({"node_offsets": np.array([1, 18])}, "offsets"),
        ({"edge_index": np.array([[0], [18]])}, "0 to 17"),
        ({"graph_labels": np.zeros(2, int)}, "6 graphs"),
        ({"graph_labels": np.full(6, 5)}, "names 2 classes"),
        ({"graph_labels": np.zeros(6)}, "whole numbers"),
        ({"node_labels": np.zeros(4, int)}, "18 nodes"),
        ({"node_labels": np.zeros(18)}, "whole numbers"),
        ({"node_attributes": np.zeros(18)}, "18 nodes"),
        ({"edge_index": np.array([{}], dtype=object)}, "pickle"),
    ],
)
def test_npz_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        npz(tmp_path, **arrays).load()


def test_files_and_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no arrays X_node_offsets.*from DS"):
        replace(npz(tmp_path), name="X").load()
    with pytest.raises(ConfigError, match=r"data\.path="):
        TuNpz(str(tmp_path / "absent.npz")).load()
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(ConfigError, match="cannot be read"):
        TuNpz(str(tmp_path / "other.npz")).load()
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="cannot be read"):
        TuNpz(str(tmp_path / "array.npy")).load()
    with pytest.raises(ConfigError, match=r"no DS_A\.txt"):
        TuFolder(str(tmp_path), "DS").load()
    with pytest.raises(ConfigError, match="DS have none"):
        replace(npz(tmp_path), attributes=True).load()


@pytest.mark.parametrize(
    "bad", [{"name": "A+A"}, {"name": ""}, {"features": "colours"}, {"degree_cap": 0}, {"test_fraction": 1.0}]
)
@pytest.mark.parametrize("cls", [TuNpz, TuFolder])
def test_options_out_of_range_are_refused(cls: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(bad))}"):
        cls("x", **{"name": "DS", **bad})


@pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL.name}; set FEDSSL_DATA to the folder that holds it")
@pytest.mark.parametrize(
    ("name", "graphs", "classes", "features", "nodes", "links"),
    [
        ("MUTAG", 188, 2, 7, 3371, 3721),
        ("ENZYMES", 600, 6, 3, 19580, 37282),
        ("NCI1", 4110, 2, 37, 122747, 132753),
        ("IMDB-MULTI", 1500, 3, 33, 19502, 98903),
        ("MUTAG+PTC_MR", 532, 4, 25, 8286, 8775),
    ],
)
def test_real_files_load(name: str, graphs: int, classes: int, features: int, nodes: int, links: int) -> None:
    data = TuNpz(str(REAL), name).load()
    assert len(data.train) + len(data.test) == graphs
    assert len(data.test) == pytest.approx(graphs / 5, abs=2)
    assert (len(data.classes), data.train.shape) == (classes, (features,))
    assert len(data.train.x) + len(data.test.x) == nodes
    assert data.train.links.shape[1] + data.test.links.shape[1] == links
    assert float(data.train.x.sum()) == len(data.train.x)
    if name == "ENZYMES":
        assert TuNpz(str(REAL), name, attributes=True).load().train.shape == (21,)


# --- runs


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a tiny run on drawn graphs; overrides come last and win."""

    def compose(*overrides: str, name: str = "run") -> Plan:
        base = (
            *("data=synthetic_graphs", "data.train=60", "data.test=30", "data.size=8", "data.classes=3"),
            *("encoder.layers=2", "encoder.width=8", "method.hidden=16", "method.out=8", "local.batch_size=8"),
            *("federation.clients=3", "federation.rounds=2", "evaluate.every=1", "evaluate.repeats=2"),
            *("partition.alpha=1.0", "device=cpu", "engine.workers=2", f"out={tmp_path}", f"name={name}"),
        )
        chosen = {o.split("=")[0] for o in overrides}
        natural = "partition" in chosen
        kept = [o for o in base if o.split("=")[0] not in chosen and not (natural and o.startswith("partition."))]
        return config.compose([*kept, *overrides])

    return compose


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=simclr", "baselines=true"),
        ("method=byol", "encoder.norm=batch", "partition=natural", "data.augment.choose=one"),
        ("method=vicreg", "local.precision=bf16", "data.augment.subgraph=[0.5,0.9]"),
    ],
)
def test_federated_runs_on_graphs(run: Callable[..., Plan], overrides: tuple[str, ...]) -> None:
    plan = run(*overrides)
    rundir = execute(plan)
    rows, summary = rundir.rows(), rundir.read("summary.json")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    for key in ("knn_accuracy", "linear_accuracy", "random_encoder_linear_accuracy", "five_labels_accuracy"):
        assert 0 < summary[key] <= 1
    assert "client_cka" in rows[-1]
    encoder = fedssl.load_encoder(rundir.path)
    assert "GraphBatch" in encoder.augment.reads
    test = plan.job.data.load().test
    features = encoder(test.batch(torch.arange(30)))
    assert features.shape == (30, 16)
    assert torch.isfinite(features).all()


def test_the_data_choose_the_encoder_and_the_user_wins(run: Callable[..., Plan]) -> None:
    assert isinstance(config.compose(["data=synthetic_graphs"]).job.encoder, GIN)
    with pytest.raises(ConfigError, match="reads images"):
        config.compose(["data=synthetic_graphs", "encoder=conv4"])
    with pytest.raises(ConfigError, match="makes no sense on graphs"):
        config.compose(["data=synthetic_graphs", "method=mae"])


def test_a_run_has_the_same_result_twice(run: Callable[..., Plan]) -> None:
    first, second = (execute(run("evaluate.final=false", name=name)) for name in ("a", "b"))
    assert [row["loss"] for row in first.rows()] == [row["loss"] for row in second.rows()]


def test_gradient_caching_cuts_batches_of_graphs(run: Callable[..., Plan]) -> None:
    job = run("method=byol", "method.norm=layer").job
    table = job.data.load().train
    index = torch.arange(10)
    views = job.data.augment.views(table.batch(index), generator(), 2)
    gradients = []
    for micro in (None, 3):
        model = build_model(job, table.shape)
        PlainGradient(micro).backward(
            job.method, model, Batch(views, index), Step(1, 1, 0, 1), np.random.default_rng(0)
        )
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_multi_crop_on_graphs(run: Callable[..., Plan]) -> None:
    rundir = execute(run("method=dino", "method.local_views=2", "evaluate.final=false"))
    assert np.isfinite(rundir.rows()[-1]["loss"])
