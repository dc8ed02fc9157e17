"""Worker processes: the bits of worker threads, what a client keeps, failures, and no process that is left."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, execute, final_arrays
from flwr.app import ConfigRecord, Context, Message
from safetensors import SafetensorError
from test_codec import ARRAYS, app_of, ask
from test_laws import BUFFERED, interrupted, metrics

from fedssl.config import Plan
from fedssl.errors import ConfigError, ProtocolError
from fedssl.flower import codec
from fedssl.flower.codec import ClientState
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.workers.processes import WorkerDiedError
from fedssl.parts import Arrays

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are forked, which only Linux allows")

Compose = Callable[..., Plan]
KEEPING = [  # what clients keep between rounds, and what is sent to them and back
    (),
    ("method=byol", "strategy.share.predictor=local", "encoder.norm=batch", "participation.fraction=0.67"),
    ("strategy=fedema", "method=byol", "participation.fraction=0.67"),
    ("compression=topk_int8", "compression.down=float16", "participation.fraction=0.67"),
    (*BUFFERED, "strategy=fedu", "method=byol", "strategy.threshold=0.0001"),
    ("privacy=example", "method=byol", "encoder.norm=group", "method.norm=group", "participation.fraction=0.67"),
    ("aggregation=secure", "local.optimizer=sgd", "local.lr=0.1"),
    ("aggregation=local_dp", "aggregation.delta=0.01", "encoder.norm=group", "method.norm=layer"),
]


@pytest.mark.parametrize("overrides", KEEPING, ids=lambda o: "-".join(o) or "default")
def test_the_bits_are_those_of_threads(overrides: tuple[str, ...], plan: Compose) -> None:
    options = ("federation.rounds=3", "evaluate.every=1", *overrides)
    threads = execute(plan(*options, name="threads"))
    processes = execute(plan(*options, "engine=processes", "engine.workers=2", name="processes"))
    assert_same(final_arrays(threads), final_arrays(processes))
    assert threads.rows("clients.jsonl") == processes.rows("clients.jsonl")
    assert metrics(threads) == metrics(processes)


def test_processes_go_on_where_threads_were_killed(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("federation.rounds=4", "method=byol", "strategy.share.teacher=local")
    threads = execute(plan(*options, name="threads"))
    interrupted(plan(*options, name="again"), 1, monkeypatch)
    again = execute(plan(*options, "engine=processes", "engine.workers=2", name="again"))
    assert_same(final_arrays(threads), final_arrays(again))


def test_cohorts_train_in_processes_as_in_threads(plan: Compose) -> None:
    options = ("federation.clients=5", "engine.cohort=2", "method=byol", "strategy.share.teacher=local")
    threads = execute(plan(*options, name="threads"))
    processes = execute(plan("engine=processes", *options, name="processes"))
    assert_same(final_arrays(threads), final_arrays(processes))


def test_auto_learns_from_what_workers_measure(plan: Compose) -> None:
    run = execute(plan("engine=processes", "engine.cohort=auto", "federation.clients=9", "federation.rounds=4"))
    assert (run.path / "cohort.json").exists()


def test_states_above_the_limit_go_to_disk(plan: Compose) -> None:
    options = ("method=byol", "strategy.share.teacher=local", "federation.rounds=3")
    free = execute(plan(*options, name="free"))
    tight = execute(plan("engine=processes", "engine.state_limit_mib=0", *options, name="tight"))
    assert_same(final_arrays(free), final_arrays(tight))


def test_workers_get_what_was_sent_and_keep_nothing() -> None:
    """Arrays of every shape and type, in order; a context comes home; each worker has a process of its own."""
    sent = {"a.s": np.array(2.5), "z": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1], "b": np.zeros((0, 2)) > 0}

    def work(message: Message, context: Context) -> Arrays:
        found = codec.decode(message.content.array_records[codec.ARRAYS])
        assert [(k, v.dtype, v.shape) for k, v in found.items()] == [(k, v.dtype, v.shape) for k, v in ARRAYS.items()]
        assert not any(value.flags.writeable for value in found.values())
        state = ClientState.load(context)
        ClientState(sent, memo={"visits": state.memo.get("visits", 0) + 1}).save(context)
        return {**sent, "pid": np.array([os.getpid(), context.node_id])}

    with InProcessGrid(app_of(work), 10**6, 2, processes=True) as grid:
        for nodes in ([4, 1], [4], [4, 999_999]):
            replies = list(grid.send_and_receive(ask(nodes)))
            arrays = [codec.decode(reply.content.array_records[codec.ARRAYS]) for reply in replies]
            assert [int(one["pid"][1]) for one in arrays] == nodes
            assert os.getpid() not in {int(one["pid"][0]) for one in arrays}
            for one in arrays:
                assert list(one) == ["a.s", "z", "b", "pid"]
                assert all((one[k] == v).all() and one[k].dtype == v.dtype for k, v in sent.items())
        assert {n: ClientState.load(c).memo["visits"] for n, c in grid.contexts.items()} == {1: 1, 4: 3, 999_999: 1}
        assert list(ClientState.load(grid.context(4)).local) == list(sent)
    assert not multiprocessing.active_children()


def test_a_client_that_fails_says_so_from_its_process() -> None:
    """Our sentences arrive as they are, others with the place; what was saved before the failure is kept."""

    def work(_: Message, context: Context) -> Arrays:
        ClientState(ledger="paid").save(context)
        if context.node_id == 2:
            raise ConfigError("local.lr=9 is too <high>: 'lower' it")
        if context.node_id == 3:
            raise KeyError("lost")
        return ARRAYS

    with pytest.raises(ConfigError) as ours, InProcessGrid(app_of(work), 3, 2, processes=True) as grid:
        list(grid.send_and_receive(ask([1, 2])))
    assert str(ours.value) == "local.lr=9 is too <high>: 'lower' it"
    lost = pytest.raises(RuntimeError, match="KeyError: 'lost'")
    with lost as other, InProcessGrid(app_of(work), 3, 2, processes=True) as grid:
        list(grid.send_and_receive(ask([3])))
    assert "in work" in other.value.__notes__[0]
    with InProcessGrid(app_of(work), 3, 2, fail_fast=False, processes=True) as grid:
        replies = list(grid.send_and_receive(ask([1, 2, 3])))
        assert [ClientState.load(grid.context(node)).ledger for node in (1, 2, 3)] == ["paid"] * 3
    assert [reply.has_error() for reply in replies] == [False, True, True]
    assert "too <high>" in replies[1].error.reason


@pytest.mark.parametrize("strict", [True, False])
def test_a_worker_that_dies_ends_the_run(strict: bool) -> None:
    """Whatever is tolerated: its clients' states are gone."""

    def work(_: Message, context: Context) -> Arrays:
        if context.node_id == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return ARRAYS

    died = pytest.raises(WorkerDiedError, match=r"signal 9.*fedssl resume")
    with died, InProcessGrid(app_of(work), 3, 2, fail_fast=strict, processes=True) as grid:
        list(grid.send_and_receive(ask([1, 2, 3])))
    assert not multiprocessing.active_children()


def test_a_message_that_cannot_be_packed_is_a_failure_and_nobody_waits() -> None:
    def work(*_: object) -> Arrays:
        return ARRAYS

    content = codec.instruction(codec.encode({"a.s": np.array(["words"])}), ConfigRecord({}))
    with pytest.raises(SafetensorError, match="dtype"), InProcessGrid(app_of(work), 1, 1, processes=True) as grid:
        list(grid.send_and_receive([Message(content, 1, "train")]))
    assert not multiprocessing.active_children()


def test_an_interrupted_run_does_not_wait_for_its_workers() -> None:
    def work(*_: object) -> Arrays:
        time.sleep(60)
        return ARRAYS

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), InProcessGrid(app_of(work), 3, 2, processes=True) as grid:
        threading.Timer(0.3, _thread.interrupt_main).start()
        list(grid.send_and_receive(ask([1])))
    while multiprocessing.active_children() and time.monotonic() < began + 20:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    assert time.monotonic() < began + 20


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, time\n"
        "from flwr.clientapp import ClientApp\n"
        "from fedssl.flower.in_process import InProcessGrid\n"
        "with InProcessGrid(ClientApp(), 3, 2, processes=True):\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        assert len(children) == 2
        process.kill()
    until = time.monotonic() + 20
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)


def _runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("threads=2",), "threads=2: set threads=1"),
        (("device=cuda",), "trains on cuda: use engine=in_process"),
        ((), "this is darwin: use engine=in_process"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    options: tuple[str, ...], sentence: str, plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan("engine=processes", *options)
    rundir = chosen.open()
    if not options:
        monkeypatch.setattr(sys, "platform", "darwin")
    if "device=cuda" in options:
        monkeypatch.setattr("fedssl.flower.engines.device_of", lambda job: torch.device("cuda"))
    with pytest.raises(ConfigError, match=sentence):
        chosen.build_engine().run(chosen.job, rundir, None)  # type: ignore[arg-type]


def test_a_refusal_inside_a_worker_is_the_runs(plan: Compose) -> None:
    with pytest.raises(ProtocolError, match="norm=group") as caught:
        execute(plan("method=byol", "data.train=3", "partition=iid", "engine=processes", "federation.tolerate=1"))
    assert "\n" not in str(caught.value)
