"""What a run will cost: seconds, bytes and memory from a few constants, which are fitted to measured rows.

One worker that trains one by one on the CPU: a round takes

    clients * (steps * (step + gflop * FLOP/1e9 + batch + pixel * pixels) + client + parameter * parameters)

CPU seconds, where FLOP are those of one step, pixels those of one batch, and clients those of one round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.pages import put
from benchmarks.speed import COMMAND, RESULTS, Rows, about_text, later, table
from fedssl.datasets.synthetic import BLOCK

PAGE = "scaling.md"
HELD_OUT = ("small, batch 4, 16x16", "reference", "resnet18")  # measured, and not fitted to
ALONE = "in_process, 1 worker"
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Constants:
    """Of one machine, fitted; see the module."""

    step: float  # seconds a step, whatever its size
    gflop: float  # seconds for 1e9 floating-point operations of a step
    batch: float  # seconds for the views of a batch, whatever its size
    pixel: float  # seconds for a pixel of an image that both views are made of
    client: float  # seconds a client and round
    parameter: float  # seconds a client, round and parameter
    memory: float  # MiB of a process that has imported everything
    models: float  # copies of the model that are held
    reading: float  # copies in float32 of the images, while a set is drawn (at most 2,048 at a time)


@dataclass(frozen=True)
class Size:
    """Of a run; every client takes part in every round unless `sampled` says how many do."""

    clients: int
    parameters: int
    rounds: int
    flop: float  # of one step on one example: forward and backward pass of both views
    examples: int = 96  # a client
    batch_size: int = 32
    size: int = 32  # pixels a side
    channels: int = 3
    sampled: int = 0

    @property
    def a_round(self) -> int:
        """Clients that take part."""
        return self.sampled or self.clients


def predict(constants: Constants, size: Size) -> dict[str, float]:
    """CPU seconds of all rounds, bytes on the wire both ways without compression, and peak MiB."""
    batches = math.ceil(size.examples / size.batch_size)
    work = constants.gflop * size.flop / 1e9 + constants.pixel * size.size**2
    client = constants.client + constants.parameter * size.parameters
    each = batches * (constants.step + constants.batch) + size.examples * work + client
    drawn = FLOAT * size.channels * size.size**2 * min(size.clients * size.examples, BLOCK)
    data = size.clients * size.examples * size.channels * size.size**2
    held = constants.models * FLOAT * size.parameters + constants.reading * drawn + data
    return {
        "seconds": size.rounds * size.a_round * each,
        "bytes": 2.0 * FLOAT * size.parameters * size.a_round * size.rounds,
        "mib": constants.memory + held / 2**20,
    }


def fit(rows: Rows) -> Constants:
    """From the rows of steps, of growth, and of the compared workloads that are not held out."""
    steps = [row for row in rows if row["group"].startswith("step")]
    step, gflop = _fit([(1, r["flop"] / 1e9) for r in steps], [r["step_s"] for r in steps])
    batch, pixel = _fit([(1, _pixels(r["work"])) for r in steps], [r["views_s"] for r in steps])
    runs = [r for r in rows if r["name"] == ALONE and r["group"] not in HELD_OUT and not r["work"]["sampled"]]
    partial = Constants(step, gflop, batch, pixel, *(0.0,) * 5)
    over = [_seconds(r) / r["work"]["clients"] - predict(partial, size_of(r, 1, 1))["seconds"] for r in runs]
    scale = [_seconds(r) / r["work"]["clients"] for r in runs]
    client, parameter = _fit([(1, r["parameters"]) for r in runs], over, scale)
    held = [(1, FLOAT * r["parameters"] / 2**20, _drawn(r["work"]) / 2**20) for r in runs]
    memory, models, reading = _fit(held, [r["peak_mib"] - _data(r["work"]) for r in runs])
    return Constants(step, gflop, batch, pixel, client, parameter, memory, models, reading)


def size_of(row: Mapping[str, Any], rounds: int, clients: int = 0) -> Size:
    """The size of a measured run."""
    work = row["work"]
    names = ("examples", "batch_size", "size", "sampled")
    return Size(
        clients or work["clients"], row["parameters"], rounds, row["flop"] / work["batch_size"],
        **({name: work[name] for name in names} | ({"sampled": 0} if clients else {})),
    )  # fmt: skip


def errors(constants: Constants, rows: Rows) -> list[dict[str, Any]]:
    """Predicted and measured, of one round of the workloads that nothing was fitted to."""
    found = []
    for group in HELD_OUT:
        turns = [row for row in rows if row["group"] == group and row["name"] == ALONE]
        if not turns:
            continue
        said = predict(constants, size_of(turns[0], 1))
        measured = {
            "seconds": float(np.median([_seconds(row) for row in turns])),
            "bytes": float(turns[0]["bytes_up"] + turns[0]["bytes_down"]),
            "mib": float(np.median([row["peak_mib"] for row in turns])),
        }
        found.append({"group": group, "predicted": said, "measured": measured})
    return found


def _fit(columns: Iterable[Sequence[float]], values: Sequence[float], scale: Sequence[float] = ()) -> list[float]:
    """Coefficients of at least 0 with the least relative errors."""
    weights = 1 / np.array(scale or values)
    found, _ = nnls(np.array(list(columns)) * weights[:, None], np.array(values) * weights)
    return [float(value) for value in found]


def _seconds(row: Mapping[str, Any]) -> float:
    return later(row, "round_cpu_s")


def _pixels(work: Mapping[str, Any]) -> float:
    return float(work["batch_size"] * work["size"] ** 2)


def _drawn(work: Mapping[str, Any]) -> float:
    return float(3 * FLOAT * work["size"] ** 2 * min(work["clients"] * work["examples"], BLOCK))


def _data(work: Mapping[str, Any]) -> float:
    return float(3 * work["clients"] * work["examples"] * work["size"] ** 2) / 2**20


UNITS = {  # field: (factor, unit, what it is)
    "step": (1e3, "ms", "a step, whatever its size"),
    "gflop": (1e3, "ms", "10^9 floating-point operations of a step"),
    "batch": (1e3, "ms", "the two views of a batch, whatever its size"),
    "pixel": (1e9, "ns", "the two views of a pixel"),
    "client": (1e3, "ms", "a client and round: its turn, messages, records, merge"),
    "parameter": (1e9, "ns", "a parameter of a client and round"),
    "memory": (1.0, "MiB", "the process"),
    "models": (1.0, "", "copies of the model held"),
    "reading": (1.0, "", "copies of the images in float32 while a set is drawn (at most 2,048 at a time)"),
}


def constants_table(constants: Constants) -> str:
    """The fitted constants."""
    body = [[f"`{k}`", what, f"{getattr(constants, k) * by:.3g} {unit}"] for k, (by, unit, what) in UNITS.items()]
    return table(["constant", "of", "value"], body)


def errors_table(constants: Constants, rows: Rows) -> str:
    """Predicted, measured and error."""
    body = []
    for found in errors(constants, rows):
        cells = [str(found["group"])]
        for key, by, form in (("seconds", 1, ".2f"), ("bytes", 1e6, ".1f"), ("mib", 1, ".0f")):
            said, was = found["predicted"][key] / by, found["measured"][key] / by
            cells.append(f"{said:{form}} / {was:{form}} ({100 * (said / was - 1):+.0f} %)")
        body.append(cells)
    return table(["a round of", "CPU s, predicted / measured", "MB on the wire", "peak MiB"], body)


def growth(rows: Rows) -> str:
    """What was measured of more clients, larger models and larger pools."""
    body = []
    kinds = (" clients", "width ", "pool of ")
    for row in (row for row in rows if any(k in row["group"] for k in kinds) and "step" not in row["group"]):
        each = 1000 * _seconds(row) / (row["work"]["sampled"] or row["work"]["clients"])
        numbers = [f"{row['parameters']:,}", f"{later(row, 'round_s'):.2f}", f"{_seconds(row):.2f}", f"{each:.1f}"]
        body.append([row["group"], row["name"], *numbers, f"{row['startup_s']:.1f}", f"{row['peak_mib']:.0f}"])
    head = ["", "system", "parameters", "a round, s", "CPU s", "CPU ms a client", "start-up s", "peak MiB"]
    return table(head, body)


def write(result: Mapping[str, Any], docs: Path) -> None:
    """Put what was fitted and measured into the page."""
    rows = result["rows"]
    constants = fit(rows)
    about = f"\n{about_text(result)}.\n"
    put(docs / PAGE, COMMAND.format("constants"), constants_table(constants) + about)
    put(docs / PAGE, COMMAND.format("errors"), errors_table(constants, rows))
    put(docs / PAGE, COMMAND.format("growth"), growth(rows))


def measured() -> Constants:
    """The constants of the machine whose results are kept."""
    return fit(json.loads(RESULTS.read_text())["rows"])
