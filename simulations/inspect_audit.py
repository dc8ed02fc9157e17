"""`fedssl audit RUN`: membership inference and canaries against a finished run, held against what it claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedssl.errors import ConfigError
from fedssl.privacy.audit.attacks import CONFIDENCE, Attack, Finding, attacks, finding, paired_bound
from fedssl.privacy.audit.roc import curve, p_value
from fedssl.report.charts import Line, Panel, chart
from fedssl.report.figures import save
from fedssl.rundir import RunDirectory
from simulations.audits import canaries, inversion_demo, shadow_runs
from simulations.audits.target import Claim, Run
from simulations.words import read

_POINTS = 200  # of a curve that is drawn
_UNLIKE = 0.001  # p-value below which members and others are not alike
USAGE = "fedssl audit runs/NAME [--examples 1000] [--seed 0] [--shadows 8] [--inversion 2]"


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    run: Path
    examples: int = 1000
    seed: int = 0
    shadows: int = 0
    inversion: int = 0

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Options:
        """Read the words after `fedssl audit`.

        Raises:
            ConfigError: not exactly one run, or an unknown or bad option.
        """
        words = read(arguments, ("examples", "seed", "shadows", "inversion"), USAGE)
        if len(words.rest) != 1:
            raise ConfigError(f"audit takes exactly one run directory and its options: {USAGE}")
        numbers = {name: words.whole(name, getattr(cls, name)) for name in words.values}
        if numbers["examples"] < 8:
            raise ConfigError(f"--examples {numbers['examples']} is too few to attack: give at least 8, better 1000")
        return cls(Path(words.rest[0]), **numbers)


@dataclass(frozen=True)
class Verdict:
    """A lower bound held against the claim that it is about."""

    name: str
    epsilon: float
    claim: Claim

    @property
    def contradicts(self) -> bool:
        """Whether the bound is above the claim."""
        return self.claim.contradicted_by(self.epsilon)


@dataclass(frozen=True)
class Outcome:
    """All that an audit found."""

    found: Sequence[Finding]
    scores: Mapping[str, tuple[Any, Any]]  # of the attacks: members' and others'
    verdicts: Sequence[Verdict]  # of every attack on each claim
    direct: Sequence[Verdict]  # those of canaries, which read no model
    estimates: Mapping[str, float]  # of epsilon, by canaries: no bounds
    control: Finding  # EncoderMI-V on the untrained model
    alike: bool  # whether members and others look alike to a model that knows nothing

    @property
    def contradicted(self) -> bool:
        """Whether any bound is above its claim."""
        return any(verdict.contradicts for verdict in self.verdicts)


def main(arguments: Sequence[str]) -> int:
    """Audit a run; writes audit.json and figures/audit into it, and prints the table.

    Returns:
        1 where a lower bound contradicts what the run claims, else 0.

    Raises:
        ConfigError: bad options, or a run that cannot be audited.
        ResumeError: no run, or one that has not ended.
    """
    options = Options.of(arguments)
    target = Run(RunDirectory(options.run), options.examples, options.seed)
    outcome = audit(target, options)
    out: dict[str, Any] = {
        "claims": [asdict(claim) for claim in target.claims],
        "confidence": CONFIDENCE,
        "attacks": [asdict(each) for each in outcome.found],
        "bounds": [{**asdict(verdict), "contradicts": verdict.contradicts} for verdict in outcome.verdicts],
        "estimates": dict(outcome.estimates),
        "control": {**asdict(outcome.control), "alike": outcome.alike},
        "contradicted": outcome.contradicted,
    }
    if options.inversion:
        shown = inversion_demo.demonstrate(target, options.inversion)
        out["inversion"] = {
            "batch": options.inversion,
            "similarity": shown.similarity,
            "psnr_db": shown.psnr,
            "psnr_random_db": shown.psnr_random,
        }
    target.rundir.write("audit.json", out)
    save(_figure(outcome.scores), target.rundir.path / "figures" / "audit")
    _show(target, outcome, out.get("inversion"))
    return int(outcome.contradicted)


def audit(target: Run, options: Options) -> Outcome:
    """Try every attack that the run allows; all lower bounds hold together at `CONFIDENCE`."""
    shadows = shadow_runs.train(target, options.shadows) if options.shadows else []
    own = target.statistics()
    tried = list(attacks(*own, seed=options.seed))
    untrained = list(attacks(*target.untrained(), seed=options.seed))
    alike = min(p_value(each.members, each.others) for each in untrained) >= _UNLIKE
    on_shadows, game = None, None
    if shadows:
        on_run, on_shadows, game = shadow_runs.attack(target, shadows, own)
        tried.append(on_run)
    played = list(canaries.games(target))
    claims = [] if game is None else game.claims
    joint = 1 - (1 - CONFIDENCE) / (len(tried) * len(target.claims) + len(claims) + len(played))

    def paired(attack: Attack, claim: Claim) -> float:
        rule: dict[str, Any] = {"delta": claim.delta, "confidence": joint, "classes": target.classes}
        return paired_bound(attack, **rule, seed=options.seed, replaced=not claim.replaced) if alike else 0.0

    verdicts = [Verdict(each.name, paired(each, claim), claim) for claim in target.claims for each in tried]
    found = [finding(each, verdict.epsilon, seed=options.seed) for each, verdict in zip(tried, verdicts, strict=False)]
    if game is not None and on_shadows is not None:
        judged = [Verdict(on_shadows.name, game.bound(claim, joint), game.judged(claim)) for claim in claims]
        found.append(finding(on_shadows, judged[0].epsilon, seed=options.seed))
        verdicts += judged
    direct = [Verdict(each.name, each.bound(target, joint), each.claim) for each in played]
    estimates = {each.name: value for each in played if (value := each.estimate(target)) is not None}
    scores = {each.name: (each.members, each.others) for each in (*tried, on_shadows) if each is not None}
    control = finding(next(each for each in untrained if each.name == "EncoderMI-V"), 0.0, seed=options.seed)
    return Outcome(found, scores, [*verdicts, *direct], direct, estimates, control, alike)


def _figure(scores: Mapping[str, tuple[Any, Any]]) -> Any:
    lines = {name: _line(*groups) for name, groups in scores.items()}
    low = min(1 / max(len(members), len(others)) for members, others in scores.values())
    chance = np.geomspace(low, 1, 20)
    lines["chance"] = Line(chance.tolist(), chance.tolist())
    return chart([Panel("false-positive rate", "true-positive rate", lines, log_x=True, log_y=True)])


def _line(members: Any, others: Any) -> Line:
    """The part of a curve that logarithmic axes can show, in few points."""
    fpr, tpr = curve(members, others)
    shown = np.flatnonzero((fpr > 0) & (tpr > 0))
    places = np.unique(np.searchsorted(fpr[shown], np.geomspace(fpr[shown[0]], 1, _POINTS)).clip(0, len(shown) - 1))
    return Line(fpr[shown][places].tolist(), tpr[shown][places].tolist())


def _show(target: Run, outcome: Outcome, inversion: Any) -> None:
    print(f"{'attack':28}{'AUC':>7}{'':14}{'TPR at 1 %':>12}{'at 0.1 %':>10}{'epsilon >=':>12}")
    found = outcome.found
    for each in found:
        print(f"{_row(each)}{each.epsilon:12.2f}")
    for verdict in outcome.direct:
        print(f"{verdict.name:71}{verdict.epsilon:12.2f}")
    print(_row(replace(outcome.control, name="control: untrained encoder")))
    print(f"{found[0].members} members, {found[0].others} others; intervals and bounds at 95 %; unit: one record")
    if not outcome.alike:
        print(
            "members and others differ under an untrained encoder already, so they were not divided at random: "
            "areas and rates say nothing of membership, and bounds from pairs are left out"
        )
    for name, value in outcome.estimates.items():
        print(f"{name}: the final model alone tells an estimated epsilon of {value:.2f}, which is no bound")
    if inversion:
        print(
            f"gradient inversion of {inversion['batch']} examples: {inversion['psnr_db']:.1f} dB to the records, "
            f"{inversion['psnr_random_db']:.1f} dB to others (a demonstration, no bound)"
        )
    for verdict in outcome.verdicts:
        if verdict.contradicts:
            print(
                f"CONTRADICTED: {verdict.name} shows epsilon >= {verdict.epsilon:.2f}, "
                f"the claim is {verdict.claim.epsilon:.2f} at delta={verdict.claim.delta:g} "
                f"for one {verdict.claim.unit}"
            )
    for claim in target.claims:
        if claim.epsilon is None:
            print("the run claims no epsilon, so nothing can be contradicted")
        elif not any(verdict.contradicts for verdict in outcome.verdicts if verdict.claim == claim):
            about = f"epsilon={claim.epsilon:.2f} at delta={claim.delta:g} for one {claim.unit}"
            print(f"no attack contradicts {about}; that is no proof of it")
    print(f"figure: {target.rundir.path / 'figures' / 'audit.png'}")


def _row(each: Finding) -> str:
    interval = f"[{each.auc.low:.3f}, {each.auc.high:.3f}]"
    rates = f"{100 * each.tpr_1.value:10.1f} %{100 * each.tpr_01.value:8.1f} %"
    return f"{each.name:28}{each.auc.value:7.3f} {interval:14}{rates:>21}"
