"""The contract of every strategy: found by its yaml, ours and Flower's alike, and hand-computed numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from conftest import TINY, assert_same
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedssl import config, tree
from fedssl.flower import codec, strategy_state
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rounds import CohortGrid
from fedssl.job import Job
from fedssl.parts import Arrays
from strategies.fedavg import FedAvg

STRATEGIES = config.options_of("strategy")
NOW: Arrays = {
    "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "encoder.scale": np.float32(1.25).reshape(()),
    "encoder.count": np.array(5, dtype=np.int64),
}


def job_of(name: str) -> Job:
    return config.compose([*TINY, f"strategy={name}"]).job


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
        metrics = {codec.WEIGHT: weights[client], "partition-id": client, "loss": float(client)}
        return Message(codec.reply(moved, metrics), reply_to=message)

    return app


def one_round(
    strategy: Any, now: Arrays, changes: Mapping[int, float], weights: Mapping[int, int], order: list[int] | None = None
) -> Arrays:
    """Ask every client once, hand the replies over in the given order, return the merged arrays."""
    with InProcessGrid(echo(changes, weights), len(changes)) as grid:
        nodes = CohortGrid(grid, [client + 1 for client in sorted(changes)])
        messages = sorted(
            strategy.configure_train(1, codec.encode(now), ConfigRecord({}), nodes),
            key=lambda message: message.metadata.dst_node_id,
        )
        replies = list(grid.send_and_receive(messages))
        record, _ = strategy.aggregate_train(1, iter([replies[i] for i in order or range(len(replies))]))
    assert record is not None
    return tree.like(codec.decode(record), now)


@pytest.mark.parametrize("name", STRATEGIES)
def test_zero_updates_are_a_fixed_point(name: str) -> None:
    strategy = job_of(name).strategy()
    merged = one_round(strategy, NOW, dict.fromkeys(range(5), 0.0), {0: 1, 1: 77, 2: 3, 3: 1257, 4: 10})
    if name in ("fedavg", "fedbn"):
        assert_same(merged, NOW)
    for key, value in merged.items():
        np.testing.assert_allclose(value, NOW[key], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", STRATEGIES)
def test_names_shapes_and_types_are_kept(name: str) -> None:
    merged = one_round(job_of(name).strategy(), NOW, {0: 0.5, 1: -0.25, 2: 1.0}, {0: 1, 1: 2, 2: 3})
    assert merged.keys() == NOW.keys()
    for key, value in merged.items():
        assert value.shape == NOW[key].shape
        assert value.dtype == NOW[key].dtype, key
    assert merged["encoder.count"] == 5


@pytest.mark.parametrize("name", ["fedavg", "fedbn"])
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    changes = {i: float(x) for i, x in enumerate(np.random.default_rng(0).normal(size=6) * 10.0 ** np.arange(-3, 3))}
    weights = {i: 3 * i + 1 for i in range(6)}
    first = one_round(job_of(name).strategy(), NOW, changes, weights)
    for order in ([5, 4, 3, 2, 1, 0], [3, 1, 5, 0, 2, 4]):
        assert_same(first, one_round(job_of(name).strategy(), NOW, changes, weights, order))


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
    straight, first = job_of(name).strategy(), job_of(name).strategy()
    changes, weights = {0: 0.5, 1: -0.125, 2: 0.25}, {0: 4, 1: 2, 2: 7}
    once = one_round(straight, NOW, changes, weights)
    twice = one_round(straight, once, changes, weights)
    assert_same(once, one_round(first, NOW, changes, weights))
    resumed = job_of(name).strategy()
    strategy_state.give(resumed, *strategy_state.take(first))
    assert_same(twice, one_round(resumed, once, changes, weights))


def test_our_strategy_runs_in_anybodys_flower_app() -> None:
    """`Strategy.start` of Flower drives it, with Flower's own records."""
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
