"""What the options of `local` that change how a step is computed are worth: `python -m benchmarks.fast_steps`.

SimCLR's step (both views, loss, gradients, SGD) of models that take turns in one process, on the CPU or, with
`--device cuda`, on a GPU, where the end of each step is waited for. Ratios are medians over turns of a model's step to
that turn's plain one; what is done once, such as compiling, is in the first step alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.pages import put
from benchmarks.speed import table
from benchmarks.workload import BARE, ROOT, Work
from fedssl import seeds
from fedssl.client import precision
from fedssl.descent import Descent
from fedssl.files import write_json
from fedssl.job.setup import build_model
from fedssl.method import Batch, Step
from fedssl.networks.acceleration import accelerate
from fedssl.networks.norms import commit_statistics

COMMAND = "python -m benchmarks.fast_steps"
RESULTS = ROOT / "benchmarks" / "results" / "fast_steps.json"
PAGE = ROOT / "docs" / "engines.md"
PLAIN = "plain"
OPTIONS = {  # name: channels_last, compiled, bf16
    PLAIN: (False, False, False),
    "channels_last": (True, False, False),
    "bf16": (False, False, True),
    "channels_last, bf16": (True, False, True),
    "compiled": (False, True, False),
    "channels_last, bf16, compiled": (True, True, True),
}
WORKS = {
    "conv4, width 8, 16x16, batch 8": Work(batch_size=8, size=16, width=8),
    "conv4, width 16, 32x32, batch 32": Work(),
    "resnet18, width 8, 32x32, batch 32": Work(encoder="resnet18", width=8),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    rows = [row for name, work in WORKS.items() for row in measured(name, work, device, chosen.turns)]
    words = COMMAND if device.type == "cpu" else f"{COMMAND} --device {chosen.device}"
    result = {"command": words, "machine": machine(chosen.device), "turns": chosen.turns, "rows": rows}
    write_json(chosen.out, result)
    put(chosen.page, COMMAND, told(result))
    print(told(result))
    return 0


def told(result: Mapping[str, Any]) -> str:
    """The result for people: times the plain step, by option and work."""
    rows, about = result["rows"], result["machine"]
    works = list(dict.fromkeys(row["work"] for row in rows))
    found = {(row["option"], row["work"]): row for row in rows}
    body = []
    for option in dict.fromkeys(row["option"] for row in rows):
        cells = [found[option, work] for work in works]
        if option == PLAIN:
            body.append([option, *(f"{cell['milliseconds']:.1f} ms" for cell in cells)])
            continue
        spread = ("{:.2f} ({:.2f} to {:.2f})".format(cell["over_plain"], *cell["quartiles"]) for cell in cells)
        body.append([option, *spread])
    worst = max(row["first_s"] for row in rows)
    return (
        f"{table(['step', *works], body)}\nTimes the plain step, median and quartiles of {result['turns']} turns; the "
        f"first compiled step takes up to {worst:.0f} s.\n{about['date'][:10]}, {about.get('gpu', about['cpu'])}, one "
        f"torch thread, torch {about['versions']['torch']}, load before the start {about['load_before']}: "
        f"`{result['command']}`.\n"
    )


def measured(name: str, work: Work, device: torch.device, turns: int) -> list[dict[str, Any]]:
    """A row for each option."""
    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # or networks of other shapes count against torch's limit
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    times: dict[str, list[float]] = {option: [] for option in OPTIONS}
    steps = {option: _step(work, device, *switches) for option, switches in OPTIONS.items()}
    for _ in range(turns + 3):
        for option, step in steps.items():
            began = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[option].append(clock() - began)
    rows = []
    for option, (first, *_warm) in times.items():
        ratios = [own / plain for own, plain in zip(times[option][3:], times[PLAIN][3:], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "work": name,
                "option": option,
                "first_s": first,
                "milliseconds": 1000 * statistics.median(times[option][3:]),
                "over_plain": median,
                "quartiles": [low, high],
            }
        )
    return rows


def _step(work: Work, device: torch.device, channels_last: bool, compiled: bool, half: bool) -> Callable[[], None]:
    """One step on a model of its own and the batch that all share."""
    with tempfile.TemporaryDirectory() as folder:
        job = work.plan(BARE, Path(folder)).job
    shape = (3, work.size, work.size)
    model, index = build_model(job, shape).to(device).train(), torch.arange(work.batch_size, device=device)
    accelerate(model, channels_last=channels_last, compiled=compiled)
    local = replace(job.local, precision="bf16" if half else "float32")
    descent, generator = Descent(model, job.local), seeds.torch_stream(0, "views")
    views = [torch.rand(work.batch_size, *shape, generator=generator).to(device) for _ in range(2)]

    def step() -> None:
        descent.zero_grad()
        with precision(device, local):
            loss = job.method.loss(model, Batch(views, index), Step(1, 1, 0, 1)).loss
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step(job.local.lr)
        commit_statistics(model)

    return step


if __name__ == "__main__":
    raise SystemExit(main())
