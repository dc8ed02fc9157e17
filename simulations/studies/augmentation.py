"""Augmentation defines the invariance (T5): which factor survives when views keep or redraw it, alone and by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedssl import probes
from fedssl.errors import ConfigError
from fedssl.report.charts import Panel
from fedssl.theory import TwoFactors as Closed
from fedssl.theory import two_factor_information
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools.rows import Row, Stat, line, pair, row
from simulations.studies.tools.runs import CENTRAL, Finished
from simulations.studies.tools.two_factors import GLYPHS, FactorViews, TwoFactors

Keep = tuple[Sequence[float], Sequence[float]]  # probability that views keep the signal and the background, by site
Measured = Mapping[str, Stat]
WAYS: Mapping[str, Sequence[str]] = {
    "central": CENTRAL,
    "IID clients": ("federation.clients=4", "partition=iid"),
    "a site a client": ("federation.clients=4", "partition=natural"),
}
SITES: Mapping[str, Keep] = {
    "2 of 4 sites keep s, 2 keep b": ((1, 1, 0, 0), (0, 0, 1, 1)),
    "1 of 4 sites keeps s, 3 keep b": ((1, 0, 0, 0), (0, 1, 1, 1)),
}
CHANCE = 1 / len(GLYPHS)


@dataclass(frozen=True)
class Augmentation:
    """SimCLR on two-factor images: accuracy of linear probes for the class y and for the background b.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: of the runs.
        rounds: of each run, each one pass over the examples.
        longer: rounds of further runs whose views share only b; 0 for none.
        examples: of the training set.
        keeps: probabilities of keeping one factor while the other is kept always.
        temperature: of SimCLR.
    """

    tiny: bool = False
    seeds: int = 3
    rounds: int = 12
    longer: int = 36
    examples: int = 2000
    keeps: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0)
    temperature: float = 0.2

    def __post_init__(self) -> None:
        check(self, zero=("longer", "keeps"))
        if min(self.keeps) != 0 or max(self.keeps) != 1:
            raise ConfigError(f"study.keeps is {self.keeps}, but 0 and 1 are what the rest is compared with: add them")

    def run(self, bench: Bench) -> Outcome:
        """Central runs against how often views keep a factor; then federations whose sites keep different ones."""
        sized = self
        if self.tiny:
            small = {"seeds": 1, "rounds": min(self.rounds, 3), "longer": 0, "examples": min(self.examples, 1000)}
            sized = replace(self, keeps=(0.0, 1.0), **small)  # type: ignore[arg-type]
        return sized._study(bench)

    def _study(self, bench: Bench) -> Outcome:
        signal = {k: self._measure(bench, ((k,), (1,)), CENTRAL) for k in self.keeps}
        ground = {k: signal[k] if k == 1 else self._measure(bench, ((1,), (k,)), CENTRAL) for k in self.keeps}
        later = replace(self, rounds=self.longer)._measure(bench, ((0,), (1,)), CENTRAL) if self.longer else None
        sites = dict(list(SITES.items())[: 1 if self.tiny else None])
        mixed = {(name, way): self._measure(bench, keep, WAYS[way]) for name, keep in sites.items() for way in WAYS}
        rows = [
            *(r for k, m in signal.items() for r in _rows("central", f"s kept with {k:g}, b always", m, ((k,), (1,)))),
            *(_rows("central", f"s never, b always, {self.longer} rounds", later, ((0,), (1,))) if later else ()),
            *(r for k, m in ground.items() for r in _rows("central", f"b kept with {k:g}, s always", m, ((1,), (k,)))),
            *(r for (name, way), m in mixed.items() for r in _rows(way, name, m, SITES[name])),
        ]
        start = {_accuracy(f, "z"): signal[1][f"random z {f}"] for f in "yb"}
        rows += [row("accuracy", "before training", "untrained", name, found) for name, found in start.items()]
        charts = {
            "keeping_a_factor": [_sweep("s", self.keeps, signal), _sweep("b", self.keeps, ground)],
            "sites": [_bars(name, {way: mixed[name, way] for way in WAYS}, signal[1.0]) for name in sites],
        }
        return Outcome(rows, charts, [*_central(signal, ground, later), *_federated(mixed)])

    def _measure(self, bench: Bench, keep: Keep, way: Sequence[str]) -> Measured:
        """What linear probes read from encoder h and projection z, over seeds; before training too."""
        found: dict[str, list[float]] = {}
        for seed in range(self.seeds):
            options = (f"method.temperature={self.temperature}", f"federation.rounds={self.rounds}", f"seed={seed}")
            quiet = ("evaluate.every=0", "evaluate.final=false", "method=simclr")
            run = bench.pretrain(*TwoFactors.options(*keep, self.examples), *quiet, *options, *way)
            values = {**_probe(Finished.of(run)), **_probe(Finished.untrained(run), "random ")}
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        return {key: mean_and_deviation(values) for key, values in found.items()}


def _probe(run: Finished, prefix: str = "") -> dict[str, float]:
    """Accuracies of linear probes for the class y and the background b; examples are not augmented."""
    found = {}
    for place in ("z",) if prefix else ("h", "z"):
        train, test = (run.features(t, projected=place == "z") for t in (run.data.train, run.data.test))
        for name, labels in (("y", "targets"), ("b", "backgrounds")):
            y, held = (getattr(part, labels) for part in (run.data.train, run.data.test))
            accuracy = probes.linear(train, y, test, held, seed=run.job.seed).accuracy
            found[f"{prefix}{place} {name}"] = accuracy
    return found


def _closed(keep: Keep) -> Closed:
    """The closed form; every site has as many examples."""
    return two_factor_information(len(GLYPHS), FactorViews().backgrounds, list(keep[0]), list(keep[1]))


def _rows(way: str, setting: str, found: Measured, keep: Keep) -> list[Row]:
    """The closed form expects all of a factor that is ever kept by both views, and chance of one that never is."""
    closed = _closed(keep)
    expected = {"y": 1.0 if closed.label > 0 else CHANCE, "b": 1.0 if closed.background > 0 else CHANCE}
    shared = {"y": closed.signal_views, "b": closed.background_views}
    return [
        *(row("accuracy", way, setting, _accuracy(factor, place), found[f"{place} {factor}"], expected[factor])
          for place in "hz" for factor in "yb"),
        *(row("closed form", way, setting, f"nats of {factor} that views share", (nats, 0.0))
          for factor, nats in shared.items()),
    ]  # fmt: skip


def _accuracy(factor: str, place: str) -> str:
    return f"accuracy of {factor} from {place}"


def _sweep(factor: str, keeps: Sequence[float], found: Mapping[float, Measured]) -> Panel:
    kept, other = ("y", "b") if factor == "s" else ("b", "y")
    names = {f"{kept} from z": f"z {kept}", f"{kept} from h": f"h {kept}", f"{other} from z": f"z {other}"}
    return Panel(
        f"probability that a view keeps {factor}",
        "accuracy of a linear probe",
        {label: line(keeps, [found[k][key] for k in keeps]) for label, key in names.items()},
        levels={"chance": CHANCE, f"{kept} from an untrained z": found[keeps[0]][f"random z {kept}"][0]},
        title=f"{factor} kept sometimes, {'b' if factor == 's' else 's'} always; central",
    )


def _bars(name: str, found: Mapping[str, Measured], both: Measured) -> Panel:
    shown = {way: {f"{f} from {p}": m[f"{p} {f}"] for p in "hz" for f in "yb"} for way, m in found.items()}
    shown["central, all views keep both"] = {f"{f} from {p}": both[f"{p} {f}"] for p in "hz" for f in "yb"}
    levels = {f"{f} from an untrained z": both[f"random z {f}"][0] for f in "yb"}
    return Panel("", "accuracy of a linear probe", bars=shown, levels=levels, title=name)


def _central(
    signal: Mapping[float, Measured], ground: Mapping[float, Measured], later: Measured | None
) -> list[Finding]:
    without, mirrored = signal[min(signal)], ground[min(ground)]
    end = later or without
    after = f" ({later['z y'][0]:.3f} after longer training)" if later else ""
    some = sorted(k for k in signal if 0 < k < 1)
    out = [
        Finding(
            "T5: z keeps what views share, and training removes the rest",
            without["z b"][0] > 0.9
            and without["z y"][0] < without["random z y"][0] - 0.05
            and mirrored["z y"][0] > 0.9
            and mirrored["z b"][0] < mirrored["random z b"][0] - 0.05,
            f"where views share only b, z tells b with accuracy {without['z b'][0]:.2f} and y with "
            f"{without['z y'][0]:.2f} (untrained {without['random z b'][0]:.2f} and {without['random z y'][0]:.2f}); "
            f"where they share only s, y {mirrored['z y'][0]:.2f} and b {mirrored['z b'][0]:.2f}; holds means above "
            "0.9 and at least 0.05 below untrained",
        ),
        Finding(
            "T5: I(z; y) goes to 0 where views share only b",
            end["z y"][0] < CHANCE + 0.05,
            f"the probe still reads y from z with {pair(without['z y'])}{after} and from h "
            f"with {without['h y'][0]:.3f}, chance is {CHANCE:.3f}: training no longer rewards y, and erases "
            "it slowly; holds means within 0.05 of chance",
        ),
    ]
    if some:
        least = signal[some[0]]
        out.append(
            Finding(
                "T5: z contains a factor as soon as views keep it with any probability (closed form)",
                least["z y"][0] > 0.9,
                f"with s kept with probability {some[0]:g} y is read from z with {least['z y'][0]:.2f}, the closed "
                f"form says 1: views share {_closed(((some[0],), (1,))).signal_views:.2f} nats of s beside "
                f"{_closed(((some[0],), (1,))).background_views:.2f} of b, and a finite run learns what pays more; "
                + ", ".join(f"{signal[k]['z y'][0]:.2f} at {k:g}" for k in [*some[1:], 1.0])
                + "; holds means above 0.9",
            )
        )
    return out


def _federated(found: Mapping[tuple[str, str], Measured]) -> list[Finding]:
    out = []
    for name in dict.fromkeys(name for name, _ in found):
        here = {way: found[name, way] for way in WAYS}
        said = "; ".join(f"{way}: y {pair(m['z y'], 2)}, b {pair(m['z b'], 2)}" for way, m in here.items())
        apart, alike = here["a site a client"], here["IID clients"]
        gap = {f: apart[f"z {f}"][0] - alike[f"z {f}"][0] for f in "yb"}
        out += [
            Finding(
                f"T5 federated: z contains what any site keeps ({name})",
                all(apart[f"z {f}"][0] > apart[f"random z {f}"][0] + 0.1 for f in "yb"),
                f"accuracies from z are {said}; untrained y {apart['random z y'][0]:.2f}, b "
                f"{apart['random z b'][0]:.2f}; holds means that z of merged clients tells both 0.1 better",
            ),
            Finding(
                f"T5 federated: clients of one augmentation each lose nothing against mixed clients ({name})",
                min(gap.values()) > -0.05,
                f"the difference is {gap['y']:+.3f} for y and {gap['b']:+.3f} for b; holds means above -0.05",
            ),
        ]
    return out
