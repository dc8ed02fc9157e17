"""What a private step costs: `python -m benchmarks.record_step`.

BYOL on the digits' four-convolution encoder with group normalisation, one thread, batches of 64 records. Systems take
turns, and ratios compare the medians of steps: the plain step, `privacy=example` by vmap, by hooks and by a loop, and
opacus' own `PrivacyEngine` (hooks, two forward passes, its optimizer) on the same model and loss. What is timed is
loss, gradients, clipping, noise and the optimiser's step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from opacus import PrivacyEngine

from benchmarks.machine import machine
from fedssl import config, seeds
from fedssl.files import write_json
from fedssl.gradient import PlainGradient
from fedssl.method import Batch, Step
from fedssl.model import Model
from fedssl.privacy.example_dp import ExampleDP
from fedssl.setup import build_model, data_of

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "record_step.json"
RECORDS, STEP = 64, Step(1, 2, 0, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    systems = {"plain": plain(), **{f"example, {name}": private(name) for name in ("vmap", "hooks", "loop")}}
    systems["opacus PrivacyEngine"] = engine()
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(chosen.turns + 2):
        for name, step in systems.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {"system": name, "milliseconds": 1000 * value, "over_plain": value / medians["plain"]}
        for name, value in medians.items()
    ]
    for row in rows:
        print(f"{row['system']:22} {row['milliseconds']:8.1f} ms  {row['over_plain']:5.2f} times the plain step")
    about = {"command": "python -m benchmarks.record_step", "machine": machine(), "records": RECORDS}
    write_json(chosen.out, {**about, "turns": chosen.turns, "rows": rows})
    return 0


def made() -> tuple[config.Plan, Model, Batch]:
    """A model of its own, and the batch that all share."""
    plan = config.compose(["method=byol", "method.norm=group", "data=digits"])
    data = data_of(plan.job, torch.device("cpu"))
    index = torch.arange(RECORDS)
    generator = seeds.torch_stream(0, "views")
    views = plan.job.data.augment.views(data.train.shard(index.numpy(), 0).batch(index), generator, 2)
    return plan, build_model(plan.job, data.train.shape).train(), Batch(list(views), index)


def plain() -> Callable[[], None]:
    """The step without privacy."""
    plan, model, batch = made()
    optimizer, rng = _sgd(model), seeds.stream(0, "noise")

    def step() -> None:
        optimizer.zero_grad()
        PlainGradient().backward(plan.job.method, model, batch, STEP, rng)
        optimizer.step()

    return step


def private(name: str) -> Callable[[], None]:
    """The step of `privacy=example`."""
    plan, model, batch = made()
    optimizer, rng = _sgd(model), seeds.stream(0, "noise")
    transform = ExampleDP(epsilon=None, noise_multiplier=1.0, engine=name).planned(1000, RECORDS, 1, 1)

    def step() -> None:
        optimizer.zero_grad()
        transform.backward(plan.job.method, model, batch, STEP, rng)
        optimizer.step()

    return step


def engine() -> Callable[[], None]:
    """Opacus' engine: the library's own per-sample gradients, clipping and noise."""
    plan, model, batch = made()
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
