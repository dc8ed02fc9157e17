"""Every engine gives the same arrays, bit for bit on the CPU."""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from test_laws import interrupted

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, FedsslError, ProtocolError
from fedssl.flower import codec, in_process
from fedssl.flower.client import worker
from fedssl.flower.client_app import app
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.run.states import States
from fedssl.flower.server import federate
from fedssl.job.setup import build_model
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from fedssl.progress import Reporter
from strategies.fedavg import FedAvg

Compose = Callable[..., Plan]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed")

# Ray's own code warns and leaves sockets open; that is not ours to mend.
quiet_ray = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _rays_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files that Ray forgot to close are collected in the test that may say so, not in one after it."""
    yield
    if request.node.get_closest_marker("filterwarnings"):
        gc.collect()


@needs_ray
@quiet_ray
@pytest.mark.slow
def test_ray_equals_in_process(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second round on, with what is kept between rounds; test_flwr_run.py has a run from the first."""
    options = (
        *("federation.rounds=4", "evaluate.every=1", "method=byol", "strategy.share.teacher=local"),
        *("participation.fraction=0.67", "compression=topk_int8", "compression.down=float16"),
    )
    interrupted(plan(*options, name="rays"), 1, monkeypatch)
    ours = execute(plan(*options, name="ours"))
    rays = execute(plan(*options, "engine=ray", "engine.cpus=2", name="rays"))
    assert_same(final_arrays(ours), final_arrays(rays))
    assert ours.rows("clients.jsonl") == rays.rows("clients.jsonl")


@needs_ray
@quiet_ray
@pytest.mark.slow
def test_a_cluster_of_ray_equals_in_process(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of Ray's nodes that were there before the run, of one processor each; what clients keep is with neither."""
    import ray
    from ray.cluster_utils import Cluster

    options = ("method=byol", "strategy.share.teacher=local", "federation.rounds=3", "partition=iid")
    ours = execute(plan(*options, name="ours"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        rays = execute(plan(*options, "engine=ray", "engine.cpus=0", name="rays"))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert_same(final_arrays(ours), final_arrays(rays))
    assert ours.rows("clients.jsonl") == rays.rows("clients.jsonl")


@needs_ray
def test_a_cluster_of_ray_has_its_own_processors(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match="set engine.cpus=0, or unset RAY_ADDRESS"):
        execute(plan("engine=ray", "engine.cpus=2"))


@pytest.mark.slow
@needs_ray
@quiet_ray
def test_a_client_that_fails_under_ray_ends_the_run_with_its_sentence(plan: Compose) -> None:
    with pytest.raises(ProtocolError, match="norm=group") as caught:
        execute(plan("method=byol", "data.train=3", "partition=iid", "engine=ray", "engine.cpus=2"))
    assert "federation.tolerate=0" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Serialising(InProcessGrid):
    """A grid that sends every message through Flower's own bytes, as a real device would see it."""

    def pull_messages(self, message_ids: Any) -> Any:
        for reply in super().pull_messages(message_ids):
            reply.content = _through_bytes(reply.content)
            yield reply

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        for message in messages:
            message.content = _through_bytes(message.content)
        return super().push_messages(messages)


def _through_bytes(content: RecordDict) -> RecordDict:
    out = RecordDict(dict(content.config_records) | dict(content.metric_records))
    for name, record in content.array_records.items():
        plain = ArrayRecord()
        for key, value in record.items():
            plain[key] = Array(value.dtype, value.shape, value.stype, bytes(value.data))
        out[name] = plain
    return out


@pytest.mark.parametrize("compression", config.options_of("compression"))
def test_bytes_on_the_wire_change_nothing(compression: str, plan: Compose) -> None:
    options = ("method=byol", "strategy.share.teacher=local", "encoder.norm=batch", f"compression={compression}")
    chosen, ours = plan(*options, name="wire"), execute(plan(*options, name="ours"))
    rundir = chosen.open()
    with _Serialising(app, 3, 2) as grid:
        federate(grid, chosen.job, rundir, Reporter(quiet=True))
    assert_same(final_arrays(ours), final_arrays(rundir))
    assert ours.rows("clients.jsonl") == rundir.rows("clients.jsonl")


def _flowers(name: str) -> bool:
    return "_target_: flwr" in (config.conf_dir() / "strategy" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("strategy", ["fedavg", *filter(_flowers, config.options_of("strategy"))])
def test_a_reply_may_have_its_arrays_in_any_order(
    strategy: str, plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of Flower's strategies pair arrays by their places, and a client is free to send them as it likes."""
    options = ("method=byol", f"strategy={strategy}", "federation.clients=5", "engine.workers=1")
    ours = execute(plan(*options, name="ours"))
    genuine = codec.reply

    def backwards(arrays: Arrays, metrics: Mapping[str, float | int]) -> RecordDict:
        return genuine(dict(reversed(arrays.items())) if metrics["partition-id"] == 0 else arrays, metrics)

    monkeypatch.setattr(codec, "reply", backwards)
    assert_same(final_arrays(execute(plan(*options, name="backwards"))), final_arrays(ours))


@pytest.mark.parametrize("aggregation", ["mean", "secure"])
def test_a_mean_has_its_arrays_in_the_order_of_the_model(aggregation: str, plan: Compose) -> None:
    """In its first round FedAvgM is FedAvg."""
    options = (f"aggregation={aggregation}", "method=dino", "federation.rounds=1")
    found = final_arrays(execute(plan(*options, "strategy=fedavgm", name="momentum")))
    expected = final_arrays(execute(plan(*options, name="plain")))
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_half_precision_gives_the_same_bits_with_any_number_of_workers(plan: Compose) -> None:
    """Torch keeps weights in half precision in one table for all threads, and whoever ends a step empties it."""
    options = ("local.precision=bf16", "federation.clients=6", "partition=iid", "method=vicreg")
    alone = final_arrays(execute(plan(*options, "engine.workers=1", name="alone")))
    for turn in range(3):
        assert_same(final_arrays(execute(plan(*options, "engine.workers=2", name=f"two{turn}"))), alone)


def test_failures_are_counted_and_tolerated_only_when_asked(plan: Compose) -> None:
    """Client 1 always fails: the run ends with a sentence that names it, or goes on without it."""

    def flaky(message: Message, context: Any) -> Message:
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            raise RuntimeError("client 1 lost its disk")
        return app(message, context)

    class Flaky(ClientApp):
        def __call__(self, message: Message, context: Any) -> Message:
            return flaky(message, context)

    for tolerate, clients in ((0, None), (1, 2)):
        chosen = plan(f"federation.tolerate={tolerate}", name=f"tolerate{tolerate}")
        rundir = chosen.open()
        with InProcessGrid(Flaky(), 3, 2, fail_fast=False) as grid:
            if clients is None:
                with pytest.raises(FedsslError, match="client 1 lost its disk"):
                    federate(grid, chosen.job, rundir, Reporter(quiet=True))
            else:
                federate(grid, chosen.job, rundir, Reporter(quiet=True))
                assert [row["clients"] for row in rundir.rows()] == [2, 2]
                assert [row["failures"] for row in rundir.rows()] == [1, 1]


def test_bytes_in_the_metrics_are_the_arrays_bytes(plan: Compose) -> None:
    rundir = execute(plan("method=byol"))
    size = sum(value.nbytes for value in final_arrays(rundir).values())
    for row in rundir.rows():
        assert row["bytes_up"] == row["bytes_down"] == 3 * size
    assert not any(key.startswith("teacher") for key in final_arrays(rundir)), "a derived part costs no bytes"


def test_local_parts_stay_at_home_and_differ(plan: Compose) -> None:
    from fedssl.flower import state_files

    rundir = execute(plan("method=byol", "strategy.share.predictor=local"))
    assert not any(key.startswith("predictor") for key in final_arrays(rundir))
    states = []
    for client in range(3):
        path = state_files.newest(rundir.clients, client, 99)
        assert path is not None
        states.append(state_files.read(path).local)
    assert all(key.startswith("predictor.") for key in states[0])
    assert any((states[0][key] != states[1][key]).any() for key in states[0])


@pytest.mark.parametrize(
    ("engine", "most"), [("engine.workers=1", 1), ("engine.workers=2", 4), ("engine=processes engine.workers=1", 3)]
)
def test_a_client_that_is_alone_on_its_threads_begins_after_the_merge_of_the_one_before(
    engine: str, most: int, plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers, or another process, clients train while replies are merged."""
    under_way: list[set[int]] = []

    class Lending(States):
        def lend(self, node: int) -> Context:
            under_way.append({*(under_way[-1] if under_way else ()), node})
            return super().lend(node)

        def back(self, node: int) -> None:
            under_way.append(under_way[-1] - {node})
            super().back(node)

    monkeypatch.setattr(in_process, "States", Lending)
    execute(plan("federation.clients=6", "federation.rounds=1", "partition=iid", *engine.split()))
    assert max(map(len, under_way)) == most


def test_the_grid_leaves_no_threads(plan: Compose) -> None:
    before = threading.active_count()
    execute(plan())
    assert threading.active_count() == before


def test_a_run_in_the_callers_own_thread_leaves_no_model_there(plan: Compose) -> None:
    """A notebook's thread lives on; a worker's ends and takes its model with it."""
    execute(plan("engine.workers=1"))
    assert not worker._worker.__dict__


def test_replies_do_not_share_memory_with_the_next_client(plan: Compose) -> None:
    """One model serves all clients of a worker: a reply must be a copy, or the second client would change the first."""
    job = plan().job
    now = to_arrays(build_model(job, (3, 8, 8)))
    with InProcessGrid(app, 3, 1) as grid:
        config = ConfigRecord({"job": job.text})
        replies = list(grid.send_and_receive(FedAvg().configure_train(1, codec.encode(now), config, grid)))
    arrays = [codec.decode(reply.content.array_records[codec.ARRAYS]) for reply in replies]
    assert any((arrays[0][key] != arrays[1][key]).any() for key in now)
    for key, value in now.items():
        assert not any(np.shares_memory(value, other[key]) for other in arrays)


@pytest.fixture(autouse=True, scope="module")
def _no_usage_statistics() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


@needs_ray
def test_a_crash_of_flowers_runtime_is_one_sentence(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.simulation

    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("Ending simulation.") from MemoryError("no room for an actor\nsecond line")

    monkeypatch.setattr(flwr.simulation, "run_simulation", crash)
    with pytest.raises(ProtocolError, match=r"no room for an actor.*engine=in_process") as caught:
        execute(plan("engine=ray"))
    assert "\n" not in str(caught.value)


def test_ray_missing_is_one_sentence(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan("engine=ray")
    rundir = chosen.open()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedsslError, match="pip install"):
        chosen.build_engine().run(chosen.job, rundir, Reporter(quiet=True))


def test_a_script_by_the_name_of_ray_is_one_sentence(
    plan: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ray.py").touch()
    spec = importlib.util.spec_from_file_location("ray", tmp_path / "ray.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=r"ray\.py goes by its name: rename"):
        execute(plan("engine=ray"))
