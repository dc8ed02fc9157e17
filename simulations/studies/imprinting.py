"""T2: class means of keys as a classifier, against trained heads, by labels spent and by who holds the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedssl.report.charts import Line, Panel
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools.heads import SPACES, Encoded, stored
from simulations.studies.tools.rows import Stat, apart, joined, line, pair, row, stats
from simulations.studies.tools.runs import QUICK, Finished
from simulations.studies.tools.sweeps import places

AT = (0, 1, 2, 5, 10, 30, 100, 300)  # steps at which a trained head is measured
HEADS = ("imprinted keys", "head on keys", "imprinted features", "head on features")
GLOBAL = ("union of keys", "mean weighted by counts", "mean of classifiers", "stored keys")
OWN = ("own, imprinted, all classes", "own, head, all classes", "own, imprinted, own classes", "own, head, own classes")


@dataclass(frozen=True)
class Imprinting:
    """Encoders by instance discrimination at three places; on each, imprinted classifiers and trained heads.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, 1 or more.
        labels: labels a class.
        draws: of the labels.
        clients: of the federated runs.
        alpha: label skew, Dir(alpha).
        rounds: of all runs.
    """

    tiny: bool = False
    seeds: int = 3
    labels: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    draws: int = 5
    clients: int = 5
    alpha: float = 0.1
    rounds: int = 15

    def __post_init__(self) -> None:
        check(self)

    def run(self, bench: Bench) -> Outcome:
        """Measure all parts."""
        small: dict[str, Any] = {"seeds": 1, "labels": (1, 5, 20), "draws": 2, "rounds": min(4, self.rounds)}
        sized = replace(self, **small) if self.tiny else self
        common = ("method=instance", f"federation.rounds={sized.rounds}")
        encoders: dict[str, list[Encoded]] = {}
        banks: dict[str, list[float]] = {}
        for place, at in places(sized.clients, sized.alpha).items():
            runs = [bench.pretrain("data=digits", *QUICK, *common, *at, f"seed={s}") for s in range(sized.seeds)]
            encoders[place] = [Encoded.of(Finished.of(run)) for run in runs]
            banks[place] = [stored(run, encoded) for run, encoded in zip(runs, encoders[place], strict=True)]
            if place == "central":
                encoders = {"untrained": [Encoded.of(Finished.untrained(run)) for run in runs], **encoders}
        bench.reporter.say("T2: heads by labels, starts and owners")
        return joined([sized._labels(encoders), sized._starts(encoders), sized._owners(encoders, banks)])

    def _labels(self, encoders: Mapping[str, Sequence[Encoded]]) -> Outcome:
        """Accuracy by labels a class, imprinted and trained from the same labels."""
        rows, panels, findings = [], [], []
        for place, each in encoders.items():
            if place == "IID clients":
                continue
            found = [[e.few(n, self.draws) for n in self.labels] + [e.everything()] for e in each]
            curves = {h: stats([[at[h] for at in one] for one in found]) for h in HEADS}
            whole = round(len(each[0].labels) / each[0].classes)
            x = [*self.labels, whole]
            panels.append(Panel("labels a class", "accuracy", {h: line(x, curves[h]) for h in HEADS}, log_x=True,
                                title=f"encoder: {place}"))  # fmt: skip
            rows += [
                row("labels", place, f"{h}, {n} a class", "accuracy", value)
                for h in HEADS
                for n, value in zip(x, curves[h], strict=True)
            ]
            if place != "untrained":
                findings += [_few(place, x, curves), _all(place, curves)]
        start, trained = (
            mean_and_deviation([e.everything()["imprinted keys"] for e in encoders[place]])
            for place in ("untrained", "central")
        )
        findings.append(
            Finding(
                "T2: it is instance discrimination that makes the class means of keys a classifier",
                apart(trained, start),
                f"with all labels imprinted keys reach {pair(trained)} after pretraining and {pair(start)} before; "
                "decided where the difference is larger than both deviations",
            )
        )
        return Outcome(rows, {"labels": panels}, findings)

    def _starts(self, encoders: Mapping[str, Sequence[Encoded]]) -> Outcome:
        """A head on keys trained with 5 labels a class and with all, from imprinted, random and zero weights."""
        rows, panels, findings = [], [], []
        steps = tuple(step for step in AT if step <= (30 if self.tiny else AT[-1]))
        for place in ("central", "skewed clients"):
            lines: dict[str, Line] = {}
            curves: dict[str, list[Stat]] = {}
            for name in ("imprinted", "random", "zero"):
                found = []
                for e in encoders[place]:
                    everything = np.arange(len(e.labels))
                    start = {"imprinted": e.imprinted(), "random": e.random(), "zero": 0.0 * e.random()}[name]
                    found.append(e.descent(start, everything, steps))
                curves[name] = stats(found)
                lines[f"from {name} weights"] = line([step + 1 for step in steps], curves[name])
                rows += [
                    row("starts", place, f"{name}, {step} steps", "accuracy", value)
                    for step, value in zip(steps, curves[name], strict=True)
                ]
            panels.append(Panel("steps + 1", "accuracy", lines, log_x=True, title=f"head on keys, encoder: {place}"))
            first, last = curves["imprinted"][0][0], curves["imprinted"][-1][0]
            reached = {
                n: [s for s, (m, _) in zip(steps, curves[n], strict=True) if m >= first] for n in ("random", "zero")
            }
            random, zero = (f"{r[0]} steps" if r else f"more than {steps[-1]} steps" for r in reached.values())
            ends = {n: curves[n][-1] for n in curves}
            findings.append(
                Finding(
                    f"T2, {place}: imprinted weights are a good start for a supervised head",
                    first - curves["random"][0][0] > 0.2 and ends["imprinted"][0] > ends["random"][0] - 0.01,
                    f"before any step they reach {first:.3f}, random weights need {random} for that and zero weights "
                    f"{zero} (but one step from zero, along the class means, gives {curves['zero'][1][0]:.3f}); "
                    f"after {steps[-1]} steps {last:.3f}, {ends['random'][0]:.3f} and {ends['zero'][0]:.3f}; "
                    "holds means 0.2 above random at first and not 0.01 below it in the end",
                )
            )
        return Outcome(rows, {"starts": panels}, findings)

    def _owners(self, encoders: Mapping[str, Sequence[Encoded]], banks: Mapping[str, Sequence[float]]) -> Outcome:
        """Each client's own classifier, and the ways to a global one."""
        found: dict[str, dict[str, Stat]] = {}
        for place in ("IID clients", "skewed clients"):
            each = [e.clients() for e in encoders[place]]
            found[place] = {name: mean_and_deviation([one[name] for one in each]) for name in each[0]}
            found[place]["stored keys"] = mean_and_deviation(banks[place])
        central = mean_and_deviation(banks["central"])
        fresh = mean_and_deviation([e.accuracy(e.imprinted()) for e in encoders["central"]])
        rows = [row("owners", place, name, "accuracy", s) for place, each in found.items() for name, s in each.items()]
        rows.append(row("owners", "central", "stored keys", "accuracy", central))
        panels = [
            Panel("", "accuracy", bars={n: {p: found[p][n] for p in found} for n in GLOBAL}, title="global, all keys"),
            Panel("", "accuracy", bars={n.removeprefix("own, "): {p: found[p][n] for p in found} for n in OWN},
                  title="each client's own, mean of the clients"),
        ]  # fmt: skip
        findings = [_joined(found), _own(found), _stale(found, (central, fresh))]
        return Outcome(rows, {"owners": panels}, findings)


def _few(place: str, x: Sequence[int], curves: Mapping[str, Sequence[Stat]]) -> Finding:
    """With the fewest labels."""
    best, head = (
        max((f"{kind} {space}" for space in SPACES), key=lambda name: curves[name][0][0])
        for kind in ("imprinted", "head on")
    )
    crossing = [n for n, a, b in zip(x, curves[best], curves[head], strict=True) if a[0] >= b[0]]
    return Finding(
        f"T2, {place}: with one label a class class means are as good as a trained head",
        curves[best][0][0] > curves[head][0][0] - 0.01,
        f"{x[0]} label a class: {best} {pair(curves[best][0])}, {head} {pair(curves[head][0])}; the class means are at "
        f"least as good at {', '.join(map(str, crossing)) or 'none'} of {', '.join(map(str, x))} labels a class; holds "
        "means not 0.01 below",
    )


def _all(place: str, curves: Mapping[str, Sequence[Stat]]) -> Finding:
    imprinted, head = curves["imprinted keys"][-1], curves["head on keys"][-1]
    features = curves["head on features"][-1]
    return Finding(
        f"T2, {place}: the classifier of class means of keys comes near a trained linear head",
        imprinted[0] > head[0] - 0.05,
        f"with all labels imprinted keys reach {pair(imprinted)}, a head trained on the keys {pair(head)}, on the "
        f"features {pair(features)} (imprinted features {pair(curves['imprinted features'][-1])}); holds means within "
        "0.05 of the head on the keys",
    )


def _joined(found: Mapping[str, Mapping[str, Stat]]) -> Finding:
    skewed, iid = found["skewed clients"], found["IID clients"]
    union, mean, weighted = (skewed[n] for n in ("union of keys", "mean of classifiers", "mean weighted by counts"))
    return Finding(
        "T2 federated: the mean of the clients' classifiers equals the classifier of all their keys",
        abs(mean[0] - union[0]) < 0.005 and abs(weighted[0] - union[0]) < 0.005,
        f"label skew: union {pair(union)}, plain mean {pair(mean)}, mean weighted by counts {pair(weighted)}, sums of "
        f"unit keys {pair(skewed['sums of unit keys'])}, which is exact; IID: union {pair(iid['union of keys'])}, "
        f"plain mean {pair(iid['mean of classifiers'])}; holds means within 0.005 under skew",
    )


def _own(found: Mapping[str, Mapping[str, Stat]]) -> Finding:
    skewed, iid = found["skewed clients"], found["IID clients"]
    return Finding(
        "T2 federated: a client's own keys make a classifier as good as everybody's",
        skewed[OWN[0]][0] > skewed["union of keys"][0] - 0.05,
        f"label skew: own keys {pair(skewed[OWN[0]])} on all classes and {pair(skewed[OWN[2]])} on those it has, "
        f"own trained heads {pair(skewed[OWN[1]])} and {pair(skewed[OWN[3]])}, union {pair(skewed['union of keys'])}; "
        f"IID: own keys {pair(iid[OWN[0]])}, union {pair(iid['union of keys'])}; holds means within 0.05",
    )


def _stale(found: Mapping[str, Mapping[str, Stat]], central: tuple[Stat, Stat]) -> Finding:
    pairs = {place: (each["stored keys"], each["union of keys"]) for place, each in found.items()}
    return Finding(
        "T2 federated: the keys that the banks hold serve the merged encoder as well as fresh ones",
        all(old[0] > new[0] - 0.01 for old, new in pairs.values()),
        "; ".join(
            f"{place} {pair(old)} with stored and {pair(new)} with fresh keys" for place, (old, new) in pairs.items()
        )
        + f"; central {pair(central[0])} and {pair(central[1])}; stored keys are of augmented views and of the "
        "clients' models before the merge; holds means not 0.01 below at any client",
    )
