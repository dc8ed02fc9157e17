"""How to use the cores for small models: many clients at a time, or many torch threads a client. Measured."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

_SECONDS = 0.4  # of each trial
_BATCH, _WIDTH = 8, 8


def trials(cores: int) -> list[tuple[int, int]]:
    """(workers, threads) that use all cores, and one thread alone."""
    middle = [(cores // 2, 2)] if cores >= 4 else []
    return [(1, 1), (cores, 1), *middle, (1, cores)]


def steps_a_second(workers: int, threads: int, seconds: float = _SECONDS) -> float:
    """Training steps of a small four-convolution encoder, of all workers together."""
    import torch

    from fedssl.modalities.encoders import Conv4

    x = torch.rand(_BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()

    def work(_: int) -> int:
        torch.set_num_threads(threads)  # each thread has its own
        (encoder, _), steps = Conv4(_WIDTH).make((3, 32, 32)), 0
        encoder(x).square().mean().backward()  # the first one pays for what is made once
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            encoder(x).square().mean().backward()
            steps += 1
        return steps

    try:
        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(work, range(workers))) / seconds
    finally:
        torch.set_num_threads(before)


def advice(cores: int, busy: float) -> str:
    """What is fastest here and now, with the numbers; `busy` is the load of the machine before."""
    speeds = {trial: steps_a_second(*trial) for trial in trials(cores)}
    workers, threads = max(speeds, key=lambda trial: speeds[trial])
    told = ", ".join(f"{w} x {t} {speed:.0f}" for (w, t), speed in speeds.items())
    doubt = f"; the machine was busy (load {busy:.1f}): measure again when it is not" if busy > cores / 2 else ""
    return (
        f"engine.workers={workers} threads={threads} is fastest now (workers x threads, steps a second: {told}){doubt}"
    )
