"""Who takes part when, as pure functions: the contract of every yaml, hand-computed schedules, wrong traces."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import config, seeds
from fedssl.errors import ConfigError
from fedssl.participation import buffered
from fedssl.participation.available import DayNight, LateJoiners, Trace
from fedssl.participation.base import Attendance, Participation, Turn
from fedssl.participation.buffered import Buffered
from fedssl.participation.pace import Listed, Lognormal
from fedssl.participation.replay import Replay
from fedssl.participation.synchronous import Synchronous

CLIENTS, ROUNDS = 12, 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the options read that need a file, and a file for each."""
    folder = tmp_path_factory.mktemp("traces")
    (folder / "trace.json").write_text(json.dumps([[0, 2, 5], [], [1, 11]]))
    rows = [{"round": r, "client": c, "staleness": min(r - 1, c % 3)} for r in range(1, 9) for c in range(r, 11)]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "available@participation.available=trace": f"participation.available.path={folder / 'trace.json'}",
        "participation=replay": f"participation.path={folder / 'turns.jsonl'}",
    }


CASES = [
    *((f"participation={name}",) for name in config.options_of("participation")),
    *(
        (f"participation={name}", f"available@participation.available={there}")
        for name in ("poisson", "buffered")
        for there in config.options_of("available")
    ),
    *((f"participation={name}", "pace@participation.pace=listed") for name in ("stragglers", "buffered")),
    ("participation=stragglers", "participation.late=out", "participation.dropout=0.2"),
    ("participation=buffered", "participation.dropout=0.4", "participation.max_staleness=1"),
]
FIXED = [CASES[i] for i, case in enumerate(CASES) if case[0] in ("participation=replay", "participation=uniform")]
FIXED += [("participation=stragglers", "pace@participation.pace=listed")]  # nothing is drawn


@pytest.mark.parametrize("overrides", CASES, ids="-".join)
def test_every_option_keeps_the_contract(overrides: tuple[str, ...], files: dict[str, str]) -> None:
    who = config.compose([*overrides, *(files[o] for o in overrides if o in files)]).job.participation
    plans = [who.plan(CLIENTS, at, 3) for at in range(1, ROUNDS + 1)]
    busy_until = dict.fromkeys(range(CLIENTS), 0)
    for at, plan in enumerate(plans, 1):
        clients = [turn.client for turn in plan.turns]
        assert clients == sorted(set(clients)), "in order, each once"
        assert {type(client) for client in clients} <= {int}
        for turn in plan.turns:
            assert 0 <= turn.client < CLIENTS
            assert 0 <= turn.start <= at - 1
            assert turn.lost == "stale" or turn.staleness(at) <= who.max_staleness
            assert 0 <= turn.work <= 1
            if "participation=replay" not in overrides:
                assert turn.start >= busy_until[turn.client], "nobody is in two turns at once"
            busy_until[turn.client] = at
    assert any(plan.arriving for plan in plans)
    buffered._timeline.cache_clear()
    for at in (ROUNDS, 7, 1):
        assert who.plan(CLIENTS, at, 3) == plans[at - 1], "no memory: any round can be asked for first, and again"
    if overrides not in FIXED:
        assert [who.plan(CLIENTS, at, 4) for at in range(1, ROUNDS + 1)] != plans, "another seed, another schedule"


def arriving(who: Participation, rounds: int, clients: int = CLIENTS, seed: int = 0) -> list[list[int]]:
    return [[turn.client for turn in who.plan(clients, at, seed).arriving] for at in range(1, rounds + 1)]


def test_uniform_cohorts() -> None:
    drawn = arriving(Synchronous(fraction=0.3), 40, 20, 1)
    assert all(len(set(c)) == 6 and c == sorted(c) and set(c) <= set(range(20)) for c in drawn)
    assert len({tuple(c) for c in drawn}) > 30, "another cohort each round"
    assert set().union(*drawn) == set(range(20)), "everybody comes to a turn"
    assert arriving(Synchronous(fraction=1e-9), 1, 20) != [[]]
    assert arriving(Synchronous(), 1, 3) == [[0, 1, 2]]
    assert Synchronous().plan(3, 5, 0) == Attendance((Turn(0, 4), Turn(1, 4), Turn(2, 4)))


def test_uniform_cohorts_are_those_of_earlier_versions() -> None:
    """The stream and the call are fixed: a run of before has the same cohorts."""
    rng = seeds.stream(7, "cohort", 3)
    assert arriving(Synchronous(fraction=0.25), 3, 40, 7)[2] == sorted(rng.choice(40, 10, replace=False))


def test_poisson_cohorts_are_independent_draws() -> None:
    """Each client with its probability, each pair with its square; the sizes are binomial."""
    rounds, rate = 4000, 0.25
    taken = np.zeros((rounds, 8))
    for row, clients in zip(taken, arriving(Synchronous(rate, "poisson"), rounds, 8), strict=True):
        row[clients] = 1
    five_sigma = 5 * np.sqrt(rate * (1 - rate) / rounds)
    assert np.abs(taken.mean(0) - rate).max() < five_sigma
    both = taken.T @ taken / rounds
    assert np.abs(both - np.diag(np.diag(both)) - rate**2 * (1 - np.eye(8))).max() < five_sigma
    sizes = Counter(int(size) for size in taken.sum(1))
    assert sizes[0] / rounds == pytest.approx(0.75**8, abs=0.025)
    assert taken.sum(1).var() == pytest.approx(8 * rate * (1 - rate), rel=0.1)


def test_a_day_by_hand() -> None:
    night_for_all = DayNight(period=4, awake=0.5, zones=1)
    assert [len(night_for_all.available(3, at, 0)) for at in range(1, 10)] == [3, 3, 0, 0, 3, 3, 0, 0, 3]
    assert arriving(Synchronous(available=night_for_all), 4, 2) == [[0, 1], [0, 1], [], []]
    zoned = DayNight(period=8, awake=0.25, zones=8)
    there = np.zeros((16, 400))
    for row, at in zip(there, range(1, 17), strict=True):
        row[list(zoned.available(400, at, 1))] = 1
    assert (there.sum(0) == 4).all(), "a quarter of each of two days"
    assert (there[:8] == there[8:]).all()
    assert (np.abs(there.sum(1) - 100) < 45).all(), "the zones spread the load"


def test_late_joiners_stay() -> None:
    rule = LateJoiners(late=0.5, by=6)
    there = [set(rule.available(200, at, 0)) for at in range(1, 9)]
    assert all(a <= b for a, b in pairwise(there))
    assert 70 < len(there[0]) < 130
    assert len(there[1]) > len(there[0])
    assert there[4] < there[5] == set(range(200))
    assert rule.available(200, 1, 0) is not rule.available(200, 1, 1)
    assert list(LateJoiners(late=0).available(5, 1, 0)) == [0, 1, 2, 3, 4]


def test_a_cohort_is_as_large_as_availability_allows(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[[5, 1, 1], [], [0, 1, 2, 3, 4, 5, 6, 7]]")
    half = Synchronous(fraction=0.5, available=Trace(str(tmp_path / "t.json")))
    drawn = arriving(half, 6, 8)
    assert drawn[0] == drawn[3] == [1, 5]
    assert drawn[1] == drawn[4] == []
    assert [len(drawn[i]) for i in (2, 5)] == [4, 4]


def test_a_trace_of_truth_values(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((5, 9)) < 0.4
    np.savez(tmp_path / "t.npz", available=table)
    trace = Trace(str(tmp_path / "t.npz"))
    for at in range(1, 12):
        assert list(trace.available(9, at, 0)) == list(np.flatnonzero(table[(at - 1) % 5]))
    with pytest.raises(ConfigError, match="set federation.clients"):
        [trace.available(4, at, 0) for at in range(1, 6)]
    np.savez(tmp_path / "t.npz", available=~table)
    assert list(trace.available(9, 1, 0)) == list(np.flatnonzero(~table[0])), "a new file is read anew"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[]"),
        ("a.json", "3"),
        ("a.json", "[[-1]]"),
        ("a.json", "[[0"),
        ("a.json", '[["x"]]'),
        ("a.npz", "PK"),
    ],
)
def test_a_wrong_trace_is_one_sentence(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="not a trace") as caught:
        Trace(str(tmp_path / name)).available(3, 1, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Trace(str(tmp_path / "none.json")).available(3, 1, 0)


def test_slow_clients_do_what_fits() -> None:
    pace = Listed((10.0, 40.0, 80.0))
    partial = Synchronous(pace=pace, deadline_s=20.0).plan(3, 2, 0)
    assert partial == Attendance((Turn(0, 1), Turn(1, 1, 0.5), Turn(2, 1, 0.25)), 20.0)
    out = Synchronous(pace=pace, deadline_s=20.0, late="out").plan(3, 2, 0)
    assert out == Attendance((Turn(0, 1), Turn(1, 1, lost="late"), Turn(2, 1, lost="late")), 20.0)
    assert [turn.client for turn in out.arriving] == [0]
    assert Synchronous(pace=pace).plan(3, 2, 0).seconds == 80.0, (
        "without a deadline the round takes as long as it takes"
    )
    assert Synchronous(pace=pace, deadline_s=100.0).plan(3, 2, 0).seconds == 80.0


def test_dropouts_come_at_their_rate_and_cost_the_round_its_deadline() -> None:
    who = Synchronous(dropout=0.3, pace=Listed((1.0,)), deadline_s=9.0)
    plans = [who.plan(10, at, 0) for at in range(1, 201)]
    lost = [turn for plan in plans for turn in plan.turns if turn.lost]
    assert {turn.lost for turn in lost} == {"dropped"}
    assert len(lost) / 2000 == pytest.approx(0.3, abs=0.05)
    assert all(plan.seconds == (9.0 if any(t.lost for t in plan.turns) else 1.0) for plan in plans)


def test_lognormal_paces() -> None:
    pace = Lognormal(median_s=30.0, sigma=0.8, jitter=0.2)
    logs = np.log([[pace.seconds(client, at, 5) for at in range(1, 41)] for client in range(400)])
    assert np.median(logs) == pytest.approx(np.log(30), abs=0.1)
    assert logs.mean(1).std() == pytest.approx(0.8, rel=0.1), "between clients"
    assert logs.std(1).mean() == pytest.approx(0.2, rel=0.1), "between the turns of one"


HAND = Listed((1.0, 2.6, 9.5))


def test_a_buffer_of_one_by_hand() -> None:
    """Three clients, always at work; 0 is done at 1, 2, 3, ..., 1 at 2.6, 5.2, ..., 2 at 9.5; each is a merge."""
    who = Buffered(concurrency=3, buffer=1, max_staleness=20, pace=HAND)
    plans = [who.plan(3, at, 0) for at in range(1, 14)]
    assert [[(t.client, t.start) for t in p.turns] for p in plans] == [
        *([(0, 0)], [(0, 1)], [(1, 0)], [(0, 2)], [(0, 4)], [(0, 5)], [(1, 3)], [(0, 6)], [(0, 8)], [(1, 7)]),
        *([(0, 9)], [(0, 11)], [(2, 0)]),
    ]
    ends = np.cumsum([p.seconds for p in plans])
    np.testing.assert_allclose(ends[:8], [1, 2, 2.6, 3, 4, 5, 5.2, 6])


def test_a_turn_left_too_far_behind_is_stopped_and_begins_anew() -> None:
    who = Buffered(concurrency=3, buffer=1, max_staleness=1, pace=HAND)
    third = who.plan(3, 3, 0)
    assert third.turns == (Turn(0, 2), Turn(1, 0, lost="stale"), Turn(2, 0, lost="stale"))
    with_time = [t for at in range(3, 40) for t in who.plan(3, at, 0).turns if t.client == 1 and not t.lost]
    assert not with_time, "1 needs 2.6 s, and two merges take 2: it never comes in time"


def test_equal_paces_are_synchronous_rounds() -> None:
    who = Buffered(concurrency=4, buffer=4, pace=Listed((5.0,)))
    for at in range(1, 6):
        assert who.plan(4, at, 0) == Attendance(tuple(Turn(c, at - 1) for c in range(4)), 5.0)


def test_a_buffer_that_cannot_fill_closes_when_nobody_is_left() -> None:
    who = Buffered(concurrency=2, buffer=9, pace=Listed((1.0,)))
    assert arriving(who, 3, 3) == [[0, 1, 2]] * 3
    asleep = Buffered(concurrency=2, buffer=2, available=DayNight(period=4, awake=0.5, zones=1), pace=Listed((1.0,)))
    plans = [asleep.plan(8, at, 0) for at in range(1, 9)]
    counts = [len(plan.turns) for plan in plans]
    assert counts[0] == 2
    assert 0 in counts, "those at work in the evening finish; then there is nobody"
    assert counts[4] == 2, "and a new day"
    assert all(plan.seconds == 0.0 for plan in plans if not plan.turns)


@settings(max_examples=40, deadline=None)
@given(
    concurrency=st.integers(1, 8),
    buffer=st.integers(1, 6),
    limit=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.3]),
    clients=st.integers(1, 9),
    times=st.lists(st.floats(0.1, 9), min_size=1, max_size=5),
)
def test_every_turn_takes_the_clients_time(
    concurrency: int, buffer: int, limit: int, dropout: float, clients: int, times: list[float]
) -> None:
    """Merges are instants of one clock; a turn begins after one of them and ends before another, a known time later."""
    who = Buffered(concurrency, buffer, limit, dropout=dropout, pace=Listed(tuple(times)))
    plans = [who.plan(clients, at, 1) for at in range(1, 13)]
    merged = np.cumsum([0.0, *(plan.seconds or 0.0 for plan in plans)])  # merged[v]: when model v was made
    for at, plan in enumerate(plans, 1):
        assert len(plan.arriving) <= buffer
        finished = [turn for turn in plan.turns if turn.lost != "stale"]
        assert finished, "always somebody is there"
        if len(plan.arriving) < buffer:
            assert len(plan.turns) == clients, "it closes early only when all have had their turn"
        for turn in finished:
            needs = times[turn.client % len(times)]
            assert merged[at - 1] - merged[turn.start + 1] - 1e-9 <= needs <= merged[at] - merged[turn.start] + 1e-9
        assert all(turn.staleness(at) == limit + 1 for turn in plan.turns if turn.lost == "stale")


def test_concurrency_is_kept() -> None:
    """Of 40 clients 7 are at work at any time: starts minus ends of turns."""
    who = Buffered(concurrency=7, buffer=3, max_staleness=99, pace=Lognormal(sigma=1.0))
    turns = [(turn.start, at) for at in range(1, 200) for turn in who.plan(40, at, 2).turns]
    for at in range(2, 150):
        # After merge `at`, those at work began at or before it and end after it; up to 3 places are filled at once.
        assert 7 - 3 <= sum(start < at < end for start, end in turns) <= 7
    assert {c for at in range(1, 200) for c in arriving_at(who, at, 40)} == set(range(40))


def arriving_at(who: Participation, at: int, clients: int) -> Sequence[int]:
    return [turn.client for turn in who.plan(clients, at, 2).arriving]


def test_fast_clients_come_more_often_and_slow_ones_are_staler() -> None:
    who = Buffered(concurrency=10, buffer=3, max_staleness=99, pace=Listed((1.0, 4.0)))
    turns = [(turn.client, turn.staleness(at)) for at in range(1, 300) for turn in who.plan(10, at, 0).turns]
    fast, slow = ([s for c, s in turns if c % 2 == parity] for parity in (0, 1))
    assert len(fast) / len(slow) == pytest.approx(4, rel=0.2)
    assert np.mean(slow) > 2 * np.mean(fast)


def test_scales() -> None:
    assert [Buffered().scale(s) for s in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
    assert [Buffered(rate=0.5, discount=0).scale(s) for s in (0, 3)] == [0.5, 0.5]
    assert Synchronous().scale(0) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        lambda: Buffered(concurrency=0),
        lambda: Buffered(buffer=0),
        lambda: Buffered(max_staleness=-1),
        lambda: Buffered(rate=0),
        lambda: Buffered(discount=-1),
        lambda: Buffered(dropout=1.0),
        lambda: Listed(()),
        lambda: Listed((1.0, 0.0)),
        lambda: Lognormal(sigma=-1),
        lambda: DayNight(awake=0),
        lambda: LateJoiners(by=1),
    ],
)
def test_options_that_make_no_sense(options: Any) -> None:
    with pytest.raises(ConfigError, match="give|list"):
        options()


@pytest.mark.parametrize(
    "line",
    [
        '{"round": 1}',
        '{"round": 0, "client": 1}',
        '{"round": 1, "client": -1}',
        '{"round": 2, "client": 1, "staleness": 2}',
        '{"round": 2, "client": 1, "staleness": -1}',
        '{"round": 1, "client": 1, "work": 1.5}',
        '{"round": 1, "client": 0}\n{"round": 1, "client": 0}',
        "[1, 2]",
        "{",
    ],
)
def test_a_wrong_replay_is_one_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text(line)
    with pytest.raises(ConfigError, match="not a list of turns") as caught:
        Replay(str(tmp_path / "turns.jsonl")).plan(3, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_replay_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    lines = ['{"round": 3, "client": 2, "staleness": 2, "loss": 1.5}', '{"round": 3, "client": 0, "work": 0.5}']
    path.write_text("\n".join([*lines, '{"round": 1, "client": 1, "lost": "dropped"}']))
    who = Replay(str(path))
    assert who.max_staleness == 2
    assert [who.plan(3, at, 0).turns for at in (1, 2, 3, 4)] == [
        *((Turn(1, 0, lost="dropped"),), (), (Turn(0, 2, 0.5), Turn(2, 0)), ())
    ]
    with pytest.raises(ConfigError, match="federation.clients=2"):
        who.plan(2, 3, 0)


@pytest.mark.parametrize(
    "who",
    [
        Synchronous(fraction=1e-5),
        Synchronous(fraction=1e-5, draw="poisson", pace=Lognormal(), deadline_s=60.0),
        Synchronous(fraction=1e-5, available=DayNight()),
        Buffered(concurrency=30, buffer=10),
    ],
    ids=["uniform", "poisson", "available", "buffered"],
)
def test_a_million_clients_cost_what_the_cohort_costs(who: Participation) -> None:
    who.plan(1_000_000, 1, 0)  # what is drawn once for the run
    began = time.perf_counter()
    for at in range(2, 12):
        assert len(who.plan(1_000_000, at, 0).turns) < 40
    assert time.perf_counter() - began < 1.5, "ten rounds; lists of all clients in Python take 20 s"
