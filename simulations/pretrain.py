"""`fedssl pretrain` and `fedssl resume`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, FedsslError
from fedssl.progress import Reporter, duration
from fedssl.report import finish_report
from fedssl.rundir import RunDirectory
from simulations.words import refuse_unknown


def main(arguments: Sequence[str]) -> int:
    """Run what the overrides describe; with Hydra's flags (`-m`, `--cfg job`, `--help`) as a full Hydra application.

    Raises:
        FedsslError: the first refusal; the other cells of a sweep are run all the same.
    """
    refuse_unknown(arguments)
    if not any(text.lstrip("+~").startswith(("-", "hydra")) for text in arguments):
        run(config.compose(arguments))  # Hydra's application would compose twice
        return 0
    problems: list[FedsslError] = []

    @hydra.main(config_path=str(config.conf_dir()), config_name="config", version_base="1.3")
    def application(cfg: DictConfig) -> None:
        try:
            run(config.plan_from(cfg))
        except FedsslError as error:
            problems.append(error)

    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that `explain` can speak
    sys.argv = ["fedssl pretrain", *config.relax(arguments)]
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise config.explain(error, arguments) from error
    finally:
        sys.argv = before
    for problem in problems[1:]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise problems[0]
    return 0


def resume(arguments: Sequence[str]) -> int:
    """Continue a run from its last checkpoint.

    Raises:
        ConfigError: not exactly one run is named.
        ResumeError: the directory cannot be continued.
    """
    if len(arguments) != 1:
        raise ConfigError("resume takes exactly one run directory: fedssl resume runs/NAME")
    path = Path(arguments[0])
    run(Plan.of(RunDirectory(path).config()).at(path))
    return 0


def run(plan: Plan) -> dict[str, Any]:
    """Run a plan to its end, or what is left of it; write the report; say what was learnt."""
    rundir = plan.open()
    reporter = Reporter()
    if rundir.done:
        reporter.say(f"{rundir.path} has already finished with this configuration: nothing to do")
        summary = rundir.read("summary.json")
    else:
        summary = plan.build_engine().run(plan.job, rundir, reporter)
    if not (rundir.path / "report.html").exists():
        finish_report(rundir)
    _conclude(rundir, summary)
    return summary


def _conclude(rundir: RunDirectory, summary: dict[str, Any]) -> None:
    names = ("random encoder", "central", "raw values", "window statistics")
    rows = [("federated", ""), *((name, f"{name.replace(' ', '_')}_") for name in names)]
    columns = [
        ("one label a class", "one_label_accuracy"),
        ("five labels", "five_labels_accuracy"),
        ("all labels", "linear_accuracy"),
        ("kNN", "knn_accuracy"),
    ]
    if summary.get("one_label_accuracy") is not None:
        print(f"{'accuracy':17}" + "".join(f"{name:>19}" for name, _ in columns))
        for name, prefix in rows:
            values = [summary.get(prefix + key) for _, key in columns]
            if values[0] is not None:
                print(f"{name:17}" + "".join(f"{value:19.3f}" for value in values))
    if summary["alarms"]:
        raised = dict.fromkeys(f"{alarm['name']} ({alarm['part']})" for alarm in summary["alarms"])
        print(f"alarms: {', '.join(raised)}")
    megabytes = (summary["bytes_up"] + summary["bytes_down"]) / 1e6
    rank = summary.get("effective_rank")  # a server that holds no data measures nothing
    print(
        f"{summary['rounds']} rounds in {duration(summary['seconds'])}, {megabytes:.0f} MB exchanged"
        + ("" if rank is None else f", effective rank {rank:.1f}")
    )
    claim = rundir.read("privacy.json")
    for each in (claim, claim.get("record")):
        if each is not None:
            print(f"privacy: {each['says']}")
    print(f"report: {rundir.path / 'report.html'}")
