"""The Flower ServerApp: `fedssl submit NAME method=byol` and `flwr run .` enter here."""

from __future__ import annotations

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl import config
from fedssl.flower.deploy import site
from fedssl.flower.server import federate
from fedssl.progress import Reporter
from fedssl.report import finish_report
from fedssl.tracking import followed

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Compose the job from the run's overrides and run it, or what is left of it; any runtime's nodes take part."""
    site.same_version(context.run_config)
    plan = config.compose(shlex.split(str(context.run_config["overrides"])))
    rundir = plan.at(Path(str(context.run_config["out"])) / plan.path.name).open()
    if not rundir.done:
        with rundir.or_nothing(), followed(plan.build_track(), rundir):
            federate(grid, plan.job, rundir, Reporter())
    if not (rundir.path / "report.html").exists():
        finish_report(rundir)
