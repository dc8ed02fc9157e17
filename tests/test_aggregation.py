"""The seam of aggregations: one mean instead of every update, and what is refused beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from torch import nn

from fedssl.aggregation.base import Told
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.flower.aggregation.server import Aggregator
from fedssl.flower.client_app import app
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.run.running import Running

Compose = Callable[..., Plan]


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm", "fedema", "fedbyol"])
def test_a_strategy_that_reads_the_mean_cannot_tell_the_difference(strategy: str, plan: Compose) -> None:
    # Clients of one size, so that the mean by examples is the uniform one.
    common = ["method=byol", f"strategy={strategy}", "partition=iid", "local.optimizer=sgd", "local.lr=0.01"]
    if strategy == "fedyogi":
        common += ["strategy.tau=0.1"]  # its second moment has a sign, which rounding may turn: let it weigh little
    each = final_arrays(execute(plan(*common, name="each")))
    mean = final_arrays(execute(plan(*common, "aggregation=mean", name="mean")))
    for key, value in each.items():  # a change travels in float32, so the last bits differ
        np.testing.assert_allclose(mean[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_server_learns_who_came_and_nothing_else(plan: Compose) -> None:
    rundir = execute(plan("aggregation=mean", "evaluate.every=1", "encoder.norm=batch"))
    for row in rundir.rows("clients.jsonl"):
        assert row.keys() == {"round", "client", "bytes_up"}
    assert not any({"loss", "drift", "client_cka"} & row.keys() for row in rundir.rows())
    assert rundir.read("summary.json")["loss"] is None
    content = rundir.read("payload.json")
    assert [entry["name"] for entry in content["up"] if not entry["part"]] == ["partition-id"]
    assert content["bytes_up"] == rundir.rows("clients.jsonl")[0]["bytes_up"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("strategy=krum",), "Krum compares the updates of single clients"),
        (("strategy=fedmedian",), "FedMedian compares"),
        (("strategy=ldawa",), "LDawa compares"),
        (("method=fedsc", "strategy=fedsc"), "a summary of its own data"),
        (("compression=int8",), "compression=none"),
        (("federation.quorum=2",), "federation.quorum=1"),
        (("participation=buffered",), "aggregation=plain"),
    ],
)
def test_what_reads_single_updates_is_refused(options: tuple[str, ...], words: str, plan: Compose) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("aggregation=mean", *options)


def test_a_client_without_time_or_modality_sends_no_change(plan: Compose) -> None:
    rundir = execute(
        plan("aggregation=mean", "participation=stragglers", "participation.deadline_s=1e-6", "federation.rounds=1")
    )
    assert {row["bytes_up"] for row in rundir.rows("clients.jsonl")} == {rundir.read("payload.json")["bytes_up"]}


@dataclass(frozen=True)
class Parrot:
    """Answers with what it was asked, and with what it was asked before."""

    each: ClassVar[bool] = True

    def answer(self, question: Told, secrets: Told, client: int) -> tuple[Told, Told]:
        return {"now": question["word"], "before": secrets.get("word", ""), "client": client}, question


def test_the_server_can_ask_its_clients(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan().job
    monkeypatch.setattr("fedssl.flower.aggregation.clients.Answering", object)
    monkeypatch.setattr(type(job), "aggregation", Parrot())
    with InProcessGrid(app, 3, 1) as grid:
        aggregator = Aggregator.begin(job, grid, {0: 1, 1: 2, 2: 3}, nn.Linear(1, 1))
        first = aggregator.ask({client: {"word": f"a{client}"} for client in range(3)})
        second = aggregator.ask({2: {"word": "b2"}})
    assert first[1] == {"now": "a1", "before": "", "client": 1}
    assert second == {2: {"now": "b2", "before": "a2", "client": 2}}


def test_resuming_is_exact(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan("aggregation=mean", "strategy=fedadam", "federation.rounds=3", name="whole")
    assert_same(final_arrays(execute(whole)), resumed(whole.at(whole.path.parent / "parts"), monkeypatch))


def resumed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The end of a run that is stopped between its first two rounds and resumed."""
    import fedssl.flower.server as server

    original = server._round

    def stop(run: Running, strategy: Any, at: int, *others: Any) -> Any:
        merged = original(run, strategy, at, *others)
        if at == 1:
            raise KeyboardInterrupt
        return merged

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(server, "_round", stop)
        execute(plan)
    return final_arrays(execute(plan))
