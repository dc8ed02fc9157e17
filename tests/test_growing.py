"""A node whose own data grows between rounds trains on all of it, and keeps what it has learnt of each example."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from flwr.app import ConfigRecord, Message
from PIL import Image

from fedssl import config
from fedssl.errors import PrivacyError
from fedssl.files import fingerprint
from fedssl.flower import codec
from fedssl.flower.client_app import app
from fedssl.flower.codec import ClientState
from fedssl.flower.deploy.growing import digests, follow, places
from fedssl.flower.in_process import InProcessGrid
from fedssl.job import Job
from fedssl.job.setup import initial_model, shares_of
from fedssl.model import to_arrays
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.spending import pay

OWN = ("data=folder", "data.root=", "data.size=8", "data.augment.mean=[0.5]", "data.augment.std=[0.25]")
SITES = ("partition=sites", "partition.shape=[1,8,8]", "federation.clients=1", "federation.rounds=3")
KEY = "bank.keys"


def job_of(*options: str) -> Job:
    base = [o for o in TINY if not o.startswith(("data", "partition", "engine", "federation"))]
    return config.compose([*base, *OWN, *SITES, *options]).job


def picture(folder: Path, name: str, seed: int) -> None:
    """As a careful writer does it: under a hidden name, then in one move."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f".{name}.tmp", format="png")
    (folder / f".{name}.tmp").rename(folder / name)


class Node:
    """A client with a folder, asked round after round."""

    def __init__(self, grid: InProcessGrid, job: Job, folder: Path) -> None:
        self.grid, self.job, self.at = grid, job, 0
        model, shape = initial_model(job, (1, 8, 8)), (1, 8, 8)
        assert tuple(job.partition.shape) == shape  # type: ignore[attr-defined]
        shares = shares_of(job, model)
        self.arrays = {key: value for key, value in to_arrays(model).items() if shares[key].comes}
        grid.context(1).node_config["data-dir"] = str(folder)

    def round(self) -> Message:
        self.at += 1
        about = ConfigRecord({"job": self.job.text, "server-round": self.at, "made": self.at - 1})
        (reply,) = self.grid.send_and_receive(
            [Message(codec.instruction(codec.encode(self.arrays), about), 1, "train")]
        )
        return reply

    @property
    def state(self) -> ClientState:
        return ClientState.load(self.grid.context(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    for i in range(20):
        picture(place, f"m{i:02d}.png", i)
    return place


def test_a_bank_grows_with_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("method=instance", "method.momentum=1.0", "method.on_merge=keep")  # keys stay as they are
    with InProcessGrid(app, 1) as grid:
        node = Node(grid, job, folder)
        assert node.round().content.metric_records[codec.METRICS][codec.WEIGHT] == 16  # a fifth is held out
        before = node.state
        node.round()
        assert np.allclose(node.state.local[KEY], before.local[KEY], atol=1e-6)
        for i in range(20, 30):
            picture(folder, f"a{i}.png", i)  # in front of those that are there
        reply = node.round()
        assert reply.content.metric_records[codec.METRICS][codec.WEIGHT] == 24
        after = node.state
    old, new = (dict(zip(s.examples["digests"].tolist(), s.local[KEY], strict=True)) for s in (before, after))
    assert len(new) == 24
    both = old.keys() & new.keys()
    assert len(both) >= 10
    for digest in both:
        assert np.allclose(new[digest], old[digest], atol=1e-6)
    for digest in new.keys() - old.keys():
        assert np.linalg.norm(new[digest]) == pytest.approx(1.0, abs=1e-5), "a new example has a key of its own"


def test_a_folder_that_stays_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedssl.job import setup

    read: list[str] = []
    genuine: Callable[..., Any] = setup.own_data
    monkeypatch.setattr(setup, "own_data", lambda *given: (read.append(given[1]), genuine(*given))[1])
    with InProcessGrid(app, 1) as grid:
        node = Node(grid, job_of("method=simclr", "seed=3"), folder)
        for grown, times in ((False, 1), (False, 1), (True, 2)):
            if grown:
                picture(folder, "new.png", 99)
            node.round()
            assert len(read) == times


def test_what_a_place_looks_like(folder: Path) -> None:
    def changed(act: Callable[[], object]) -> bool:
        before = fingerprint(folder)
        act()
        return fingerprint(folder) != before

    assert not changed(lambda: None)
    assert not changed(lambda: (folder / ".half-written").write_bytes(b"1"))
    assert changed(lambda: (folder / "deeper").mkdir() or picture(folder / "deeper", "x.png", 1))
    assert changed(lambda: os.utime(folder / "m00.png", ns=(1, 1)))
    assert changed(lambda: (folder / "m01.png").rename(folder / "z.png"))
    assert changed(lambda: (folder / "z.png").unlink())
    assert fingerprint(folder / "m00.png") != fingerprint(folder / "m02.png")
    assert fingerprint(folder / "nowhere") == fingerprint(folder / "nowhere")


def test_rows_go_with_their_examples() -> None:
    there, here = places(np.array([5, 7, 7, 9], np.uint64), np.array([7, 1, 9, 7, 7], np.uint64))
    assert list(zip(there.tolist(), here.tolist(), strict=True)) == [(1, 0), (3, 2), (2, 3)]
    assert [len(side) for side in places(np.zeros(0, np.uint64), np.array([1], np.uint64))] == [0, 0]

    class Rows:
        def __init__(self, rows: list[float]) -> None:
            self.rows = torch.tensor(rows)[:, None]

        def __len__(self) -> int:
            return len(self.rows)

        def batch(self, index: torch.Tensor) -> torch.Tensor:
            return self.rows[index]

    new = {KEY: np.zeros((3, 1), np.float32)}
    state = ClientState(local={KEY: np.array([[1.0], [2.0]], np.float32), "queue.x": np.ones(2)}, round=1)
    first = follow(state, Rows([10, 20]), ["bank"], new)
    assert first.local is state.local
    moved = follow(first, Rows([20, 30, 10]), ["bank"], new)
    assert moved.local[KEY].tolist() == [[2.0], [0.0], [1.0]]
    assert moved.local["queue.x"].tolist() == [1.0, 1.0], "not a part with a row an example"
    assert not new[KEY].any()
    assert moved.examples["digests"].tolist() == digests(Rows([20, 30, 10])).tolist()
    assert follow(state, Rows([10]), [], new) is state, "nothing is read for methods without such parts"


def test_graphs_have_digests() -> None:
    job = config.compose(["data=synthetic_graphs", "data.train=12", "data.test=6", "data.classes=3", "encoder=gin",
                          "data.size=8"]).job  # fmt: skip
    shard = job.data.load().train.shard(np.arange(12), 0)
    found = digests(shard)
    assert len(set(found.tolist())) == 12
    assert digests(job.data.load().train.shard(np.array([3, 1]), 0)).tolist() == found[[3, 1]].tolist()


def test_noise_that_was_found_for_one_number_of_records_is_for_no_other() -> None:
    fixed, public = ExampleDP(epsilon=None, noise_multiplier=1.0), ExampleDP(None, 1.0, sample_rate=0.25)
    for mechanism in (fixed, public):
        once = pay(mechanism.planned(40, 10, 1, 3), "", 1, 1, 1.0, {}).ledger.text()
        again = pay(mechanism.planned(40, 10, 1, 3), once, 2, 1, 1.0, {})
        assert again.public["spent"] == 8
        if mechanism is public:
            assert pay(mechanism.planned(50, 10, 1, 3), once, 2, 1, 1.0, {}).public["spent"] == 8
        else:
            with pytest.raises(PrivacyError, match="number of records has changed to 50 since it began"):
                pay(mechanism.planned(50, 10, 1, 3), once, 2, 1, 1.0, {})
