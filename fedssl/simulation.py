"""One call from Python: `fedssl.simulate("method=byol", "partition.alpha=0.1")` does what `fedssl pretrain` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.progress import Reporter
from fedssl.report import finish_report
from fedssl.report.record import Record
from fedssl.tracking import followed


def simulate(*overrides: str, quiet: bool = False) -> Record:
    """Run federated pretraining to its end, or what is left of it, and return what it has left in its directory.

    A run is resumed where an interruption left it, and a finished one is read, not repeated. The figures and
    `report.html` are in `.path`.

    Args:
        overrides: the options of `fedssl pretrain`, one a string, such as "method=byol"; later ones win.
        quiet: show no progress.

    Returns:
        The run: its `.summary`, its `.rows` (one a round), `.probes`, `.spectra` and `.split`, and `.encoder()`.

    Raises:
        FedsslError: for everything a person can mend, in one sentence; finished rounds stay in the directory.
    """
    if odd := [given for given in overrides if not isinstance(given, str)]:
        raise ConfigError(f"{odd[0]!r} is not an option: give each as a string of its own, such as 'method=byol'")
    return run(config.compose(overrides), Reporter(quiet))


def run(plan: Plan, reporter: Reporter) -> Record:
    """Run a plan to its end, or what is left of it, and write its report; see `simulate`."""
    rundir = plan.open()
    if rundir.done:
        reporter.say(f"{rundir.path} has already finished with this configuration: nothing to do")
    else:
        with rundir.or_nothing(), _torch_as_before(), followed(plan.build_track(), rundir):
            plan.build_engine().run(plan.job, rundir, reporter)
    if not (rundir.path / "report.html").exists():
        finish_report(rundir)
    return Record.read(rundir)


@contextmanager
def _torch_as_before() -> Iterator[None]:
    """Give torch its threads and its global generator back: a notebook has other work for them."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw from it before their weights are replaced
            yield
    finally:
        torch.set_num_threads(threads)
