"""Faults on Flower's real processes: spoilt and late updates, full disks, torn states, two runs at once.

What is said to be lost is compared, bit for bit, with a simulation in which the same clients took part in each round.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import assert_same, final_arrays
from deployed.spoilt import SPOILT

from benchmarks.nodes import (
    OPTIONS,
    ROOT,
    Federation,
    federation,
    fill,
    own_data,
    same_clients,
    simulated,
    small_disk,
)
from fedssl.flower.deploy.submit import Submission, submit
from fedssl.rundir import RunDirectory

pytestmark = pytest.mark.slow
CLIENTS = (0, 1, 2)
WORKLOAD = (*OPTIONS, f"federation.clients={len(CLIENTS)}")
FEWER = ("federation.clients=2", "federation.rounds=2", "federation.tolerate=0")  # the third node is not asked
KEEPING = ("method=byol", "strategy.share.teacher=local")  # something that nodes must not forget
DISK_BYTES = 1 << 20
DEADLINE_S = 90


@dataclass(frozen=True)
class Nodes:
    """A federation with three nodes, of which 1 and 2 are spoilt as they are told, and the disk of 2 can be filled."""

    real: Federation
    places: list[str]
    disk: Path | None  # of the state-dir of node 2, where this user may mount one
    why: str  # not

    def plan_of(self, client: int) -> Path:
        return self.real.folder / f"faults-{client}.json"

    def spoil(self, client: int, kinds: Mapping[int, str]) -> None:
        """Tell a node what becomes of its reply in which round."""
        whole = self.plan_of(client).with_suffix(".new")
        whole.write_text(json.dumps(kinds))
        whole.replace(self.plan_of(client))

    def start(self, client: int) -> None:
        key, name = self.real.folder / "keys" / f"node-{client}.key", f"node-{client}"
        state = self.disk if client == 2 else None
        path = os.pathsep.join(str(ROOT / place) for place in ("tests/deployed/hostile", "tests", "."))
        spoilt = {"PYTHONPATH": path, "PLAN_OF_FAULTS": str(self.plan_of(client))} if client else {}
        self.real.node(name, client, self.places[client], key, state=state, **spoilt)

    def submit(self, out: Path, name: str, *options: str) -> tuple[Submission, RunDirectory]:
        told = [*WORKLOAD, f"federation.timeout_s={DEADLINE_S}", *options, f"name={name}"]
        return submit(told, str(out), "edge"), RunDirectory(out / name)

    def until(self, what: Callable[[], bool], sent: Submission, seconds: float = 400.0) -> None:
        """Wait until something has happened in a run that is under way."""
        limit = time.monotonic() + seconds
        while not what():
            ended = f" of run {sent.run}" in self.superlink_says("Finished task")
            assert what() or (time.monotonic() < limit and not ended), self.real.logs()
            time.sleep(0.05)

    def superlink_says(self, words: str) -> str:
        """The lines of its log with these words."""
        lines = (self.real.folder / "superlink.log").read_text().splitlines()
        return "\n".join(line for line in lines if words in line)

    def completed(self, sent: Submission) -> None:
        status, details = sent.wait(print, 1.0, 60.0)
        assert status == "finished:completed", f"{details}\n{self.real.logs()}"

    def same(self, rundir: RunDirectory, *options: str) -> None:
        """The run has the arrays of the simulation with these options."""
        places = self.places[: rundir.config()["federation"]["clients"]]
        assert_same(final_arrays(rundir), final_arrays(simulated(rundir, places, WORKLOAD, *options)))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("federation")
    with ExitStack() as stack:
        disk, why = None, ""
        try:
            disk = stack.enter_context(small_disk(folder / "disk", DISK_BYTES))
        except OSError as error:
            why = f"no disk can be mounted to be filled: {error}"
        real = stack.enter_context(federation(folder, len(CLIENTS)))
        running = Nodes(real, own_data(folder, len(CLIENTS)), disk, why)
        real.superlink()
        real.register(len(CLIENTS))
        for client in CLIENTS:
            running.spoil(client, {})
            running.start(client)
        with pytest.MonkeyPatch.context() as patch:  # for Flower's command, which submits
            for name, value in real.environment.items():
                patch.setenv(name, value)
            yield running


@pytest.fixture
def nodes(started: Nodes) -> Nodes:
    """All of them honest."""
    for client in CLIENTS:
        started.spoil(client, {})
    return started


def failed(rundir: RunDirectory) -> dict[tuple[int, int], str]:
    """By round and client: why."""
    return {(row["round"], row["client"]): row["why"] for row in rundir.rows("failures.jsonl")}


def test_spoilt_stale_and_late_updates_are_named_and_the_others_go_on(nodes: Nodes, tmp_path: Path) -> None:
    """In round 4 client 1 answers the question of round 3 again, and client 2 answers after the round is over."""
    plans = {
        1: {1: "nan", 2: "shape", 3: "huge", 4: "stale"},
        2: {1: "infinite", 2: "key", 3: "far", 4: "late"},
    }
    for client, kinds in plans.items():
        nodes.spoil(client, kinds)
    options = ("federation.rounds=5", "federation.quorum=0.3", "federation.max_change=100")
    sent, rundir = nodes.submit(tmp_path, "spoilt", *options)
    nodes.until(lambda: len(rundir.rows()) == 4, sent)
    nodes.spoil(2, {})  # now it replies
    nodes.completed(sent)
    why = failed(rundir)
    assert sorted(why) == [(at, client) for at in (1, 2, 3, 4) for client in (1, 2)]
    for (at, client), sentence in why.items():
        kind = plans[client][at]
        expected = SPOILT[kind][1] if kind in SPOILT else "did not reply in time"
        assert sentence.startswith(f"client {client} "), sentence
        assert expected in sentence, (kind, sentence)
    assert [(row["clients"], row["failures"]) for row in rundir.rows()] == [*[(1, 2)] * 4, (3, 0)]
    assert rundir.rows()[3]["seconds"] >= DEADLINE_S
    assert nodes.superlink_says("Failed to store Message reply"), "it has taken the stale one"
    nodes.same(rundir, *options, *same_clients(rundir))


def test_a_full_disk_and_a_torn_state_are_the_failures_of_their_nodes(nodes: Nodes, tmp_path: Path) -> None:
    """The disk of client 2 is full in round 1, the state of client 1 torn in round 2; both are mended."""
    if nodes.disk is None:
        pytest.skip(nodes.why)
    filler = fill(nodes.disk)
    sent, rundir = nodes.submit(tmp_path, "unlucky", *KEEPING, "federation.rounds=3")
    nodes.until(lambda: len(rundir.rows()) == 1, sent)
    assert [path for path in nodes.disk.rglob("*") if path.is_file()] == [filler], "nothing half written is left"
    filler.unlink()
    state = nodes.real.folder / "state" / rundir.identity() / "000001-000001.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-7])
    nodes.until(lambda: len(rundir.rows()) == 2, sent)
    state.write_bytes(whole)
    nodes.completed(sent)
    why = failed(rundir)
    assert sorted(why) == [(1, 2), (2, 1)]
    place = f"its state-dir/{rundir.identity()}"
    full = f"client 2: {place}/000002-000001.safetensors cannot be written (No space left on device): free space"
    assert why[1, 2] == full
    assert why[2, 1].startswith(f"client 1: {place}/{state.name} cannot be read")
    assert str(nodes.real.folder) not in "".join(why.values())
    assert [row["clients"] for row in rundir.rows()] == [2, 2, 3]
    nodes.same(rundir, *KEEPING, "federation.rounds=3", *same_clients(rundir))


def test_a_full_disk_of_the_server_loses_no_round(nodes: Nodes, tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", DISK_BYTES))
        except OSError as error:
            pytest.skip(f"no disk can be mounted to be filled: {error}")
        options = (*KEEPING, *FEWER)
        sent, rundir = nodes.submit(disk, "full", *options)
        nodes.until(lambda: rundir.rounds == 1, sent)
        filler = fill(disk)
        status, details = sent.wait(print, 1.0, 60.0)
        assert status == "finished:failed"
        assert "cannot be written (No space left on device): free space" in details
        assert rundir.rounds == 1
        filler.unlink()
        sent, rundir = nodes.submit(disk, "full", *options)
        nodes.completed(sent)
        assert [row["clients"] for row in rundir.rows()] == [2, 2]
        nodes.same(rundir, *options)


def test_two_runs_at_once_on_the_same_nodes_do_not_meet(nodes: Nodes, tmp_path: Path) -> None:
    options = (*KEEPING, *FEWER)
    runs = [nodes.submit(tmp_path, f"run-{seed}", *options, f"seed={seed}") for seed in (0, 1)]
    nodes.until(lambda: all(rundir.rows() for _, rundir in runs), runs[1][0])
    assert not any(rundir.done for _, rundir in runs), "they were not at work at once"
    for sent, _ in runs:
        nodes.completed(sent)
    for seed, (_, rundir) in enumerate(runs):
        nodes.same(rundir, *options, f"seed={seed}")
    assert {rundir.identity() for _, rundir in runs} <= {path.name for path in (nodes.real.folder / "state").iterdir()}
