"""The contract of every strategy: found by its yaml, ours and Flower's alike, and hand-computed numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedssl import config, tree
from fedssl.flower import codec, strategy_state
from fedssl.flower.exchange import CohortGrid
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rule import Own, Trainer
from fedssl.job import Job
from fedssl.job.setup import build_model, shares_of, workshop_of
from fedssl.model import layout_of, to_arrays
from fedssl.parts import Arrays, Layout, part_of
from strategies.base import PartStrategy
from strategies.fedavg import FedAvg

STRATEGIES = config.options_of("strategy")
NOW: Arrays = {
    "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "encoder.scale": np.float32(1.25).reshape(()),
    "encoder.count": np.array(5, dtype=np.int64),
}


@lru_cache
def job_of(name: str) -> Job:
    """A job with a method that the strategy serves: the one of its name, else BYOL, which has every kind of part."""
    method = name if name in config.options_of("method") else "byol"
    return config.compose(tiny(f"method={method}", f"strategy={name}", "federation.clients=6")).job


OURS = [name for name in STRATEGIES if isinstance(job_of(name).strategy(), PartStrategy)]


def made(name: str) -> Any:
    """A strategy as a run has it: one that trains has the server's model and the public examples."""
    strategy = job_of(name).strategy()
    if isinstance(strategy, Trainer):
        strategy.prepare(workshop_of(job_of(name), torch.device("cpu"), (3, 8, 8)))
    return strategy


@lru_cache
def arrays_of(name: str) -> Arrays:
    """What a strategy merges, with its initial values, and a counter."""
    job = job_of(name)
    model = build_model(job, (3, 8, 8))
    shares = shares_of(job, model)
    merged = {key: value for key, value in to_arrays(model).items() if shares[key].comes}
    counters = {"encoder.count", *(["teacher.encoder.count"] if any(k.startswith("teacher.") for k in merged) else [])}
    return merged | {key: np.array(5, dtype=np.int64) for key in sorted(counters)}


def trained_parts(name: str, arrays: Arrays) -> Arrays:
    """Those arrays that are weights; others, such as centroids, are what a rule makes of the clients' summaries."""
    trained = {part.name for part in job_of(name).method.parts if part.trainable or part.follows}
    return {key: value for key, value in arrays.items() if part_of(key) in trained}


def layout_for(name: str) -> Layout:
    job = job_of(name)
    return layout_of(build_model(job, (3, 8, 8)), job.method.parts)


def echo(changes: Mapping[int, float], weights: Mapping[int, int]) -> ClientApp:
    """Clients that add a constant to every floating array."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        arrays = codec.decode(message.content.array_records[codec.ARRAYS])
        moved = {
            k: v + np.float32(changes[client]) if np.issubdtype(v.dtype, np.floating) else v.copy()
            for k, v in arrays.items()
        }
        metrics = {codec.WEIGHT: weights[client], "partition-id": client, "loss": float(client), "divergence": 0.5}
        return Message(codec.reply(moved, metrics), reply_to=message)

    return app


def one_round(
    strategy: Any,
    now: Arrays,
    changes: Mapping[int, float],
    weights: Mapping[int, int],
    order: list[int] | None = None,
    at: int = 1,
) -> Arrays:
    """Ask every client once, hand the replies over in the given order, return the merged arrays."""
    with InProcessGrid(echo(changes, weights), len(changes)) as grid:
        nodes = CohortGrid(grid, [client + 1 for client in sorted(changes)])
        messages = sorted(
            strategy.configure_train(at, codec.encode(now), ConfigRecord({}), nodes),
            key=lambda message: message.metadata.dst_node_id,
        )
        replies = list(grid.send_and_receive(messages))
        record, _ = strategy.aggregate_train(at, iter([replies[i] for i in order or range(len(replies))]))
    assert record is not None
    return tree.like(codec.decode(record), now)


@pytest.mark.parametrize("name", STRATEGIES)
def test_zero_updates_are_a_fixed_point(name: str) -> None:
    """Also after rounds of its own: a rule whose weights do not sum to 1 drifts (defect 3 of the field's codes)."""
    strategy, now = made(name), arrays_of(name)
    for at in range(1, 6):
        now = one_round(strategy, now, dict.fromkeys(range(5), 0.0), {0: 1, 1: 77, 2: 3, 3: 1257, 4: 10}, at=at)
    for key, value in trained_parts(name, now).items():
        if name in ("fedavg", "fedbn", "fedprox", "fedu", "fedema") or name.startswith("fedbyol"):
            assert value.tobytes() == arrays_of(name)[key].tobytes(), key
        np.testing.assert_allclose(value, arrays_of(name)[key], rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", STRATEGIES)
def test_names_shapes_and_types_are_kept(name: str) -> None:
    now = arrays_of(name)
    merged = one_round(made(name), now, {0: 0.5, 1: -0.25, 2: 1.0}, {0: 1, 1: 2, 2: 3}, at=9)
    assert merged.keys() == now.keys()
    for key, value in merged.items():
        assert value.shape == now[key].shape
        assert value.dtype == now[key].dtype, key
        assert np.isfinite(value).all(), key
    assert merged["encoder.count"] == 5


@pytest.mark.parametrize("name", OURS)
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    changes = {i: float(x) for i, x in enumerate(np.random.default_rng(0).normal(size=6) * 10.0 ** np.arange(-3, 3))}
    weights = {i: 3 * i + 1 for i in range(6)}
    first = one_round(made(name), arrays_of(name), changes, weights, at=9)
    for order in ([5, 4, 3, 2, 1, 0], [3, 1, 5, 0, 2, 4]):
        assert_same(first, one_round(made(name), arrays_of(name), changes, weights, order, at=9))


@pytest.mark.parametrize("name", OURS)
def test_a_rule_that_says_mean_reads_the_mean_alone(name: str) -> None:
    """Two sets of clients with one mean give one result; a rule that says `each` is free to tell them apart."""
    alike, now = {0: 8, 1: 8}, arrays_of(name)
    spread, close = ({0: 0.5 + d, 1: 0.5 - d} for d in (4.0, 0.25))
    one, two = (one_round(made(name), now, changes, alike, at=9) for changes in (spread, close))
    if made(name).reads == "mean":
        for key, value in one.items():
            np.testing.assert_allclose(value, two[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", OURS)
def test_a_late_joiner_starts_from_the_server(name: str) -> None:
    """Whatever the round: its own arrays are what it received, and a teacher of its own is the copy of them."""
    now, layout = arrays_of(name), layout_for(name)
    start, memo = made(name).receive(now, Own(), 7, layout)
    for key, value in now.items():
        if key in start:
            assert_same({key: start[key]}, {key: value})
    for key in start.keys() - now.keys():
        teacher, _, followed = key.partition(".")
        assert teacher in layout.follows
        assert_same({key: start[key]}, {key: now[followed]})
    assert all(np.isfinite(value) for value in memo.values())


@pytest.mark.parametrize("name", OURS)
def test_a_client_that_sat_out_rounds_still_starts_well(name: str) -> None:
    """It blends what it has with what it gets, part by part, and never leaves the line between the two."""
    strategy, now, layout = made(name), arrays_of(name), layout_for(name)
    start, memo = strategy.receive(now, Own(), 1, layout)
    trained = {k: v + np.float32(0.5) if v.dtype.kind == "f" else v for k, v in ({**now, **start}).items()}
    memo = strategy.remember({**now, **start}, trained, memo, layout)
    mine = {key: value for key, value in trained.items() if part_of(key) in strategy.keeps}
    later, memo = strategy.receive(now, Own(mine, memo, 1), 9, layout)
    for key, value in later.items():
        low, high = (now[key], trained[key]) if key in now else (trained[key], trained[key])
        if value.dtype.kind == "f" and key in now:
            assert ((value >= low - 1e-6) & (value <= high + 1e-6)).all(), key
    assert all(np.isfinite(value) for value in memo.values())


def test_fedavg_by_hand() -> None:
    merged = one_round(FedAvg(), NOW, {0: 1.0, 1: -1.0, 2: 4.0}, {0: 1, 1: 2, 2: 5})
    np.testing.assert_allclose(merged["encoder.weight"] - NOW["encoder.weight"], (1 - 2 + 20) / 8, rtol=1e-6)
    uniform = one_round(FedAvg(weighting="uniform"), NOW, {0: 1.0, 1: -1.0, 2: 4.0}, {0: 1, 1: 2, 2: 5})
    np.testing.assert_allclose(uniform["encoder.weight"] - NOW["encoder.weight"], 4 / 3, rtol=1e-6)


def test_fedmedian_by_hand() -> None:
    merged = one_round(job_of("fedmedian").strategy(), NOW, {0: 1.0, 1: -1.0, 2: 40.0}, {0: 1, 1: 2, 2: 5})
    np.testing.assert_allclose(merged["encoder.weight"] - NOW["encoder.weight"], 1.0, rtol=1e-6)


def test_fedadam_by_hand() -> None:
    """Reddi et al. 2021, algorithm 2, as Flower 1.41 has it: m, v from zero, step eta * m / (sqrt(v) + tau)."""
    strategy = job_of("fedadam").strategy()
    merged = one_round(strategy, NOW, {0: 0.5, 1: 0.5}, {0: 1, 1: 1})
    eta, beta_1, beta_2, tau = 0.01, 0.9, 0.99, 0.001
    m, v = (1 - beta_1) * 0.5, (1 - beta_2) * 0.25
    corrected = eta * np.sqrt(1 - beta_2**2) / (1 - beta_1**2)  # Flower counts the first round as t = 2
    plain = eta
    step = merged["encoder.weight"] - NOW["encoder.weight"]
    candidates = [rate * m / (np.sqrt(v) + tau) for rate in (corrected, plain)]
    assert min(abs(float(step.mean()) - c) for c in candidates) < 1e-4
    assert float(step.std()) < 1e-6, "equal updates move every coordinate alike"


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_state_of_a_strategy_resumes(name: str) -> None:
    straight, first, now = made(name), made(name), arrays_of(name)
    changes, weights = {0: 0.5, 1: -0.125, 2: 0.25}, {0: 4, 1: 2, 2: 7}
    once = one_round(straight, now, changes, weights)
    twice = one_round(straight, once, changes, weights, at=2)
    assert_same(once, one_round(first, now, changes, weights))
    resumed = made(name)
    strategy_state.give(resumed, *strategy_state.take(first))
    assert_same(twice, one_round(resumed, once, changes, weights, at=2))


@pytest.mark.parametrize("name", OURS)
def test_every_rule_runs_under_plain_flower(name: str) -> None:
    """`Strategy.start` of Flower drives it, with Flower's own records and no run directory."""
    now = arrays_of(name)
    with InProcessGrid(echo({0: 0.0, 1: 0.5, 2: 0.25}, {0: 1, 1: 1, 2: 2}), 3) as grid:
        initial = ArrayRecord({key: Array(value) for key, value in now.items()})
        result = made(name).start(grid=grid, initial_arrays=initial, num_rounds=2)
    assert codec.decode(result.arrays).keys() == now.keys()
    assert result.train_metrics_clientapp[2]["loss"] == 1.25


def test_our_strategy_adds_up_in_anybodys_flower_app() -> None:
    with InProcessGrid(echo({0: 1.0, 1: 3.0}, {0: 1, 1: 1}), 2) as grid:
        result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3, np.float32)]), num_rounds=2)
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], [4.0, 4.0, 4.0])
    assert result.train_metrics_clientapp[2]["loss"] == 0.5


def test_a_reply_without_arrays_is_refused_by_name() -> None:
    from fedssl.errors import ProtocolError
    from strategies.base import read

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, 1) as grid:
        messages = FedAvg().configure_train(1, codec.encode(NOW), ConfigRecord({}), grid)
        (reply,) = grid.send_and_receive(messages)
        with pytest.raises(ProtocolError, match="node 1 replied without"):
            read(reply)
