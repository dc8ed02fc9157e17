"""Sweeps of runs: settings by places, each over seeds, with the same measures of every finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedssl import diagnostics, probes
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench, mean_and_deviation
from simulations.studies.tools.rows import Row, Stat, row
from simulations.studies.tools.runs import CENTRAL, QUICK, Finished

Measure = Callable[[RunDirectory], Mapping[str, float]]


def places(clients: int, alpha: float) -> dict[str, tuple[str, ...]]:
    """Where the same data are: on one client, dealt out, or divided by label."""
    several = f"federation.clients={clients}"
    return {
        "central": CENTRAL,
        "IID clients": (several, "partition=iid"),
        "skewed clients": (several, "partition=dirichlet", f"partition.alpha={alpha}"),
    }


@dataclass(frozen=True)
class Sweep:
    """What a sweep has measured: (place, setting) -> measure -> its value for each seed; and the runs, by seed."""

    values: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
    runs: Mapping[tuple[str, str], Sequence[RunDirectory]]

    @classmethod
    def of(
        cls,
        bench: Bench,
        where: Mapping[str, Sequence[str]],
        settings: Mapping[str, Sequence[str]],
        common: Sequence[str],
        seeds: int,
        measure: Measure,
    ) -> Sweep:
        """Run every setting at every place with seeds 0, 1, ..., on the digits; places win over what is common."""
        runs = {
            (place, setting): [
                bench.pretrain("data=digits", *QUICK, *common, *at, *own, f"seed={seed}") for seed in range(seeds)
            ]
            for place, at in where.items()
            for setting, own in settings.items()
        }
        values: dict[tuple[str, str], dict[str, list[float]]] = {}
        for cell, each in runs.items():
            found = [measure(run) for run in each]
            values[cell] = {name: [float(one[name]) for one in found] for name in found[0]}
        return cls(values, runs)

    def stat(self, place: str, setting: str, measure: str) -> Stat:
        """Mean and deviation over seeds."""
        return mean_and_deviation(self.values[place, setting][measure])

    def mean(self, place: str, setting: str, measure: str) -> float:
        """Mean over seeds."""
        return self.stat(place, setting, measure)[0]

    @property
    def places(self) -> list[str]:
        """In the order given."""
        return list(dict.fromkeys(place for place, _ in self.values))

    @property
    def settings(self) -> list[str]:
        """In the order given."""
        return list(dict.fromkeys(setting for _, setting in self.values))

    def bars(self, measure: str, settings: Sequence[str] = ()) -> dict[str, dict[str, Stat]]:
        """For a panel: setting -> place -> (mean, deviation)."""
        return {
            setting: {
                place: self.stat(place, setting, measure) for place in self.places if (place, setting) in self.values
            }
            for setting in settings or self.settings
        }

    def rows(self, part: str) -> list[Row]:
        """For the table, one row a measure."""
        return [
            row(part, place, setting, measure, mean_and_deviation(values))
            for (place, setting), measures in self.values.items()
            for measure, values in measures.items()
        ]


def quality(finished: Finished) -> dict[str, float]:
    """What every study reports of an encoder: two probes, and the collapse of its features and its projections."""
    x, held = (finished.features(part) for part in (finished.data.train, finished.data.test))
    z = torch.from_numpy(finished.features(finished.data.test, projected=True))
    y, held_y = finished.data.train.targets, finished.data.test.targets
    h = torch.from_numpy(held)
    return {
        "accuracy, 5 labels a class": finished.few_label(),
        "accuracy, all labels": probes.linear(x, y, held, held_y, seed=finished.job.seed).accuracy,
        "effective rank of features": diagnostics.effective_rank(h),
        "spread of features": diagnostics.feature_std(h) * h.shape[1] ** 0.5,
        "effective rank of projections": diagnostics.effective_rank(z),
        "spread of projections": diagnostics.feature_std(z) * z.shape[1] ** 0.5,
    }


def untrained(bench: Bench, common: Sequence[str], seeds: int) -> dict[str, Stat]:
    """The same of encoders before training, for what a sweep has just run centrally."""
    runs = [bench.pretrain("data=digits", *QUICK, *common, *CENTRAL, f"seed={seed}") for seed in range(seeds)]
    found = [quality(Finished.untrained(run)) for run in runs]
    return {name: mean_and_deviation([each[name] for each in found]) for name in found[0]}
