"""What is said of federations that are not IID, and whether intervals over seeds confirm it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedssl.intervals import Interval
from simulations.studies.base import Finding
from simulations.studies.federated.cells import Cell
from simulations.studies.federated.measures import (
    CKA,
    DRIFT,
    FIVE,
    LINEAR,
    MEAN,
    OWN_MEAN,
    OWN_WORST,
    RANK,
    WORST,
)
from simulations.studies.federated.results import Results
from simulations.studies.federated.supervised import HEAD

UNTRAINED, SUPERVISED = "untrained", "supervised"
BOTH, ONLINE, EMA = "fedavg", "fedbyol", "fedema"  # BYOL under FedAvg rebuilds the teacher: it updates both networks
DECIDED = "decided where the 95 % interval of the difference, paired by seed, leaves out 0"


@dataclass(frozen=True)
class Facts:
    """Findings of the study `noniid`; one is left out where the design does not hold what it compares."""

    results: Results
    centre: Cell
    even: str

    def findings(
        self, methods: Sequence[str], strategies: Sequence[str], skews: Sequence[str], counts: Sequence[int]
    ) -> list[Finding]:
        """All that the design allows, the papers' facts first."""
        skewed = [skew for skew in skews if skew != self.even]
        found = [self._ema(skew) for skew in skewed]
        found += [self._even(method) for method in methods]
        found += [self._supervised(skew, probe) for skew in skews for probe in (HEAD, LINEAR)]
        found += [self._catches_up(skew) for skew in skewed]
        found += [self._strategy(name) for name in strategies if name != BOTH]
        found += [self._own(name) for name in strategies]
        found += [self._learns(method) for method in methods]
        found.append(self._counts(sorted(counts)))
        return [finding for finding in found if finding is not None]

    def _has(self, *keys: object) -> bool:
        return all(key in self.results.values for key in keys)

    def _ema(self, skew: str) -> Finding | None:
        """FedEMA against FedBYOL (Zhuang et al. 2022, table 3)."""
        a, b = (replace(self.centre, strategy=name, skew=skew) for name in (EMA, ONLINE))
        if not self._has(a, b):
            return None
        gain = self.results.gain(a, b, FIVE)
        return Finding(
            f"iii, {skew}: FedEMA gives features at least as good as FedBYOL's",
            gain.above(0),
            f"5 labels a class give {self._percent(a, FIVE)} with FedEMA and {self._percent(b, FIVE)} with FedBYOL, "
            f"{points(gain)}; all labels {self._percent(a, LINEAR)} and {self._percent(b, LINEAR)}; {DECIDED}",
        )

    def _even(self, method: str) -> Finding | None:
        """No skew against the reference's."""
        skewed = replace(self.centre, method=method)
        even = replace(skewed, skew=self.even)
        if even == skewed or not self._has(even, skewed):
            return None
        gain = self.results.gain(even, skewed, FIVE)
        return Finding(
            f"iv, {method}: clients that are {self.even} give better features than {self.centre.skew} a client",
            gain.above(0),
            f"5 labels a class give {self._percent(even, FIVE)} and {self._percent(skewed, FIVE)}, {points(gain)}; "
            f"all labels {self._percent(even, LINEAR)} and {self._percent(skewed, LINEAR)}; CKA between clients "
            f"{self._text(even, CKA)} and {self._text(skewed, CKA)}; {DECIDED}",
        )

    def _supervised(self, skew: str, probe: str) -> Finding | None:
        """Self-supervision against labels in training (Zhuang et al. 2021; Wang et al. 2022)."""
        mine, theirs = replace(self.centre, strategy=ONLINE, skew=skew), (SUPERVISED, skew)
        if not self._has(mine, theirs):
            return None
        gain = self.results.gain(mine, theirs, LINEAR, probe)
        what = "'s own head" if probe == HEAD else ", a new linear probe on its features"
        return Finding(
            f"v, {skew}: {mine.who}, linear probe, is right more often than supervised FedAvg{what}",
            gain.above(0),
            f"{self._percent(mine, LINEAR)} against {self._percent(theirs, probe)}, {points(gain)}, with all labels in "
            f"both; for the worst client {self._percent(mine, WORST)} (5 labels a class) against "
            f"{self._percent(theirs, WORST)} (its head); {DECIDED}",
        )

    def _catches_up(self, skew: str) -> Finding | None:
        """FedBYOL against updating both networks, under skew and without (Zhuang et al. 2022, table 2)."""
        cells = {
            (name, where): replace(self.centre, strategy=name, skew=where)
            for name in (ONLINE, BOTH)
            for where in (skew, self.even)
        }
        if not self._has(*cells.values()):
            return None
        under, without = (self.results.gain(cells[ONLINE, s], cells[BOTH, s], FIVE) for s in (skew, self.even))
        values = [
            [a - b for a, b in zip(*(self.results.values[cells[n, s]][FIVE] for n in (ONLINE, BOTH)), strict=True)]
            for s in (skew, self.even)
        ]
        gap = Interval.of([a - b for a, b in zip(*values, strict=True)])
        return Finding(
            f"vi, {skew}: updating both networks, behind FedBYOL here, catches up where clients are {self.even}",
            gap.above(0) if under.above(0) else under.above(0),
            f"FedBYOL is ahead by {points(under)} under {skew} and by {points(without)} under {self.even}, a change of "
            f"{points(gap)} (5 labels a class); holds means that the first and the change are above 0",
        )

    def _strategy(self, name: str) -> Finding | None:
        """A strategy against FedAvg at the reference."""
        cell, usual = replace(self.centre, strategy=name), replace(self.centre, strategy=BOTH)
        if not self._has(cell, usual):
            return None
        gain, worst = self.results.gain(cell, usual, FIVE), self.results.gain(cell, usual, WORST)
        return Finding(
            f"{name} gives better features than FedAvg ({self.centre.method}, {self.centre.where})",
            gain.above(0),
            f"5 labels a class give {self._percent(cell, FIVE)} against {self._percent(usual, FIVE)}, {points(gain)}; "
            f"for the worst client {points(worst)}; CKA between clients {self._text(cell, CKA)} against "
            f"{self._text(usual, CKA)}; {DECIDED}",
        )

    def _own(self, name: str) -> Finding | None:
        """What clients keep at home against what was merged."""
        cell = replace(self.centre, strategy=name)
        if not self._has(cell) or OWN_MEAN not in self.results.values[cell]:
            return None
        gain = self.results.gain(cell, cell, OWN_MEAN, MEAN)
        worst = self.results.gain(cell, cell, OWN_WORST, WORST)
        return Finding(
            f"{name}: a client's own encoder serves it better than the merged one",
            gain.above(0),
            f"on the classes that a client has, 5 labels a class give {self._percent(cell, OWN_MEAN)} with its own and "
            f"{self._percent(cell, MEAN)} with the merged encoder, {points(gain)} (mean of clients), and for the worst "
            f"client {self._percent(cell, OWN_WORST)} and {self._percent(cell, WORST)}, {points(worst)}; {DECIDED}",
        )

    def _learns(self, method: str) -> Finding | None:
        """Training against none, at the reference."""
        cell = replace(self.centre, method=method)
        if not self._has(cell, UNTRAINED):
            return None
        gain = self.results.gain(cell, UNTRAINED, FIVE)
        return Finding(
            f"{cell.who}: training beats the untrained encoder under {self.centre.skew}",
            gain.above(0),
            f"5 labels a class give {self._percent(cell, FIVE)} against {self._percent(UNTRAINED, FIVE)}, "
            f"{points(gain)}, the worst client has {self._percent(cell, WORST)}; the rank of the features is "
            f"{self._text(cell, RANK, 1)} against {self._text(UNTRAINED, RANK, 1)}; {DECIDED}",
        )

    def _counts(self, counts: Sequence[int]) -> Finding | None:
        """Few clients against many, with the same data in all."""
        cells = {count: replace(self.centre, clients=count) for count in counts}
        if len(counts) < 2 or not self._has(*cells.values()):
            return None
        few, many = cells[counts[0]], cells[counts[-1]]
        gain = self.results.gain(few, many, FIVE)
        return Finding(
            f"the same data on more clients, {self.centre.skew} each, give worse features",
            gain.above(0),
            "5 labels a class give "
            + ", ".join(f"{self._percent(cell, FIVE)} on {count}" for count, cell in cells.items())
            + f", first against last {points(gain)}; a round's way in weights is "
            + ", ".join(self._text(cell, DRIFT, 2) for cell in cells.values())
            + f"; a client of many takes fewer steps in as many rounds; {DECIDED}",
        )

    def _percent(self, key: object, measure: str) -> str:
        return f"{self.results.interval(key, measure).text(100, 1)} %"

    def _text(self, key: object, measure: str, digits: int = 2) -> str:
        known = measure in self.results.values.get(key, {})
        return self.results.interval(key, measure).text(digits=digits) if known else "not measured"


def points(gain: Interval) -> str:
    """A difference of accuracies in percentage points."""
    return f"{gain.text(100, 1, sign=True)} points"
