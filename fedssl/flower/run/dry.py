"""A client's turn before there is a run: what it takes of this machine's memory and time, and what it sends.

The turn is a real one, in a process of its own (`python -m fedssl.flower.run.dry`), of a few steps; the client's own
code runs, from the instruction to the bytes of its reply.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedssl import seeds
from fedssl.errors import ConfigError, FedsslError
from fedssl.files import finite
from fedssl.flower import codec
from fedssl.flower.client_app import app
from fedssl.flower.codec import ClientState
from fedssl.flower.deploy import site
from fedssl.flower.in_process import InProcessGrid
from fedssl.job import Job
from fedssl.job.setup import device_of, initial_model, shares_of
from fedssl.job.shards import parts_of
from fedssl.model import layout_of, to_arrays
from fedssl.partition import sizes_of

_MORE = 8  # steps that are timed, at most
_PLAIN = {"_target_": "fedssl.aggregation.plain.Plain"}


@dataclass(frozen=True)
class Turn:
    """What a client's round takes; memory is that of the device that trains.

    Attributes:
        client, examples, steps: whose round, and how long it is.
        memory, before: bytes at the peak, and before the first step: of the process, or of the GPU for torch.
        step_seconds, other_seconds: of one step, and of all that surrounds them.
        arrays_down, arrays_up: bytes of the arrays, as runs log them.
        wire_down, wire_up: bytes of the whole messages, without Flower's own protocol.
        gpu: whether the memory is a GPU's.
    """

    client: int
    examples: int
    steps: int
    memory: int
    before: int
    step_seconds: float
    other_seconds: float
    arrays_down: int
    arrays_up: int
    wire_down: int
    wire_up: int
    gpu: bool

    @property
    def seconds(self) -> float:
        """Of a round."""
        return self.other_seconds + self.steps * self.step_seconds

    def steps_in(self, seconds: float) -> int:
        """How many of its steps fit into a time."""
        return max(0, min(self.steps, int((seconds - self.other_seconds) / max(self.step_seconds, 1e-9))))


class KilledError(FedsslError):
    """The process that took the turn was killed, most likely for want of memory."""


def measure(tree: Mapping[str, Any], data_dir: str = "") -> Turn:
    """The turn of the client with most examples, taken in a new process.

    Args:
        tree: of a job. Sums that hide updates are left out: the client sends its update by itself.
        data_dir: of a node with data of its own (partition=sites), whose turn it is then.

    Raises:
        ConfigError: the job is refused, in the client's words.
        KilledError: there was not enough memory on this machine.
    """
    command = [sys.executable, "-m", "fedssl.flower.run.dry"]
    done = subprocess.run(command, input=json.dumps([tree, data_dir]), capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise KilledError(f"the client was killed by signal {-done.returncode}: this machine has not the memory")
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        kind = KilledError if "out of memory" in done.stderr.lower() or "alloc" in last.lower() else ConfigError
        raise kind(f"the client failed: {last}") from error
    if "error" in found:
        raise ConfigError(found["error"])
    return Turn(**found)


def take(job: Job, data_dir: str = "") -> Turn:
    """Take the turn in this process, whose peak memory it reports."""
    device = device_of(job)
    torch.set_num_threads(job.threads)
    client = 0 if data_dir else int(np.argmax(sizes_of(parts_of(job, device))))
    node: dict[str, Any] = {"partition-id": client, **({"data-dir": data_dir} if data_dir else {})}
    data, shard = site.holds(job, client, node, device)
    examples, local = len(shard), job.local
    gradient = job.privacy.planned(examples, local.batch_size, local.epochs, job.rounds_of(client))
    order = seeds.stream(job.seed, "dry")
    steps = sum(1 for _ in gradient.batches(examples, local.batch_size, local.epochs, order))
    model = initial_model(job, data.train.shape)
    shares, parameters = shares_of(job, model), layout_of(model, job.method.parts).parameters
    arrays = job.compression.pack_down(
        {key: value for key, value in to_arrays(model).items() if shares[key].comes}, parameters
    )
    with InProcessGrid(app, job.federation.clients, workers=1) as grid:
        grid.context(client + 1).node_config.update(node)

        def turn(count: int) -> tuple[float, Message, Message]:
            """Seconds of a turn of so many steps, what it got and what it sent."""
            began = time.perf_counter()
            config = ConfigRecord({"job": job.text, "server-round": 1, "made": 0, "work": count / steps})
            message = Message(codec.instruction(codec.encode(arrays), config), client + 1, "train")
            (reply,) = grid.send_and_receive([message])
            wire_bytes(reply)
            ClientState.forget(grid.context(client + 1))  # each turn is the client's first
            return time.perf_counter() - began, message, reply

        before = memory(device, peak=False)
        turn(1)  # pays for what is made once
        one, got, sent = turn(1)
        more, many = min(steps - 1, _MORE), one
        if more:
            # Its update is like that of a whole round: a first step may move nothing.
            many, got, sent = turn(1 + more)
    step = max(0.0, many - one) / more if more else one
    up = codec.decode(codec.arrays_of(sent.content))
    return Turn(
        client, examples, steps, memory(device), before, step, max(0.0, one - step),
        sum(value.nbytes for value in arrays.values()), sum(value.nbytes for value in up.values()),
        wire_bytes(got), wire_bytes(sent), device.type == "cuda",
    )  # fmt: skip


def wire_bytes(message: Message) -> int:
    """Bytes of all objects of which Flower makes a message; equal ones travel once."""
    return sum(len(one.deflate()) for one in get_all_nested_objects(message).values())


def memory(device: torch.device, peak: bool = True) -> int:
    """Bytes of this process, or those that torch holds of a GPU; at the peak so far, or now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if peak else torch.cuda.memory_reserved(device)
    word = "VmHWM:" if peak else "VmRSS:"  # of this very program: what getrusage says may be its parent's
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(word))


def main() -> int:
    """Read a job's tree and a place, write the turn or what refuses it, each as one line of JSON."""
    tree, data_dir = json.load(sys.stdin)
    try:
        found: dict[str, Any] = asdict(take(Job({**tree, "aggregation": _PLAIN}), data_dir))
    except FedsslError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(finite(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
