"""What one step of local training costs without anything around it, and how much of it are the views."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import BARE, Work, flop
from fedssl import seeds
from fedssl.descent import Descent
from fedssl.job.setup import build_model
from fedssl.method import Batch, Step

SECONDS = 1.5  # spent on each thing that is timed
STEP = Step(1, 1, 0, 1)


def measure_step(_: str, work: Work) -> dict[str, Any]:
    """Median CPU seconds of drawing the views of one batch, and of a step on them; its floating-point operations."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = work.plan(BARE, Path(folder)).job
    data, generator = job.data.load().train, seeds.torch_stream(job.seed, "views")
    model, index = build_model(job, data.shape).train(), torch.arange(work.batch_size)
    descent = Descent(model, job.local)
    examples = data.batch(index)
    batch = Batch(list(job.data.augment.views(examples, generator, job.method.views)), index)

    def step() -> None:
        descent.zero_grad()
        job.method.loss(model, batch, STEP).loss.backward()  # type: ignore[no-untyped-call]
        descent.step(job.local.lr)

    views = _median(lambda: job.data.augment.views(examples, generator, job.method.views))
    taken = _median(step)
    return {
        "views_s": views,
        "step_s": taken,
        "flop": flop(work),
        "parameters": sum(value.numel() for value in model.state_dict().values()),
    }


def _median(call: Callable[[], Any]) -> float:
    times, until = [], time.perf_counter() + SECONDS
    while len(times) < 4 or time.perf_counter() < until:
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])
