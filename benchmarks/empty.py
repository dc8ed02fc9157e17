"""What an engine costs when clients do nothing."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.workload import BARE, LIMIT_S, Work
from fedssl import tree
from fedssl.flower import codec
from fedssl.flower.exchange import exchange
from fedssl.flower.in_process import InProcessGrid
from fedssl.job.setup import build_model
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from strategies.fedavg import FedAvg

EMPTY = {  # name: what hands the messages to how many workers
    "merge alone": ("", 0),
    "in_process, 1 worker, nothing merged": ("in_process", 1),
    "in_process, 1 worker": ("in_process", 1),
    "in_process, 2 workers": ("in_process", 2),
    "processes, 2 workers": ("processes", 2),
    "ray, 2 cpus": ("ray", 2),
}
idle = ClientApp()


@idle.train()
def _echo(message: Message, context: Context) -> Message:
    arrays = codec.decode(codec.arrays_of(message.content))
    metrics: dict[str, int | float] = {codec.WEIGHT: 96, "partition-id": 0}
    return Message(codec.reply(arrays, metrics), reply_to=message)


def measure_empty(system: str, work: Work) -> dict[str, Any]:
    """Seconds of each round of clients that send back what they got; a first round is left out."""
    engine, workers = EMPTY[system]
    merged = not system.endswith("nothing merged")
    with tempfile.TemporaryDirectory() as folder:
        job = work.plan(BARE, Path(folder)).job
    torch.set_num_threads(1)
    arrays, seconds = to_arrays(build_model(job, (3, 8, 8))), [0.0]
    if not engine:
        for _ in range(work.rounds + 1):
            start, mean = time.perf_counter(), tree.ExactMean()
            for _client in range(work.clients):
                mean.add(arrays, work.examples)
            mean.result(arrays)
            seconds.append(time.perf_counter() - start)
    elif engine == "ray":
        _on_ray(lambda grid: seconds.extend(_empty_rounds(grid, arrays, work)), work.clients)
    else:
        forks = engine == "processes"
        alone = workers == 1 and not forks  # then no thread beside this one, as in `engines.InProcess`
        with InProcessGrid(idle, work.clients, 0 if alone else workers, processes=forks) as grid:
            seconds.extend(_empty_rounds(grid, arrays, work, merged))
    return {"system": system, "us_per_client": [1e6 * s / work.clients for s in seconds[2:]]}


def _empty_rounds(grid: Grid, arrays: Arrays, work: Work, merged: bool = True) -> Iterator[float]:
    strategy = FedAvg()
    while len(list(grid.get_node_ids())) < work.clients:
        time.sleep(0.05)
    for at in range(work.rounds + 1):
        start = time.perf_counter()
        messages = strategy.configure_train(at, codec.encode(arrays), ConfigRecord({}), grid)
        replies = exchange(grid, messages, LIMIT_S)
        if merged:
            strategy.aggregate_train(at, replies)
        else:
            deque(replies, maxlen=0)
        yield time.perf_counter() - start


def _on_ray(use: Callable[[Grid], None], clients: int) -> None:
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        use(grid)

    init = {"include_dashboard": False, "log_to_driver": False, "num_cpus": 2}
    backend: Any = {"init_args": init, "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}}
    run_simulation(server, idle, num_supernodes=clients, backend_config=backend)
