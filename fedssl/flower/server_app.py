"""The Flower ServerApp: `flwr run . --run-config 'overrides="method=byol"'` enters here."""

from __future__ import annotations

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl import config
from fedssl.flower.server import federate
from fedssl.progress import Reporter
from fedssl.report import finish_report

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Compose the job from the run's overrides and run it; nodes of any Flower runtime take part."""
    plan = config.compose(shlex.split(str(context.run_config["overrides"])))
    rundir = plan.at(Path(str(context.run_config["out"])) / plan.path.name).open()
    federate(grid, plan.job, rundir, Reporter())
    finish_report(rundir)
