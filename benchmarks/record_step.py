"""What a private step costs: `python -m benchmarks.record_step`.

BYOL on the four-convolution encoder with group normalisation, one thread, batches of 64 records of two sizes: the
digits (8x8) and random images (3x32x32). Systems take turns: the plain step, `privacy=example` by ghost, vmap, hooks
and a loop, and opacus' own `PrivacyEngine` (hooks, two forward passes, its optimizer) on the same model and loss. What
is timed is loss, gradients, clipping, noise and the optimiser's step, in CPU seconds of the thread, which other
processes on the machine disturb least; the ratio is the median over turns of a system's step to that turn's plain one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine

from benchmarks.machine import machine
from fedssl import config, seeds
from fedssl.files import write_json
from fedssl.gradient import PlainGradient
from fedssl.job.setup import build_model, data_of
from fedssl.method import Batch, Step
from fedssl.model import Model
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.per_record import Engine

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "record_step.json"
RECORDS, STEP = 64, Step(1, 2, 0, 2)
DIGITS = (1, 8, 8)
SHAPES = (DIGITS, (3, 32, 32))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in measured(shape, chosen.turns)]
    for row in rows:
        print(
            f"{row['images']:8} {row['system']:22} {row['milliseconds']:8.1f} ms  {row['over_plain']:5.2f} times the "
            f"plain step ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})"
        )
    about = {"command": "python -m benchmarks.record_step", "machine": machine(), "records": RECORDS}
    write_json(chosen.out, {**about, "turns": chosen.turns, "rows": rows})
    return 0


def measured(shape: tuple[int, int, int], turns: int) -> list[dict[str, Any]]:
    """A row for each system."""
    systems = {"plain": plain(shape), **{f"example, {name}": private(shape, name) for name in Engine}}
    systems["opacus PrivacyEngine"] = engine(shape)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(turns + 2):
        for name, step in systems.items():
            began = time.thread_time()
            step()
            if turn >= 2:  # the first two warm up
                times[name].append(time.thread_time() - began)
    rows = []
    for name, values in times.items():
        ratios = [own / base for own, base in zip(values, times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "images": "x".join(map(str, shape)),
                "system": name,
                "milliseconds": 1000 * statistics.median(values),
                "over_plain": median,
                "quartiles": [low, high],
            }
        )
    return rows


def made(shape: tuple[int, int, int]) -> tuple[config.Plan, Model, Batch]:
    """A model of its own, and the batch that all share."""
    plan = config.compose(["method=byol", "method.norm=group", "data=digits"])
    index, generator = torch.arange(RECORDS), seeds.torch_stream(0, "views")
    if shape == DIGITS:
        train = data_of(plan.job, torch.device("cpu")).train
        views = plan.job.data.augment.views(train.shard(index.numpy(), 0).batch(index), generator, 2)
    else:
        views = [torch.rand(RECORDS, *shape, generator=generator) for _ in range(2)]
    return plan, build_model(plan.job, shape).train(), Batch(list(views), index)


def plain(shape: tuple[int, int, int]) -> Callable[[], None]:
    """The step without privacy."""
    plan, model, batch = made(shape)
    optimizer, rng = _sgd(model), seeds.stream(0, "noise")

    def step() -> None:
        optimizer.zero_grad()
        PlainGradient().backward(plan.job.method, model, batch, STEP, rng)
        optimizer.step()

    return step


def private(shape: tuple[int, int, int], name: str) -> Callable[[], None]:
    """The step of `privacy=example`."""
    plan, model, batch = made(shape)
    optimizer, rng = _sgd(model), seeds.stream(0, "noise")
    transform = ExampleDP(epsilon=None, noise_multiplier=1.0, engine=name).planned(1000, RECORDS, 1, 1)

    def step() -> None:
        optimizer.zero_grad()
        transform.backward(plan.job.method, model, batch, STEP, rng)
        optimizer.step()

    return step


def engine(shape: tuple[int, int, int]) -> Callable[[], None]:
    """Opacus' engine: the library's own per-sample gradients, clipping and noise."""
    plan, model, batch = made(shape)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1000, 1)), batch_size=RECORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, optimizer, _ = PrivacyEngine().make_private(
            module=model, optimizer=_sgd(model), data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
        )

    def step() -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan.job.method.loss(wrapped._module, batch, STEP).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


if __name__ == "__main__":
    sys.exit(main())
