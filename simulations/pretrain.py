"""`fedssl pretrain` and `fedssl resume`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from fedssl import config, simulation
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.progress import Reporter, duration
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory
from simulations.sweeps import command as sweep
from simulations.sweeps.application import application
from simulations.words import refuse_unknown


def main(arguments: Sequence[str]) -> int:
    """Run what the overrides describe; with Hydra's flags (`-m`, `--cfg job`, `--help`) as a full Hydra application.

    Raises:
        FedsslError: the run is refused.
    """
    refuse_unknown(arguments)
    if not any(text.lstrip("+~").startswith(("-", "hydra")) for text in arguments):
        run(config.compose(arguments))  # Hydra's application would compose twice
        return 0
    if sweep.asked(arguments):
        return sweep.main(arguments)
    application(_composed, arguments)
    return 0


def _composed(cfg: DictConfig) -> None:
    run(config.plan_from(cfg))


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


def run(plan: Plan) -> None:
    """Run a plan to its end, or what is left of it; write the report; say what was learnt."""
    _conclude(simulation.run(plan, Reporter()))
    print(f"report: {plan.path / 'report.html'}")


def _conclude(record: Record) -> None:
    summary = record.summary
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
    for each in (record.claim, record.claim.get("record")):
        if each:
            print(f"privacy: {each['says']}")
