"""How to use the cores for small models: clients side by side, as threads or processes, or torch threads a client."""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import NamedTuple

_SECONDS = 0.4  # of each trial
_BATCH, _WIDTH, _SIZE = 4, 8, 16


class Trial(NamedTuple):
    """A way to train clients: `workers` of an engine, with so many torch threads each."""

    engine: str
    workers: int
    threads: int

    def __str__(self) -> str:
        return f"engine={self.engine} engine.workers={self.workers} threads={self.threads}"


def trials(cores: int) -> list[Trial]:
    """One thread alone, and what uses all cores."""
    middle = [Trial("in_process", cores // 2, 2)] if cores >= 4 else []
    forks = [Trial("processes", cores, 1)] if sys.platform == "linux" else []
    return [Trial("in_process", 1, 1), Trial("in_process", cores, 1), *forks, *middle, Trial("in_process", 1, cores)]


def steps_a_second(trial: Trial, seconds: float = _SECONDS) -> float:
    """Training steps of a small four-convolution encoder, of all workers together."""
    import torch

    before = torch.get_num_threads()
    if trial.engine == "processes":
        return sum(_in_processes(trial.workers, seconds)) / seconds
    try:
        with ThreadPoolExecutor(trial.workers) as pool:
            return sum(pool.map(lambda _: _steps(trial.threads, seconds), range(trial.workers))) / seconds
    finally:
        torch.set_num_threads(before)


def _steps(threads: int, seconds: float) -> int:
    """How many steps this thread takes."""
    import torch

    from fedssl.modalities.encoders import Conv4

    torch.set_num_threads(threads)  # each thread has its own
    x = torch.rand(_BATCH, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    (encoder, _), steps = Conv4(_WIDTH).make((3, _SIZE, _SIZE)), 0
    encoder(x).square().mean().backward()  # the first one pays for what is made once
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        encoder(x).square().mean().backward()
        steps += 1
    return steps


def _in_processes(count: int, seconds: float) -> list[int]:
    """How many steps each of some forked processes takes."""

    def work(end: Connection) -> None:
        end.send_bytes(str(_steps(1, seconds)).encode())

    fork, pipes = multiprocessing.get_context("fork"), [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    children = [fork.Process(target=work, args=(end,), daemon=True) for _, end in pipes]
    for child, (_, end) in zip(children, pipes, strict=True):
        child.start()
        end.close()  # or a child that dies would be waited for
    taken = [int(start.recv_bytes()) for start, _ in pipes]
    for child, (start, _) in zip(children, pipes, strict=True):
        child.join()
        start.close()
    return taken


def advice(cores: int, busy: float) -> str:
    """What is fastest here and now, with the numbers; `busy` is the load of the machine before."""
    speeds = {trial: steps_a_second(trial) for trial in trials(cores)}
    best = max(speeds, key=lambda trial: speeds[trial])
    short = {"in_process": "threads", "processes": "processes"}
    told = ", ".join(f"{t.workers} {short[t.engine]} x {t.threads} {speed:.0f}" for t, speed in speeds.items())
    doubt = f"; the machine was busy (load {busy:.1f}): measure again when it is not" if busy > cores / 2 else ""
    return f"{best} is fastest now (workers x torch threads, steps a second: {told}){doubt}"
