"""`fedssl pretrain -m`: all cells of a sweep, in this process or in those of a launcher, and what came of them."""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from fedssl import config
from fedssl.errors import ConfigError
from fedssl.report import comparison
from fedssl.rundir import RunDirectory
from simulations.sweeps.application import application
from simulations.sweeps.cells import FAILED, Outcome, Sweep, tally


def asked(arguments: Sequence[str]) -> bool:
    """Whether these arguments ask for a sweep."""
    return any(text in ("-m", "--multirun") or text.lower() == "hydra.mode=multirun" for text in arguments)


def main(arguments: Sequence[str]) -> int:
    """Run a sweep; exit code 2 if a cell was refused.

    Raises:
        FedsslError: the sweep as a whole is refused, before any cell has begun.
    """
    overrides = {override.key_or_group: override for override in _parsed(arguments)}  # later ones win
    swept = {key: _choices(o) for key, o in overrides.items() if o.is_sweep_override() and not o.is_hydra_override()}
    given = {key: str(override.value()) for key, override in overrides.items()}
    count = math.prod(swept.values())
    if count > 1 and "name" in given and "name" not in swept and "${" not in given["name"]:
        raise ConfigError(
            f"name={given['name']} would give all {count} cells one directory: leave it out, and each gets a name of "
            "its own, or let it hold what differs, such as 'name=mine-${seed}'"
        )
    together = given.get("hydra/launcher", "basic") != "basic"
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(count, tuple(swept), together, Path(folder) / "outcomes.jsonl", time.time())
        try:
            application(sweep, arguments)
        finally:
            if together:
                _dismiss()
        outcomes = sweep.outcomes()
    return _conclude(outcomes, list(swept))


def _dismiss() -> None:
    """End joblib's processes, which else wait minutes for more work, or after ctrl-C go on with what they have."""
    from joblib.externals.loky import get_reusable_executor  # which other commands need not wait for

    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _parsed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments, as far as they can be read: what cannot be, Hydra refuses."""
    words = [text for text in config.relax(arguments) if not text.startswith("-")]
    try:
        overrides: list[Override] = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return []
    return overrides


def _choices(override: Override) -> int:
    """How many values an option takes; 0 if the sweeper decides."""
    value = override.value()
    if isinstance(value, Glob):
        return len(value.filter(config.options_of(override.key_or_group)))
    return len(list(override.sweep_string_iterator())) if override.is_discrete_sweep() else 0


def _conclude(outcomes: Sequence[Outcome], swept: Sequence[str]) -> int:
    """Say what came of the sweep: a table of all runs, a page that compares them, and what was refused."""
    paths = [Path(outcome.path) for outcome in outcomes if outcome.path]
    if paths:
        runs = [RunDirectory(path) for path in paths]
        stem = re.sub(r"[^\w.-]+", "_", "-".join(["comparison", *swept]))[:100]
        print(comparison.as_text(comparison.table(runs)))
        page = comparison.compare(runs, paths[0].parent / f"{stem}.html")
        print(f"{len(outcomes)} cells: {tally(outcomes)}; comparison: {page}")
    refused = [outcome for outcome in outcomes if outcome.how == FAILED]
    for outcome in refused:
        print(f"error: {outcome.cell} ({outcome.name}): {outcome.why}", file=sys.stderr)
    return 2 if refused else 0
