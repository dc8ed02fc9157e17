"""Bytes and seconds a round of a large encoder on real nodes, plain and packed: `python -m benchmarks.bandwidth`.

A SuperLink and two SuperNodes under TLS and with keys on the loopback interface, each with 16 small images, so that the
round is its messages: a ResNet-18 of 11 million parameters goes to both nodes and comes back. Beside it the same
configuration in one process. The first round of each run is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.nodes import Federation, federation
from benchmarks.pages import put
from benchmarks.speed import table
from fedssl import config
from fedssl.files import write_json
from fedssl.flower.deploy.submit import submit
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

COMMAND = "python -m benchmarks.bandwidth"
RESULTS = Path(__file__).resolve().parent / "results" / "bandwidth.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "communication.md"
NODES, EXAMPLES = 2, 16
WAYS = {
    "none": (),
    "float16, both ways": ("compression=float16", "compression.down=float16"),
    "int8 up, float16 down": ("compression=int8", "compression.down=float16"),
}
OPTIONS = (
    *("data=npz", "data.path=", "data.augment.mean=[0.5]", "data.augment.std=[0.25]", "partition=sites"),
    *("partition.shape=[1,8,8]", "encoder=resnet18", "encoder.width=64", "local.batch_size=16", "evaluate.every=0"),
    *("evaluate.final=false", "device=cpu", f"federation.clients={NODES}"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 1 if a run fails or differs from its simulation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args(arguments)
    about = {"command": COMMAND, "machine": machine(), "rounds": chosen.rounds}
    with tempfile.TemporaryDirectory(prefix="fedssl-bandwidth-") as folder, federation(Path(folder), NODES) as real:
        places = _begin(real)
        rows = [measured(real, places, way, chosen.rounds) for way in WAYS]
    result = about | {"rows": rows}
    write_json(chosen.out, result)
    put(chosen.page, COMMAND, told(result))
    print(told(result))
    return 0 if all(row["equal"] for row in rows) else 1


def measured(real: Federation, places: Sequence[str], way: str, rounds: int) -> dict[str, Any]:
    """A row: one run on the nodes, and its simulation."""
    out = real.folder / "runs"
    options = [*OPTIONS, *WAYS[way], f"federation.rounds={rounds}"]
    name = way.replace(" ", "-").replace(",", "")
    status, details = submit([*options, f"name={name}"], str(out), "edge").wait(lambda line: None, 2.0, 1200.0)
    if status != "finished:completed":
        raise RuntimeError(f"{way}: {status}, {details}\n{real.logs()}")
    plan = config.compose([*options, f"engine.sites=[{','.join(places)}]", f"out={out}", f"name={name}-simulated"])
    deployed, simulated = RunDirectory(out / name), plan.open()
    plan.build_engine().run(plan.job, simulated, Reporter(quiet=True))
    ours, theirs = (run.latest() for run in (deployed, simulated))
    if ours is None or theirs is None:
        raise RuntimeError(f"{way}: a run has left no checkpoint")
    return {
        "compression": way,
        "parameters": sum(value.size for value in ours.arrays.values()),
        "mb_up": deployed.rows()[-1]["bytes_up"] / 1e6,
        "mb_down": deployed.rows()[-1]["bytes_down"] / 1e6,
        "deployed_s": [row["seconds"] for row in deployed.rows()],
        "simulated_s": [row["seconds"] for row in simulated.rows()],
        "equal": all(np.array_equal(value, theirs.arrays[key]) for key, value in ours.arrays.items()),
    }


def told(result: Mapping[str, Any]) -> str:
    """The result for people."""
    about, body = result["machine"], []
    for row in result["rows"]:
        deployed, simulated = (statistics.median(row[key][1:]) for key in ("deployed_s", "simulated_s"))
        sizes = [f"{row['mb_up']:.1f}", f"{row['mb_down']:.1f}"]
        body.append(
            [row["compression"], *sizes, f"{deployed:.1f}", f"{simulated:.2f}", "yes" if row["equal"] else "no"]
        )
    head = ["compression", "MB up a round", "MB down a round", "s a round", "s a round, simulated", "equal bits"]
    return (
        f"{table(head, body)}\nResNet-18, {result['rows'][0]['parameters'] / 1e6:.1f} million parameters, {NODES} "
        f"SuperNodes under TLS on the loopback interface, {EXAMPLES} images each; medians of {result['rounds'] - 1} "
        f"rounds.\n{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, load before the start "
        f"{about['load_before']}: `{COMMAND}`.\n"
    )


def _begin(real: Federation) -> list[str]:
    """Start everything; returns the nodes' data sets."""
    rng, places = np.random.default_rng(0), []
    real.superlink("process")
    real.superexec()
    real.register(NODES)
    os.environ.update(real.environment)
    for node in range(NODES):
        places.append(str(real.folder / f"site-{node}.npz"))
        train, test = (rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) for n in (EXAMPLES, 2))
        np.savez(places[-1], train_images=train, test_images=test)
        real.node(f"node-{node}", node, places[-1], real.folder / "keys" / f"node-{node}.key")
    return places


if __name__ == "__main__":
    sys.exit(main())
