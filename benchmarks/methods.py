"""Every method on the digits, with the default options: parts, coupling, memory, and what a probe reads.

`python -m benchmarks.methods` measures all, keeps the numbers in benchmarks/results/methods.json and writes the table
into docs/methods.md. `--table` writes the table again from the numbers that are there. Runs that have finished are
read, so an interrupted benchmark goes on where it was.
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

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.pages import put
from fedssl import config
from fedssl.files import write_json
from fedssl.job import Job
from fedssl.job.setup import build_model, shares_of
from fedssl.method import Batch, Step
from fedssl.parts import Share
from fedssl.progress import Reporter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
COMMAND = "python -m benchmarks.methods"  # marks its place in the page
BATCH = 64  # of the memory measurement
SETTINGS = {"iid": ("partition=iid", "baselines=true"), "skewed": ("partition=dirichlet", "partition.alpha=0.1")}


def job_of(name: str, *options: str) -> Job:
    """A method's default job on the digits."""
    return config.compose([f"method={name}", *options]).job


def methods() -> list[str]:
    """The methods that make sense on images and without a server; docs/strategies.md measures the others."""
    targets = {
        name: (config.conf_dir() / "method" / f"{name}.yaml").read_text() for name in config.options_of("method")
    }
    alone = [name for name, text in targets.items() if "_target_: fedssl.methods.federated." not in text]
    return [name for name in alone if "images" in job_of(name).method.modalities]


def described(name: str) -> dict[str, Any]:
    """What needs no training: parts, coupling, bytes for the wire, and memory an example."""
    job = job_of(name)
    data = job.data.load().train
    model = build_model(job, data.shape, len(data))
    shares = shares_of(job, model)
    merged = sum(v.numel() * v.element_size() for k, v in model.state_dict().items() if shares[k] is Share.merge)
    parts = [part.name if part.share is Share.merge else f"{part.name} ({part.share})" for part in job.method.parts]
    return {
        "parts": parts,
        "coupling": str(job.method.coupling),
        "kib_an_example": round(activations(job) / BATCH / 1024, 1),
        "mb_on_the_wire": round(merged / 1e6, 2),
    }


def activations(job: Job) -> int:
    """Bytes that one batch of 64 keeps for the backward pass, besides the parameters."""
    data = job.data.load().train
    shard = data.shard(np.arange(len(data)), 0)
    model = build_model(job, data.shape, len(shard)).train()
    step = Step(1, 1, 0, 1)
    job.method.after_merge(model, shard, None, job.data.augment, step)
    index = torch.arange(BATCH)
    views = job.data.augment.views(shard.batch(index), torch.Generator().manual_seed(0), job.method.views)
    own = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        place = value.untyped_storage()
        if place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = job.method.loss(model, Batch(views, index), step)  # held, so that no storage is used twice
    del out
    return sum(kept.values())


def measured(name: str, seeds: Sequence[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """The probes of each setting and seed."""
    rows = []
    for seed in seeds:
        for setting, options in SETTINGS.items():
            own = [f"method={name}", f"seed={seed}", f"federation.rounds={rounds}", "evaluate.every=0"]
            plan = config.compose([*own, *options, f"out={folder}", f"name={name}-{setting}-{seed}"])
            rundir = plan.open()
            if not rundir.done:
                plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
            summary = rundir.read("summary.json")
            keys = ("linear_accuracy", "one_label_accuracy")
            central = "baselines=true" in options
            kinds = {"": setting, "random_encoder_": "random"} | ({"central_": "central"} if central else {})
            rows += [
                {"setting": kind, "seed": seed, **{key: summary[prefix + key] for key in keys}}
                for prefix, kind in kinds.items()
            ]
            print(f"{name:14} {setting:7} seed {seed}  {summary['linear_accuracy']:.3f}", file=sys.stderr, flush=True)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    head = ["method", "parts", "coupling", "KiB an example", "IID", "Dir(0.1)", "central", "Dir(0.1), one label"]
    body = []
    for row in result["rows"]:
        cells = [f"`{row['method']}`", ", ".join(row["parts"]), row["coupling"], f"{row['kib_an_example']:g}"]
        linear = [_spread(row["runs"], setting, "linear_accuracy") for setting in ("iid", "skewed", "central")]
        body.append([*cells, *linear, _spread(row["runs"], "skewed", "one_label_accuracy")])
    everything = [run for row in result["rows"] for run in row["runs"]]
    random = list({run["seed"]: run for run in everything if run["setting"] == "random"}.values())
    plain, one = (_spread(random, "random", key) for key in ("linear_accuracy", "one_label_accuracy"))
    body.append(["random encoder", "", "", "", plain, plain, plain, one])
    about = result["machine"]
    lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]
    return "\n".join(
        [
            *lines,
            "",
            f"Linear-probe accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, result['seeds']))} "
            f"(each with its own split and weights); ten clients, {result['rounds']} rounds, default options, "
            f"`central` with equal steps on the union. KiB an example: activations kept for the backward pass at batch "
            f"{BATCH}. {about['date'][:10]}, {about['cpu']}, "
            f"{about['cores']} cores, torch {about['versions']['torch']}: `{result['command']}`.",
            "",
        ]
    )


def _spread(runs: Sequence[Mapping[str, Any]], setting: str, key: str) -> str:
    values = [100 * run[key] for run in runs if run["setting"] == setting]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def write_table(result: Mapping[str, Any], page: Path) -> None:
    """Put the table between its marks in a page."""
    put(page, COMMAND, table(result))


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="Measure every method.")
    parser.add_argument("--methods", nargs="+", default=methods(), choices=methods())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=None, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="write the table from the numbers that are there")
    chosen = parser.parse_args(arguments)
    if not chosen.table:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            about = machine()
            rows = [
                {
                    "method": name,
                    **described(name),
                    "runs": measured(name, chosen.seeds, chosen.rounds, chosen.runs or Path(folder)),
                }
                for name in chosen.methods
            ]
        seeds = " ".join(map(str, chosen.seeds))
        result = {
            "command": f"python -m benchmarks.methods --seeds {seeds} --rounds {chosen.rounds}",
            "machine": about,
            "seconds": round(time.monotonic() - start),
            "seeds": chosen.seeds,
            "rounds": chosen.rounds,
            "rows": sorted([*rows, *_others(chosen)], key=lambda row: str(row["method"])),
        }
        write_json(chosen.out, result)
    write_table(json.loads(chosen.out.read_text()), chosen.page)
    return 0


def _others(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The methods that were measured before with the same seeds and rounds, and not now."""
    if not chosen.out.exists():
        return []
    old = json.loads(chosen.out.read_text())
    if (old["seeds"], old["rounds"]) != (chosen.seeds, chosen.rounds):
        return []
    return [row for row in old["rows"] if row["method"] not in chosen.methods]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
