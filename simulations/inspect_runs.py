"""`fedssl report` and `fedssl probe`: look at what runs have left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.export import load_encoder
from fedssl.model import to_arrays
from fedssl.report import compare, finish_report
from fedssl.rundir import RunDirectory
from fedssl.setup import data_of, device_of


def report(arguments: Sequence[str]) -> int:
    """Write the report of one run into it, or a comparison of several to `--out` (default: comparison.html).

    Raises:
        ConfigError: no run is named.
        ResumeError: a directory is not a run.
    """
    paths, out = list(arguments), Path("comparison.html")
    if "--out" in paths:
        at = paths.index("--out")
        if at + 1 >= len(paths):
            raise ConfigError("--out needs a file name: fedssl report RUN RUN --out page.html")
        out = Path(paths[at + 1])
        del paths[at : at + 2]
    if not paths:
        raise ConfigError("report needs a run directory: fedssl report runs/NAME [runs/OTHER ...]")
    runs = [RunDirectory(Path(path)) for path in paths]
    for run in runs:
        run.config()  # refuses what is not a run, before anything is written
    print(finish_report(runs[0]) if len(runs) == 1 else compare(runs, out))
    return 0


def probe(arguments: Sequence[str]) -> int:
    """Measure a finished run's encoder again, on the run's own data, and print the table.

    Raises:
        ConfigError: not exactly one run is named, or its data has no labels.
        ResumeError: the run has no encoder.
    """
    if len(arguments) != 1:
        raise ConfigError("probe takes exactly one run directory: fedssl probe runs/NAME")
    rundir = RunDirectory(Path(arguments[0]))
    job = Plan.of(rundir.config()).job
    network = load_encoder(rundir.path).network
    torch.set_num_threads(job.threads)
    device = device_of(job)
    evaluator = Evaluator(job, data_of(job, device), device)
    if not evaluator.labelled:
        raise ConfigError(
            f"the data of {rundir.path} has no labels, so there is nothing to probe with: use labelled data"
        )
    measured = evaluator.probe({f"encoder.{key}": value for key, value in to_arrays(network).items()})
    for key, value in measured.items():
        print(f"{key:24} {value:.4f}")
    return 0
