"""`fedssl report` and `fedssl probe`: look at what runs have left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.export import load_encoder
from fedssl.job.setup import data_of, device_of
from fedssl.measures.corruptions import KINDS, SEVERITIES
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from fedssl.report import finish_report
from fedssl.report.charts import Line, Panel, chart
from fedssl.report.comparison import compare
from fedssl.report.figures import FORMATS, publish, save
from fedssl.report.record import begun
from fedssl.report.run_figures import drawings
from fedssl.rundir import RunDirectory
from simulations.words import read

REPORT = "fedssl report RUN [RUN ...] [--out page.html] [--figures FOLDER] [--format pdf,svg,png]"


def report(arguments: Sequence[str]) -> int:
    """Write the report of one run into it, or a comparison of several to `--out` (default: comparison.html).

    `--figures FOLDER` also writes their figures for a paper, as `--format` says: pdf, svg, png, or several of them.

    Raises:
        ConfigError: no run is named, or an option has no value or a wrong one.
        ResumeError: a directory is not a run.
    """
    words = read(arguments, ("out", "figures", "format"), REPORT)
    paths, folder, chosen = words.rest, words.last("figures"), words.last("format")
    kinds = (chosen or FORMATS[0]).split(",")
    if odd := [kind for kind in kinds if kind not in FORMATS]:
        raise ConfigError(f"--format {odd[0]!r} is no kind of figure: use {', '.join(FORMATS)}, or several with commas")
    if chosen and not folder:
        raise ConfigError(f"--format {chosen} says how figures are written, and not where: add --figures FOLDER")
    if not paths:
        raise ConfigError(f"report needs a run directory: {REPORT}")
    files = [path for path in paths if Path(path).is_file()]  # runs/* names pages of comparisons, too
    runs = [RunDirectory(Path(path)) for path in paths if path not in files]
    if not runs:
        raise ConfigError(f"{files[0]} is a file, not a run: pass the directories of runs, such as runs/NAME")
    for run in runs:
        run.config()  # refuses what is not a run, before anything is written
    place = Path(folder) if folder else None
    if len(runs) > 1:
        print(compare(runs, Path(words.last("out", "comparison.html")), place, kinds))
    else:
        print(finish_report(runs[0]))
        if place is not None:
            publish(drawings(begun(runs[0])), place, kinds)
    if place is not None:
        print(f"figures: {place}")
    return 0


def probe(arguments: Sequence[str]) -> int:
    """Measure a finished run's encoder again, on the run's own data, and print the table.

    `--corruptions` adds the linear probe's accuracy on corrupted test examples, beside that of a random encoder, and
    leaves corruptions.json and its figure in the run; `--corruptions noise,blur` takes those kinds only.

    Raises:
        ConfigError: not exactly one run is named, its data has no labels, or a corruption is unknown.
        ResumeError: the run has no encoder.
    """
    paths, kinds = _corruptions(arguments)
    if len(paths) != 1:
        raise ConfigError("probe takes exactly one run directory: fedssl probe runs/NAME [--corruptions [noise,blur]]")
    rundir = RunDirectory(Path(paths[0]))
    job = Plan.of(rundir.config()).job
    network = load_encoder(rundir.path).network
    torch.set_num_threads(job.threads)
    device = device_of(job)
    evaluator = Evaluator(job, data_of(job, device), device)
    if not evaluator.labelled:
        raise ConfigError(
            f"the data of {rundir.path} has no labels, so there is nothing to probe with: use labelled data"
        )
    arrays = {f"encoder.{key}": value for key, value in to_arrays(network).items()}
    if kinds:
        _robustness(evaluator, arrays, kinds, rundir)
        return 0
    for key, value in evaluator.probe(arrays).items():
        print(f"{key:24} {value:.4f}")
    return 0


def _corruptions(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The run directories, and the corruptions that are asked for."""
    rest = list(arguments)
    if "--corruptions" not in rest:
        return rest, ()
    at = rest.index("--corruptions")
    given = rest[at + 1] if at + 1 < len(rest) else ""
    kinds = tuple(given.split(","))
    if at == 0 or not given:  # the next word, if any, is the run
        del rest[at]
        return rest, KINDS
    del rest[at : at + 2]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"{unknown[0]!r} is not a corruption: use some of {','.join(KINDS)}, or --corruptions alone")
    return rest, kinds


def _robustness(evaluator: Evaluator, arrays: Arrays, kinds: Sequence[str], rundir: RunDirectory) -> None:
    measured = {
        "pretrained": evaluator.robustness(arrays, kinds),
        "random encoder": evaluator.robustness(evaluator.random_encoder(), kinds),
    }
    rundir.write("corruptions.json", measured)
    panels = [
        Panel(
            "severity",
            f"linear probe under {kind} (%)",
            {
                name: Line([0, *SEVERITIES], [100 * v for v in (*values["clean"], *values[kind])])
                for name, values in measured.items()
            },
        )
        for kind in kinds
    ]
    save(chart(panels), rundir.path / "figures" / "corruptions")
    print(f"{'linear accuracy':16}{'':10}{'clean':>8}" + "".join(f"{f'level {s}':>9}" for s in SEVERITIES))
    for kind in kinds:
        for name, values in measured.items():
            cells = "".join(f"{value:9.3f}" for value in values[kind])
            print(f"{name:16}{kind:10}{values['clean'][0]:8.3f}{cells}")
    print(f"figure: {rundir.path / 'figures' / 'corruptions.png'}")
