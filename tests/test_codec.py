"""Flower's side: arrays in records, states of clients and strategies, the in-process grid, one round."""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import assert_same
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from test_strategies import NOW, one_round

from fedssl import config
from fedssl.build import build
from fedssl.cohort.choice import Choice
from fedssl.errors import ConfigError, ProtocolError, ResumeError
from fedssl.files import read_arrays, write_arrays
from fedssl.flower import codec, state_files, strategy_state
from fedssl.flower.codec import ClientState, LazyArray
from fedssl.flower.exchange import CohortGrid, exchange
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.run.tally import Tally
from fedssl.parts import Arrays

ARRAYS: Arrays = {
    "a.w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "a.s": np.array(0.5),
    "a.n": np.zeros((0, 2), np.int64),
    "a.m": np.array([True, False]),
    "a.h": np.array([1.5], np.float16),
}
Train = Callable[[Message, Context], Any]


def through_flower(record: Any) -> Any:
    """What a real SuperNode receives: every object deflated to bytes by its id, and inflated from them."""
    objects: dict[str, InflatableObject] = get_all_nested_objects(record)
    return inflate_object_from_contents(record.object_id, {key: value.deflate() for key, value in objects.items()})


def app_of(work: Train) -> ClientApp:
    """A client app that replies with the arrays (or raises what) `work` gives."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = {codec.WEIGHT: 2, "partition-id": int(context.node_config["partition-id"]), "loss": 0.5}
        return Message(codec.reply(work(message, context), metrics), reply_to=message)

    return app


def ask(nodes: Iterable[int]) -> list[Message]:
    content = codec.instruction(codec.encode(ARRAYS), ConfigRecord({}))
    return [Message(content, node, MessageType.TRAIN) for node in nodes]


def context_of(state: RecordDict | None = None) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=state or RecordDict(), run_config={})


def test_a_lazy_array_is_an_array_of_flower() -> None:
    for value in ARRAYS.values():
        lazy, plain, file = LazyArray(value), Array(value), BytesIO()
        np.save(file, value, allow_pickle=False)
        assert isinstance(lazy, Array)
        assert (lazy.dtype, lazy.shape, lazy.stype, lazy.data) == (plain.dtype, plain.shape, plain.stype, plain.data)
        assert lazy.data == file.getvalue()
        assert lazy.object_id == plain.object_id, "the same content has the same name on a wire"
        assert lazy.deflate() == plain.deflate()
    shared = LazyArray(ARRAYS["a.w"]).numpy()
    assert np.shares_memory(shared, ARRAYS["a.w"])
    with pytest.raises(ValueError, match="read-only"):
        shared[0, 0] = 1
    assert ARRAYS["a.w"].flags.writeable
    scalar = LazyArray(np.float32(3))  # type: ignore[arg-type]
    assert (scalar.numpy().shape, scalar.numpy()) == ((), 3)


@pytest.mark.parametrize(
    "trip",
    [
        through_flower,
        lambda record: pickle.loads(pickle.dumps(record)),
        lambda record: serde.recorddict_from_proto(serde.recorddict_to_proto(record)),
        lambda record: record,
    ],
    ids=["deflate", "pickle", "proto", "memory"],
)
def test_records_survive_every_way_of_sending(trip: Callable[[Any], Any]) -> None:
    assert_same(codec.decode(trip(codec.reply(ARRAYS, {"loss": 1.5})).array_records[codec.ARRAYS]), ARRAYS)
    context = context_of()
    kept = ClientState(ARRAYS, {"m": np.ones(2)}, {"rate": 0.25, "count": 3}, 7, {"r": np.ones(3, np.float32)})
    for state in (kept, ClientState()):
        state.save(context)
        back = ClientState.load(context_of(trip(context.state)))
        assert_same(back.local, state.local)
        assert_same(back.mine, state.mine)
        assert_same(back.residual, state.residual)
        assert (back.memo, back.round, back.empty) == (state.memo, state.round, state.empty)
    assert ClientState.load(context_of()) == ClientState()


def test_fedadam_resumes_from_its_arrays(tmp_path: Path) -> None:
    node = yaml.safe_load((config.conf_dir() / "strategy" / "fedadam.yaml").read_text())
    del node["share"]
    first, resumed = build(node, "strategy"), build(node, "strategy")
    now = one_round(first, one_round(first, NOW, {0: 0.5}, {0: 3}), {0: 0.5, 1: -0.25}, {0: 3, 1: 1})
    arrays, scalars = strategy_state.take(first)
    assert {"m_t/encoder.weight", "v_t/encoder.scale"} <= arrays.keys()
    write_arrays(tmp_path / "s", arrays)
    strategy_state.give(resumed, read_arrays(tmp_path / "s")[0], scalars)
    again, values = strategy_state.take(resumed)
    assert_same({k: again[k] for k in arrays}, arrays)
    assert values == scalars
    assert_same(*(one_round(s, now, {0: 1.0, 1: 0.0}, {0: 1, 1: 1}) for s in (first, resumed)))


def test_a_state_keeps_its_order_and_is_a_copy(tmp_path: Path) -> None:
    first, second = (SimpleNamespace(layers=None, norm=np.float32(0), step=0, name="x") for _ in range(2))
    first.layers, first.step = [np.full(1 + i % 3, i, f"f{4 + i % 2 * 4}") for i in range(12)], 4
    first.norm = np.float32(0.1)
    arrays, scalars = strategy_state.take(first)
    first.layers[3][:] = 99
    write_arrays(tmp_path / "s", arrays)
    strategy_state.give(second, read_arrays(tmp_path / "s")[0], scalars)
    assert [layer.tolist() for layer in second.layers] == [[i] * (1 + i % 3) for i in range(12)]
    assert (second.norm, second.step, second.name) == (np.float32(0.1), 4, "x")


def test_states_on_disk(tmp_path: Path) -> None:
    for at in (2, 5, 9):
        state_files.write(
            tmp_path,
            3,
            ClientState(ARRAYS, {"m/x": np.ones(at)}, {"rate": 0.5 * at, "n": at}, at, {"r": ARRAYS["a.s"]}),
        )
    state_files.write(tmp_path, 30, ClientState(memo={"only": 1.0}, round=1))
    assert not ClientState(residual={"x": np.ones(1)}).empty
    found = [state_files.newest(tmp_path, 3, at) for at in (1, 2, 4, 8, 9, 100)]
    assert [path and path.name[7:13] for path in found] == [None, "000002", "000002", "000005", "000009", "000009"]
    assert found[-1] is not None
    back = state_files.read(found[-1])
    assert_same(back.local, ARRAYS)
    assert_same(back.mine, {"m/x": np.ones(9)})
    assert_same(back.residual, {"r": ARRAYS["a.s"]})
    assert (back.memo, back.round) == ({"rate": 4.5, "n": 9}, 9)
    only = state_files.newest(tmp_path, 30, 1)
    assert only is not None
    assert state_files.read(only) == ClientState(memo={"only": 1.0}, round=1)
    state_files.prune(tmp_path, [3], 1)
    assert len(list(tmp_path.iterdir())) == 4
    state_files.prune(tmp_path, [3], 8)
    assert sorted(path.name[:13] for path in tmp_path.iterdir()) == ["000003-000005", "000003-000009", "000030-000001"]
    write_arrays(only, {"local/x": np.ones(1)})
    with pytest.raises(ResumeError, match="not a client state"):
        state_files.read(only)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_replies_come_in_the_order_of_the_messages(workers: int) -> None:
    def work(message: Message, context: Context) -> Arrays:
        time.sleep(0.002 * (context.node_id % 3))
        assert not codec.decode(message.content.array_records[codec.ARRAYS])["a.s"].flags.writeable
        return {"x": np.full(2, context.node_id)}

    order = [5, 1, 8, 2, 7, 3]
    with InProcessGrid(app_of(work), 8, workers) as grid:
        ids = list(grid.push_messages(ask(order)))
        replies = list(grid.pull_messages(ids))
        assert list(grid.pull_messages(ids)) == []
    assert [reply.metadata.src_node_id for reply in replies] == order
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [int(codec.decode(r.content.array_records["arrays"])["x"][0]) for r in replies] == order


def test_contexts_persist_and_are_made_when_needed() -> None:
    def work(_: Message, context: Context) -> Arrays:
        state = ClientState.load(context)
        ClientState(memo={"visits": state.memo.get("visits", 0) + 1}).save(context)
        return {}

    with InProcessGrid(app_of(work), 10**6, 2) as grid:
        for nodes in ([1, 4], [4], [4, 999_999]):
            list(grid.send_and_receive(ask(nodes)))
        assert {n: ClientState.load(c).memo["visits"] for n, c in grid.contexts.items()} == {1: 1, 4: 3, 999_999: 1}
        assert grid.context(4).node_config == {"partition-id": 3, "num-partitions": 10**6}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_few_replies_wait_at_a_time(workers: int) -> None:
    alive: set[int] = set()
    begun, most = [0], workers + 2 if workers else 1

    def work(_: Message, context: Context) -> Arrays:
        begun[0] += 1
        value = np.zeros(1000)
        alive.add(context.node_id)
        weakref.finalize(value, alive.discard, context.node_id)
        return {"x": value}

    with InProcessGrid(app_of(work), 20, workers) as grid:
        replies = iter(grid.send_and_receive(ask(range(1, 21))))
        for taken in range(20):
            reply = next(replies)
            time.sleep(0.005)  # let the workers run as far ahead as they may
            assert begun[0] - taken <= most
            del reply
            assert len(alive) <= most, "replies that were handed out are free"
        assert next(replies, None) is None
        time.sleep(0.05)
        assert not alive, "no worker holds on to its last reply"


def test_a_client_that_fails() -> None:
    def work(_: Message, context: Context) -> Arrays:
        if context.node_id == 2:
            raise ConfigError("local.lr=9 is too <high>: 'lower' it")
        return ARRAYS

    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="too <high>"), InProcessGrid(app_of(work), 3, 2) as grid:
        list(grid.send_and_receive(ask([1, 2, 3])))
    assert set(threading.enumerate()) == before
    with InProcessGrid(app_of(work), 3, 2, fail_fast=False) as grid:
        replies = list(grid.send_and_receive(ask([1, 2, 3])))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "too <high>" in replies[1].error.reason
    with pytest.raises(ProtocolError) as caught:
        list(tally(0).watch(replies))
    assert str(caught.value).startswith("client 1: local.lr=9 is too <high>: 'lower' it; federation.tolerate=0")


@pytest.mark.parametrize("together", [1, 3])
def test_an_interruption_of_the_thread_that_trains_is_no_failure_of_a_client(together: int) -> None:
    """Ctrl-C ends the run though failures are tolerated, and the cohorts after this one never begin."""
    begun: list[int] = []

    def work(_: Message, context: Context) -> Arrays:
        begun.append(context.node_id)
        if context.node_id == 1:
            raise KeyboardInterrupt
        return {}

    before = set(threading.enumerate())
    choice = Choice(together, 6)
    with pytest.raises(KeyboardInterrupt), InProcessGrid(app_of(work), 6, 0, fail_fast=False, choice=choice) as grid:
        list(grid.send_and_receive(ask(range(1, 7))))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert set(begun) <= set(range(1, together + 1))


def test_leaving_restores_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    before = set(threading.enumerate())
    with pytest.raises(KeyError), InProcessGrid(app_of(lambda *_: time.sleep(0.02) or {}), 9, 2) as grid:
        assert TaskIdentity.run_id == 1
        pulling = iter(grid.send_and_receive(ask(range(1, 10))))
        next(pulling)  # eight are never asked for
        with InProcessGrid(app_of(lambda *_: ARRAYS), 1) as inner:
            list(inner.send_and_receive(ask([1])))
        assert TaskIdentity.run_id == 1, "a grid inside a grid"
        raise KeyError
    del pulling
    assert TaskIdentity.run_id == 7
    assert set(threading.enumerate()) == before


class _Slow(InProcessGrid):
    """A grid like that of a SuperLink: each pull gives what has arrived, which for some nodes is never."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        ready = [i for i in message_ids if i in self._messages and self._messages[i].metadata.dst_node_id < 3]
        return super().pull_messages(ready[:1])


def test_an_exchange_ends_at_its_deadline() -> None:
    with _Slow(app_of(lambda *_: ARRAYS), 4) as grid:
        began = time.monotonic()
        assert [r.metadata.src_node_id for r in exchange(grid, ask([4, 1, 3, 2]), 0.3)] == [1, 2]
        assert 0.3 <= time.monotonic() - began < 1.0
        assert len(list(exchange(grid, ask([2, 1]), 30))) == 2
        assert list(exchange(grid, [], 30)) == []
        assert time.monotonic() - began < 1.5, "nobody waits for replies that are there"


def tally(tolerate: int, clients: int = 3) -> Tally:
    nodes = {client + 1: client for client in range(clients)}
    return Tally(list(range(clients)), tolerate, ARRAYS, nodes, lambda *_: None)


@pytest.fixture
def replies() -> Iterator[Callable[..., list[Message]]]:
    """Good replies of some nodes, then error replies of others."""
    with InProcessGrid(app_of(lambda *_: ARRAYS), 9) as grid:

        def make(good: list[int], bad: list[int] = []) -> list[Message]:  # noqa: B006
            fails = [Message(Error(0, f"node {m.metadata.dst_node_id} burnt"), reply_to=m) for m in ask(bad)]
            return [*grid.send_and_receive(ask(good)), *fails]

        yield make


def test_a_tally_counts_rows_and_failures(replies: Callable[..., list[Message]]) -> None:
    seen: list[int] = []
    count = tally(1)
    count.keep = lambda client, arrays: seen.append(client)
    assert len(list(count.watch(replies([3, 1], [2])))) == 2
    assert count.failures == ["client 1: node 2 burnt"]
    assert count.failed == {1: "client 1: node 2 burnt"}
    assert seen == [2, 0]
    size = sum(value.nbytes for value in ARRAYS.values())
    assert count.rows == [{"client": c, "examples": 2, "loss": 0.5, "bytes_up": size} for c in (0, 2)]
    assert count.means(["loss"])["loss"] == 0.5


def test_a_tally_names_who_is_missing(replies: Callable[..., list[Message]]) -> None:
    with pytest.raises(ProtocolError, match="client 1 did not reply in time; federation.tolerate=0") as caught:
        list(tally(0).watch(replies([1, 3])))
    assert "\n" not in str(caught.value)
    list((count := tally(2)).watch(replies([2])))
    assert count.failures == ["client 0 did not reply in time", "client 2 did not reply in time"]
    list((count := tally(2)).watch(replies([2], [3])))
    assert count.failures == ["client 2: node 3 burnt", "client 0 did not reply in time"], (
        "client 2 did reply: with an error"
    )
    with pytest.raises(ProtocolError, match=r"node 3 burnt \(and 1 more\); federation.tolerate=1"):
        list(tally(1).watch(replies([2], [3])))


def test_a_tally_refuses_what_does_not_fit(replies: Callable[..., list[Message]]) -> None:
    for spoil in ({"a.s": LazyArray(np.array(np.nan))}, {"a.s": LazyArray(np.zeros(2))}, {"z": LazyArray(np.zeros(2))}):
        (reply,) = replies([2])
        reply.content[codec.ARRAYS] = ArrayRecord({**reply.content[codec.ARRAYS], **spoil})  # type: ignore[dict-item]
        with pytest.raises(ProtocolError, match="client 1 sent"):
            list(tally(0).watch([reply]))
    for content in (RecordDict(), RecordDict({codec.ARRAYS: codec.encode(ARRAYS)}), codec.reply(ARRAYS, {"loss": 1.0})):
        (reply,) = replies([2])
        reply.content = content
        with pytest.raises(ProtocolError, match="client 1 replied without"):
            list(tally(0).watch([reply]))


def test_a_stock_strategy_instructs_exactly_the_cohort() -> None:
    with InProcessGrid(app_of(lambda *_: ARRAYS), 9) as grid:
        chosen = CohortGrid(grid, [7, 2, 5])
        assert list(chosen.get_node_ids()) == [7, 2, 5]
        messages = list(
            FedAvg(min_available_nodes=0).configure_train(1, codec.encode(ARRAYS), ConfigRecord({}), chosen)
        )
        assert sorted(message.metadata.dst_node_id for message in messages) == [2, 5, 7]
        assert len(list(chosen.send_and_receive(messages))) == 3
