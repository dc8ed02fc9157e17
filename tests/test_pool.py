"""A million clients: nothing but the data is there for each, and what a few of them do costs what a few cost."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fedssl import config, partition
from fedssl.errors import ConfigError, PrivacyError
from fedssl.flower import checks
from fedssl.job.shards import parts_of
from fedssl.progress import Reporter

POOL = 10**6


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_million_disjoint_clients_are_two_arrays() -> None:
    targets = np.arange(2 * POOL) % 10
    tracemalloc.start()
    parts = partition.iid(len(targets), POOL, rng())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 8 * (2 * POOL + POOL) + 2**20
    assert peak < 8 * 8 * POOL
    assert len(parts) == POOL
    assert (partition.sizes_of(parts) == 2).all()
    assert parts[-1].tolist() == parts[POOL - 1].tolist()
    assert [part.tolist() for part in parts[3:5]] == [parts[3].tolist(), parts[4].tolist()]
    with pytest.raises(IndexError):
        parts[POOL]
    assert partition.heterogeneity(parts, targets)["gini"] == pytest.approx(0, abs=1e-9)
    owner = partition.owner_of(parts)
    assert all((owner[parts[client]] == client).all() for client in range(0, POOL, POOL // 7))


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_virtual_clients_draw_by_their_number_alone(alpha: float | None) -> None:
    targets = np.arange(1000) % 10
    few = partition.virtual(targets, 5, rng(), examples=40, alpha=alpha)
    many = partition.virtual(targets, POOL, rng(), examples=40, alpha=alpha)
    for client in range(5):
        rows = few[client]
        assert rows.dtype == np.int64
        assert len(rows) == len(np.unique(rows)) == 40
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        assert rows[-1] < 1000
        assert rows.tolist() == many[client].tolist() == few[client].tolist()
    assert many[POOL - 1].tolist() != many[POOL - 2].tolist()
    assert partition.fingerprint(few) != partition.fingerprint(many)
    assert partition.fingerprint(many) != partition.fingerprint(
        partition.virtual(targets, POOL, rng(1), examples=40, alpha=alpha)
    )
    skew = partition.heterogeneity(many, targets)["label_emd"]
    assert skew > 0.5 if alpha else skew < 0.25
    assert (partition.sizes_of(many) == 40).all()


def test_virtual_clients_take_an_example_twice_only_where_a_class_is_too_small() -> None:
    parts = partition.virtual(np.array([0] * 50 + [1]), 30, rng(), examples=10, alpha=0.5)
    assert all(len(part) == 10 and len(np.unique(part[part < 50])) == (part < 50).sum() for part in parts)
    assert any((part == 50).sum() > 1 for part in parts)


def test_what_needs_an_owner_of_each_example_refuses_virtual_clients() -> None:
    with pytest.raises(ConfigError, match=r"11 of 10 examples"):
        partition.virtual(10, 3, rng(), examples=11)
    with pytest.raises(ConfigError, match="several clients"):
        partition.owner_of(partition.virtual(10, 3, rng(), examples=2))
    with pytest.raises(ConfigError, match="virtual"):
        partition.FeatureShift(base=partition.Virtual())
    with pytest.raises(PrivacyError, match="partition=virtual"):
        checks.holders(config.compose(["partition=virtual", "privacy=example", "method=byol", "method.norm=group"]).job)
    checks.holders(config.compose(["partition=virtual"]).job)


class Traced(Reporter):
    """Notes the memory in use when the first round may begin and when each has ended."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.used: list[int] = []

    def begin(self, title: str, done: int, rounds: int) -> None:
        self._note()

    def round(self, number: int, row: object) -> None:
        self._note()

    def _note(self) -> None:
        gc.collect()
        self.used.append(tracemalloc.get_traced_memory()[0])


def run(folder: Path, clients: int, fraction: float) -> tuple[Traced, int, dict[str, object]]:
    plan = config.compose(
        [
            *("method=simclr", "encoder=conv4", "encoder.width=4", "data=synthetic", "data.train=300", "data.test=32"),
            *("data.size=8", "partition=virtual", "partition.examples=16", f"federation.clients={clients}"),
            *(f"participation.fraction={fraction}", "federation.rounds=2", "local.batch_size=8", "device=cpu"),
            *("evaluate.every=1", "evaluate.clients=2", "evaluate.final=false", f"out={folder}", f"name={clients}"),
            "engine.workers=1",
        ]
    )
    reporter = Traced()
    tracemalloc.start()
    plan.build_engine().run(plan.job, plan.open(), reporter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(parts_of(plan.job, torch.device("cpu"))) == clients
    return reporter, peak, json.loads((plan.path / "split.json").read_text())


def test_a_round_of_five_of_a_million_costs_what_five_of_a_hundred_cost(tmp_path: Path) -> None:
    run(tmp_path / "warm", 100, 0.05)
    small, small_peak, split = run(tmp_path, 100, 0.05)
    assert len(split["sizes"]) == 100  # type: ignore[arg-type]
    large, large_peak, split = run(tmp_path, POOL, 5 / POOL)
    assert split["every"] == 1000
    assert len(split["sizes"]) == 1000  # type: ignore[arg-type]
    rows = (tmp_path / str(POOL) / "clients.jsonl").read_text().splitlines()
    assert len(rows) == 10
    assert not (tmp_path / str(POOL) / partition.SPLIT_FILE).exists()
    assert large.used[-1] - large.used[0] < small.used[-1] - small.used[0] + 2**20
    assert large_peak - small_peak < 24 * POOL  # a number or two a client while the payload is told, and no object
