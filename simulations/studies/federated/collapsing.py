"""What a run that may collapse is measured by: its end, its ranks and spectra over rounds, and the alarms it raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedssl import diagnostics, probes
from fedssl.measures.alarms import REMEDIES
from fedssl.measures.collapse import spectrum_shares
from fedssl.report.charts import Line
from fedssl.rundir import RunDirectory
from simulations.studies.federated.measures import FIVE, LINEAR
from simulations.studies.tools.runs import Finished

RANK, SPREAD, FEATURES = "effective rank of projections", "spread of projections", "effective rank of features"
ALARM, STANDING = "alarm: ", "alarm at the end: "
_FLOOR = 1e-7  # of a spectrum; below it is rounding


def measured(run: RunDirectory) -> dict[str, float]:
    """At the end: probes, ranks, spread (1 is even, 0 collapse); 1 for each alarm raised, and for each that stands."""
    finished = Finished.of(run)
    train, test = (finished.features(part) for part in (finished.data.train, finished.data.test))
    z = torch.from_numpy(finished.features(finished.data.test, projected=True))
    sets = (train, finished.data.train.targets, test, finished.data.test.targets)
    alarms = run.read("summary.json")["alarms"]
    last = run.rows()[-1]["round"]
    return {
        FIVE: probes.few_label(*sets, per_class=5, repeats=10, seed=finished.job.seed).mean,
        LINEAR: probes.linear(*sets, seed=finished.job.seed).accuracy,
        RANK: diagnostics.effective_rank(z),
        SPREAD: diagnostics.feature_std(z) * z.shape[1] ** 0.5,
        FEATURES: diagnostics.effective_rank(torch.from_numpy(test)),
        **{f"{ALARM}{name}": float(any(alarm["name"] == name for alarm in alarms)) for name in REMEDIES},
        **{
            f"{STANDING}{name}": float(any((a["name"], a["last"]) == (name, last) for a in alarms)) for name in REMEDIES
        },
    }


@dataclass(frozen=True)
class History:
    """The merged model's projections over the rounds of one run, round 0 being before training."""

    rounds: Sequence[int]
    ranks: Sequence[float]
    spectra: Sequence[Sequence[float]]  # shares of the projections' mean squared length, largest first

    @classmethod
    def of(cls, run: RunDirectory) -> History:
        """From what the monitor has measured."""
        start = Finished.untrained(run)
        z = torch.from_numpy(start.features(start.data.test, projected=True))
        rows: list[Any] = [
            row for row in run.rows("collapse.jsonl") if (row["client"], row["part"]) == ("merged", "projector")
        ]
        return cls(
            [0, *(int(row["round"]) for row in rows)],
            [diagnostics.effective_rank(z), *(float(row["effective_rank"]) for row in rows)],
            [list(map(float, spectrum_shares(z)))[: len(rows[0]["spectrum"])], *(row["spectrum"] for row in rows)],
        )

    def curves(self, count: int = 5) -> dict[str, Line]:
        """Spectra at some rounds, the first and the last among them, twice as far apart each time."""
        last = len(self.rounds) - 1
        chosen = sorted({0, *(last >> halving for halving in range(count - 1))})
        found = {}
        for at in chosen:
            values = [v for v in self.spectra[at] if v is not None and v > _FLOOR]
            found[f"round {self.rounds[at]}"] = Line(list(range(1, len(values) + 1)), values)
        return found
