"""The graph of secure aggregation: its conditions against slow references, and sums over a sparse one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedssl.errors import ProtocolError, TooFewError
from fedssl.privacy.secagg import collector, graph, participant
from fedssl.privacy.secagg.graph import CORRECTNESS, SECURITY, Graph, arrange, sizes
from fedssl.privacy.secagg.participant import Holding, Session
from fedssl.privacy.secagg.simulate import aggregate

SIZES = [(40, 36, 4), (100, 70, 20), (100, 90, 0), (300, 210, 60), (1000, 700, 200), (1000, 900, 300)]


def is_connected(arranged: Graph, among: Collection[int]) -> bool:
    """By walking along the edges."""
    todo, seen = list(among)[:1], set(list(among)[:1])
    while todo:
        new = {*arranged.holders(todo.pop())} & {*among} - seen
        seen |= new
        todo += new
    return seen == set(among)


@given(st.integers(2, 14), st.integers(1, 7), st.data())
def test_connected_is_what_a_walk_finds(clients: int, reach: int, data: st.DataObject) -> None:
    arranged = Graph(tuple(data.draw(st.permutations(range(clients)))), min(reach, max(1, clients // 2)), 2)
    among = data.draw(st.sets(st.integers(0, clients - 1)))
    assert arranged.connected(among) == is_connected(arranged, among)


@given(st.integers(2, 40), st.integers(1, 20))
def test_neighbours_are_mutual_and_as_many_as_promised(clients: int, reach: int) -> None:
    arranged = Graph(tuple(range(clients)), reach, 2)
    holders = {client: arranged.holders(client) for client in range(clients)}
    for client, others in holders.items():
        assert len(others) == min(clients, 2 * reach + 1) == len(set(others))
        assert all(client in holders[other] for other in others)


def holds(clients: int, fewest: int, colluders: int, reach: int, shares: int) -> bool:
    """The conditions with scipy's distributions, in floating point."""
    near, away = 2 * reach, clients - fewest
    of = lambda marked: stats.hypergeom(clients - 1, marked, near)  # noqa: E731
    stolen = clients * of(colluders).sf(shares - 1)
    log_apart = (
        2 * math.log(clients)
        - math.log(2)
        + sum(
            math.log((colluders + away - j) / (clients - j)) if colluders + away > j else -math.inf for j in range(near)
        )
    )
    short = clients * max(of(fewest).cdf(shares - 1), of(fewest - 1).cdf(shares - 2))
    return bool(max(stolen, math.exp(log_apart)) < 2.0 ** -(SECURITY + 1) and short < 2.0**-CORRECTNESS)


@pytest.mark.parametrize(("clients", "fewest", "colluders"), SIZES)
def test_the_graph_is_the_smallest_that_meets_its_conditions(clients: int, fewest: int, colluders: int) -> None:
    reach, shares = sizes(clients, fewest, colluders)
    assert 2 * reach + 1 < clients
    assert shares > (2 * reach + 1) / 2
    assert holds(clients, fewest, colluders, reach, shares)
    assert not any(holds(clients, fewest, colluders, reach - 1, t) for t in range(reach, 2 * reach - 1))


def test_degrees_grow_like_a_logarithm_and_few_clients_are_all_neighbours() -> None:
    assert [2 * sizes(n, 9 * n // 10, n // 5)[0] for n in (100, 1000, 10_000)] == [30, 68, 80]
    assert sizes(32, 20, 6) == (16, 20)
    assert sizes(2, 2, 0) == (1, 2)
    assert sizes(100, 51, 49) == (50, 51), "where no smaller graph will do it is the complete one"


def test_two_cuts_are_as_unlikely_as_the_bound_says() -> None:
    clients, bad, reach = 10, 5, 1
    arranged = Graph(tuple(range(clients)), reach, 2)
    cut = [
        not is_connected(arranged, [c for c in range(clients) if c not in gone])
        for gone in itertools.combinations(range(clients), bad)
    ]
    exact, bound = sum(cut) / len(cut), clients**2 / 2 * math.comb(bad, 2 * reach) / math.comb(clients, 2 * reach)
    assert 0 < exact <= bound
    # With three bad ones the bound is no longer above 1, and still holds.
    few = [
        not is_connected(Graph(tuple(range(30)), 1, 2), [c for c in range(30) if c not in gone])
        for gone in itertools.combinations(range(30), 2)
    ]
    assert sum(few) / len(few) == pytest.approx(30 * 27 / 2 / math.comb(30, 2))
    assert 0.9 < sum(few) / len(few) <= 30**2 / 2 / math.comb(30, 2)


def test_the_ring_follows_from_all_keys() -> None:
    keys = {client: bytes([client]) * 96 for client in range(50)}
    first = arrange(keys, 40, 5)
    assert sorted(first.ring) == sorted(keys)
    assert first == arrange(dict(reversed(keys.items())), 40, 5)
    assert arrange(keys | {7: bytes(96)}, 40, 5).ring != first.ring
    # One key moves everybody: neighbours in one order are hardly ever neighbours in the other.
    places = np.array([[arrange(keys | {9: i.to_bytes(96)}, 40, 5).ring.index(c) for c in (0, 1)] for i in range(2000)])
    assert abs(np.corrcoef(places.T)[0, 1] + 1 / 49) < 4 / math.sqrt(2000)
    assert stats.chisquare(np.bincount(places[:, 0], minlength=50)).pvalue > 1e-4


@pytest.mark.parametrize("stage", ["share", "mask", "reveal"])
def test_sums_over_a_sparse_graph_are_exact(stage: str) -> None:
    rng = np.random.default_rng(0)
    vectors = {client: rng.integers(0, 2**32, 3, np.uint32) for client in range(60)}
    outcome = aggregate(vectors, 45, dict.fromkeys(range(1, 60, 4), stage), colluders=6)
    there = [client for client in vectors if stage == "reveal" or client % 4 != 1]
    assert outcome.survivors == tuple(there)
    np.testing.assert_array_equal(outcome.total, np.sum([vectors[c] for c in there], axis=0, dtype=np.uint32))


def test_only_neighbours_hear_of_a_secret() -> None:
    session = Session(b"", 45, 6)
    announced = {client: participant.advertise(client) for client in range(60)}
    roster = {client: one.advert for client, one in announced.items()}
    arranged = participant.graph_of(session, roster)
    state, letters = participant.share(announced[9], session, roster)
    assert sorted([9, *letters]) == arranged.holders(9)
    assert len(letters) == 2 * arranged.reach == 2 * sizes(60, 45, 6)[0] < 59
    stranger = next(client for client in roster if client not in arranged.holders(9))
    _, theirs = participant.share(announced[stranger], session, roster)
    with pytest.raises(ProtocolError, match="all of its neighbours"):
        participant.receive(state, dict.fromkeys([*letters, stranger], next(iter(theirs.values()))))


def test_a_sum_that_would_come_in_parts_stays_hidden() -> None:
    arranged = Graph(tuple(range(12)), 1, 2)
    apart, together = [0, 1, 2, 3, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7]
    sentence = "8 clients sent their masked vectors and those between them on the ring did not"
    with pytest.raises(TooFewError, match=sentence):
        collector.tied(arranged, apart)
    collector.tied(arranged, together)
    me = Holding(1, Session(b"", 7, 0), arranged, dict.fromkeys([0, 1, 2], bytes(34)))
    with pytest.raises(ProtocolError, match="fall into parts without a mask between them, so client 1 reveals nothing"):
        participant.reveal(me, apart)
    assert participant.reveal(me, together).own.keys() == {0, 1, 2}
    with pytest.raises(TooFewError, match=sentence):
        collector.unmask(me.session, {}, arranged, range(12), np.zeros(3, np.uint32), apart, dict.fromkeys(apart))  # type: ignore[arg-type]


def test_too_few_neighbours_are_noticed_before_anything_is_masked_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "sizes", lambda clients, fewest, colluders: (2, 4))
    vectors = {client: np.ones(3, np.uint32) for client in range(9)}
    arranged = Graph(tuple(range(9)), 2, 4)
    sent = {client: dict.fromkeys(arranged.holders(client), b"") for client in range(9) if client not in (3, 5)}
    with pytest.raises(TooFewError, match="are 3 and 4 are needed, so nobody sends a vector"):
        collector.deliver(arranged, sent)
    with pytest.raises(TooFewError, match=r"clients answered that hold shares of client \d's secret and 4 are needed"):
        aggregate(vectors, 5, dict.fromkeys([0, 2, 4, 6], "reveal"))
