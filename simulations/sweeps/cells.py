"""A cell of a sweep: run, or read if it has been run before, and what came of it told to all processes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedssl import config, simulation
from fedssl.errors import FedsslError
from fedssl.progress import Reporter, duration

DONE, BEFORE, FAILED = "done", "done before", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    cell: str  # such as "cell 3 of 12"
    name: str  # the options that make it this cell
    how: str
    path: str = ""  # of its run
    why: str = ""  # it failed


@dataclass(frozen=True)
class Sweep:
    """What a launcher of Hydra calls for each cell, maybe at once and in processes of their own.

    Attributes:
        count: of the cells; 0 if only the sweeper knows.
        swept: the options that differ between cells.
        together: whether cells run at once, so that the rounds of one would be shown among those of others.
        log: a file to which cells append what came of them: how far the sweep is must be known in every process.
        began: when, in seconds since the epoch.
    """

    count: int
    swept: tuple[str, ...]
    together: bool
    log: Path
    began: float

    def __call__(self, cfg: DictConfig) -> None:
        """Run a cell to its end, or what is left of it; what it is refused for does not stop the others."""
        number, options = HydraConfig.get().job.num + 1, list(HydraConfig.get().overrides.task)
        cell = f"cell {number} of {self.count}" if self.count else f"cell {number}"
        name = " ".join(o.lstrip("+") for o in options if o.lstrip("+").partition("=")[0] in self.swept)
        screen, start = Reporter(), time.monotonic()
        try:
            plan = config.plan_from(cfg)
            before = plan.open().done
            if not before:
                screen.say(f"{cell}: {name}" if name else cell)
            simulation.run(plan, Reporter(quiet=before or self.together))
            outcome = Outcome(cell, name, BEFORE if before else DONE, str(plan.path))
        except FedsslError as error:
            outcome = Outcome(cell, name, FAILED, why=str(error))
        self._note(outcome)
        said = {
            DONE: f"{cell}: done in {duration(time.monotonic() - start)}",
            BEFORE: f"{cell}: {name}: done before",
            FAILED: f"{cell}: {name}: failed: {outcome.why}",
        }
        screen.say(f"{said[outcome.how]} ({self._so_far()})")

    def outcomes(self) -> list[Outcome]:
        """What came of the cells that have ended, in the order of the cells."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        found = [Outcome(**json.loads(line)) for line in lines]
        return sorted(found, key=lambda outcome: int(outcome.cell.split()[1]))

    def _note(self, outcome: Outcome) -> None:
        with self.log.open("a", encoding="utf-8") as file:  # one short write: lines of several processes stay whole
            file.write(json.dumps(asdict(outcome)) + "\n")

    def _so_far(self) -> str:
        ended = self.outcomes()
        run, left = sum(outcome.how == DONE for outcome in ended), self.count - len(ended)
        told = tally(ended)
        if left > 0 and run:
            told += f"; about {duration((time.time() - self.began) / run * left)} left"
        return told


def tally(outcomes: Sequence[Outcome]) -> str:
    """How many cells ended how, such as "3 done, 1 failed"."""
    counts = Counter(outcome.how for outcome in outcomes)
    return ", ".join(f"{counts[how]} {how}" for how in (DONE, BEFORE, FAILED) if counts[how]) or "none has ended"
