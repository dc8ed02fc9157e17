"""What compression costs on the digits: probes and bytes of each way to code an update, over seeds.

`python -m benchmarks.compression` measures all, keeps the numbers in benchmarks/results/compression.json and writes the
table into docs/communication.md. `--table` writes the table again from the numbers that are there. Runs that have
finished are read, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.pages import put
from fedssl import config
from fedssl.evaluation import Evaluator
from fedssl.export import load_encoder
from fedssl.files import write_json
from fedssl.job.setup import data_of, device_of
from fedssl.model import to_arrays
from fedssl.progress import Reporter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression.json"
PAGE = ROOT / "docs" / "communication.md"
COMMAND = "python -m benchmarks.compression"  # marks its place in the page
FORGETFUL = "compression.error_feedback=false"
WAYS: Mapping[str, tuple[str, ...]] = {
    "none": ("compression=none",),
    "float16": ("compression=float16",),
    "float16 both ways": ("compression=float16", "compression.down=float16"),
    "int8": ("compression=int8",),
    "topk (10 %)": ("compression=topk",),
    "topk (10 %), forgetful": ("compression=topk", FORGETFUL),
    "topk_int8 (1 %)": ("compression=topk_int8",),
    "topk_int8 (1 %), forgetful": ("compression=topk_int8", FORGETFUL),
}
PROBES = ("linear_accuracy", "one_label_accuracy")
RANDOM = "random encoder"


def measured(way: str, seed: int, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """The bytes and the probes of one run."""
    own = [*WAYS.get(way, ()), f"seed={seed}", "evaluate.every=0", "evaluate.final=false", *options]
    plan = config.compose([*own, f"out={folder}", f"name={[*WAYS].index(way) if way in WAYS else 'random'}-{seed}"])
    rundir, job = plan.open(), plan.job
    if not (rundir.path / "probes-only.json").exists():
        data = data_of(job, device_of(job))
        evaluator = Evaluator(job, data, device_of(job))
        if way == RANDOM:
            arrays, size = evaluator.random_encoder(), {}
        else:
            if not rundir.done:
                plan.build_engine().run(job, rundir, Reporter(quiet=True))
            network = load_encoder(rundir.path).network
            arrays = {f"encoder.{key}": value for key, value in to_arrays(network).items()}
            summary, updates = rundir.read("summary.json"), job.federation.rounds * job.federation.clients
            names = {"loss": summary["loss"], "update_bytes": summary["bytes_up"] / updates}
            size = {**names, "instruction_bytes": summary["bytes_down"] / updates}
        found = evaluator.probe(arrays)
        kept = {key: found[key] for key in (*PROBES, "knn_accuracy")}
        rundir.write("probes-only.json", {"way": way, "seed": seed, **kept, **size})
    row = rundir.read("probes-only.json")
    print(f"{way:28} seed {seed}  {row['linear_accuracy']:.3f}", file=sys.stderr, flush=True)
    return row


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = result["rows"]
    plain = statistics.mean(row["update_bytes"] for row in rows if row["way"] == "none")
    lines = [
        "| compression | bytes an update | of `none` | linear probe | one label a class |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        size = statistics.mean(row["update_bytes"] for row in own)
        cells = [f"{size:,.0f}", f"1/{plain / size:.0f}" if plain / size >= 1.5 else "1", *_spreads(own)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines.append(f"| {RANDOM} | | | {' | '.join(_spreads([row for row in rows if row['way'] == RANDOM]))} |")
    about, both = result["machine"], next(row for row in rows if row["way"] == "float16 both ways")
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracy in %, mean ± standard deviation over seeds {seeds} (each with its own split and weights):",
            f"SimCLR on the digits, ten clients, Dirichlet split, {result['rounds']} rounds, default options.",
            f"`float16 both ways` also sends {both['instruction_bytes']:,.0f} instead of {plain:,.0f} bytes down.",
            f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, torch {about['versions']['torch']}:",
            f"`{result['command']}`.",
            "",
        ]
    )


def _spreads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for key in PROBES:
        values = [100 * row[key] for row in rows]
        out.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
    return out


def write_table(result: Mapping[str, Any], page: Path) -> None:
    """Put the table between its marks in a page."""
    put(page, COMMAND, table(result))


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description="Measure every compression.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=None, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="write the table from the numbers that are there")
    chosen, options = parser.parse_known_args(arguments)
    if not chosen.table:
        start, about = time.monotonic(), machine()
        given = [f"federation.rounds={chosen.rounds}", *options]
        with tempfile.TemporaryDirectory() as folder:
            runs = chosen.runs or Path(folder)
            rows = [measured(way, seed, given, runs) for way in [*WAYS, RANDOM] for seed in chosen.seeds]
        words = [
            "python -m benchmarks.compression --seeds",
            *map(str, chosen.seeds),
            f"--rounds {chosen.rounds}",
            *options,
        ]
        result = {
            "command": " ".join(words),
            "machine": about,
            "seconds": round(time.monotonic() - start),
            "rounds": chosen.rounds,
            "rows": rows,
        }
        write_json(chosen.out, result)
    write_table(json.loads(chosen.out.read_text()), chosen.page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
