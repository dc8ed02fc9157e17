"""From measured rows to alarms that say what failed, why most likely, and what to do. Thresholds: docs/collapse.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from fedssl.files import number

Row = Mapping[str, Any]
Parts = Mapping[str, Row]  # part -> its row of a round

GAUGE = 0.08  # feature_std * sqrt(D): complete collapse below
SPREAD = -0.025  # uniformity: complete collapse above; for a small spread it is -4 D std^2, so it is the same limit
USED = 0.05  # rank over dimensions: dimensional collapse below
FALL = 0.25  # rank over its highest since before training: dimensional collapse below
RISE = 1.1  # rank over that at the round's start: a part whose rank rises more is not collapsing, however low it is
MERGE = 0.5, 0.75  # rank of the merged over the median client's: merging hurts below, once, or twice in a row
LOCAL = 0.8  # rank of the median client over that of the model it started from, and ..
APART = 0.7  # .. linear CKA between clients: skew hurts where both are below, twice in a row, and ..
SKEW = 0.97  # .. uniformity within clients' examples over that across: 1 for IID clients, less under skew
SCALE = 0.01  # how far the weights of a merge may add up outside of what a mean could give
STEP = 0.5  # share of its distance that a teacher may cover in a step
STILL = 0.01  # movement of a predictor over that of its projector: idle below
SAME = 0.995  # likeness of a predictor's output to its input: idle above


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong in one part of the model."""

    name: str
    part: str
    round: int  # in which it was first seen
    last: int  # in which it was last seen
    found: str  # a sentence
    cause: str
    remedy: str

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"alarm in round {self.round}: {self.name} ({self.part}): {self.found} {self.cause} {self.remedy}"


@dataclass(frozen=True)
class Round:
    """The rows of one measured round."""

    merged: Parts
    clients: Sequence[Parts]
    peak: Mapping[str, float]  # the highest rank of each merged part so far, before training included
    previous: Round | None  # that was measured

    def rank(self, part: str) -> float | None:
        """Of the merged part; None too where some of its arrays stay at home, so that merged it is nobody's model."""
        if self.merged.get(part, {}).get("partial"):
            return None
        return number(self.merged.get(part, {}).get("rankme"))

    def client_rank(self, part: str) -> float | None:
        """Of the median client's part, after training and before the merge."""
        ranks = self.client_ranks(part)
        return median(ranks) if ranks else None

    def rising(self, part: str) -> bool:
        """Whether the round has raised the rank of the merged part, as that of an untrained network."""
        rank, before = self.rank(part), number(self.merged.get(part, {}).get("rankme_before"))
        return rank is not None and before is not None and rank > RISE * before

    def merge_ratio(self, part: str) -> float:
        """The rank of the merged part over that of the median client's; 1 where one of them was not measured."""
        rank, clients = self.rank(part), self.client_rank(part)
        return rank / clients if rank is not None and clients is not None else 1.0

    def local_ratio(self) -> float:
        """The rank of the median client's encoder over that of the model it started from; 1 if not measured."""
        row, clients = self.merged.get("encoder", {}), self.client_rank("encoder")
        before = None if row.get("partial") else number(row.get("rankme_before"))
        return clients / before if before and clients is not None else 1.0

    def likeness(self) -> float:
        """Linear CKA between the clients' encoders; 1 if not measured."""
        found = number(self.merged.get("encoder", {}).get("cka_clients"))
        return 1.0 if found is None else found

    def skewed(self) -> bool:
        """Whether examples of one client are more alike to the merged encoder than those of two: no label is needed."""
        row = self.merged.get("encoder", {})
        within, across = number(row.get("uniformity_intra")), number(row.get("uniformity_inter"))
        return within is not None and across is not None and within > SKEW * across  # both are below 0

    def client_ranks(self, part: str) -> list[float]:
        """Of each client's part that was measured."""
        return [rank for parts in self.clients if (rank := number(parts.get(part, {}).get("rankme"))) is not None]


REMEDIES: Mapping[str, tuple[str, str]] = {  # name -> likely cause, remedy
    "divergence": (
        "Likely cause: steps that are too large, or a server's optimiser that pushed a variance of batch norm below 0.",
        "Lower local.lr, set local.clip_norm, or use norm=group with such a strategy.",
    ),
    "complete collapse": (
        "Likely cause: nothing in the loss keeps features apart, or training has hardly begun.",
        "Use a contrastive or decorrelating method, lower local.lr, or train for more rounds.",
    ),
    "dimensional collapse": (
        "Likely cause: a temperature or an augmentation for which few directions suffice, or skewed clients whose "
        "features each need few.",
        "Set local.decorrelation=0.1, use larger batches or fewer local epochs, or a method that decorrelates (VICReg, "
        "Barlow Twins).",
    ),
    "merge hurts": (
        "Likely cause: clients went too far apart in this round for their mean to make sense.",
        "Use fewer local epochs or a lower local.lr, more clients a round, or a strategy that keeps clients close.",
    ),
    "skew hurts": (
        "Likely cause: local training fits features to what each client has, and forgets the rest.",
        "Use fewer local epochs or a lower local.lr, set local.decorrelation=0.1, or keep parts at home "
        "(strategy.share.predictor=local).",
    ),
    "weights do not add up to 1": (
        "Likely cause: the strategy forgets a weight or a client, or scales what it merges; repeated, the weights "
        "vanish or blow up.",
        "Check the strategy's merge: a mean of equal clients must give that client back.",
    ),
    "teacher is the student": (
        "Likely cause: a decay of 0, or one module used as both.",
        "Set method.decay=0.99, and build the teacher as a copy (fedssl.model.frozen).",
    ),
    "teacher moves too fast": (
        "Likely cause: decay and 1 - decay are swapped.",
        "method.decay is the share of itself that a teacher keeps: use 0.99 or more.",
    ),
    "predictor idle": (
        "Likely cause: it is frozen, or its learning rate is close to 0; without a predictor that works, a method "
        "without negatives collapses.",
        "Let the predictor train, with a learning rate at least that of the projector.",
    ),
}
SUSPECTS: tuple[tuple[str, Any, str], ...] = (  # option of the method, its value, what it means; for both collapses
    ("stop_gradient", False, "method.stop_gradient=false lets both views meet in one point"),
    ("predictor", False, "method.predictor=false leaves nothing between student and target"),
    ("variance", 0.0, "method.variance=0 takes away what keeps VICReg's features apart"),
    ("center", "none", "method.center=none lets one prototype win everywhere"),
)
COLLAPSES = ("complete collapse", "dimensional collapse")
_MEASURED = ("encoder", "projector")  # a predictor may have a bottleneck, so its rank tells little


def judge(rows: Sequence[Row], method: Mapping[str, Any]) -> list[Alarm]:
    """All alarms of a run, in the order in which they were first raised.

    Args:
        rows: of `collapse.jsonl`, from the first round on; None stands for numbers that are not finite.
        method: the options of the method, which may explain a collapse.
    """
    raised: dict[tuple[str, str], Alarm] = {}
    for at, seen in rounds(rows):
        for name, part, found in findings(seen):
            if (name, part) in raised:
                raised[name, part] = replace(raised[name, part], last=at)
                continue
            cause, remedy = REMEDIES[name]
            if name in COLLAPSES:
                cause = _cause([alarm.name for alarm in raised.values()], method) or cause
            raised[name, part] = Alarm(name, part, at, at, found, cause, remedy)
    return list(raised.values())


def at_end(rows: Sequence[Row], method: Mapping[str, Any], final: Row, last: int, dim: int | None) -> list[Alarm]:
    """`judge`, with what the encoder was measured to be when the run ended, in case its last round was not measured.

    Args:
        rows, method: see `judge`.
        final: numbers of the merged encoder.
        last: the run's last round.
        dim: of the features.
    """
    if any(row["round"] == last for row in rows):
        return judge(rows, method)
    keys = ("feature_std", "uniformity", "rankme", "examples")
    row = {key: final[key] for key in keys if key in final} | ({"dim": dim} if dim else {})
    return judge([*rows, {"round": last, "client": "merged", "part": "encoder", **row}], method)


def rounds(rows: Sequence[Row]) -> Iterator[tuple[int, Round]]:
    """The rows round by round."""
    grouped: dict[int, dict[Any, dict[str, Row]]] = {}
    for row in rows:
        grouped.setdefault(row["round"], {}).setdefault(row["client"], {})[row["part"]] = row
    peak: dict[str, float] = {}
    previous = None
    for at, models in sorted(grouped.items()):
        merged = models.pop("merged", {})
        for part, row in merged.items():
            found = [number(row.get(key)) or 0.0 for key in ("rankme", "rankme_before")]
            peak[part] = max(peak.get(part, 0.0), *found)
        seen = Round(merged, [models[client] for client in sorted(models)], dict(peak), previous)
        previous = replace(seen, previous=None)
        yield at, seen


def findings(seen: Round) -> Iterator[tuple[str, str, str]]:
    """(name, part, sentence) of everything that is wrong in a round."""
    for rule in (_collapse, _merge, _skew, _scale, _teacher, _predictor):
        yield from rule(seen)


def features(row: Row) -> tuple[str, str] | None:
    """(name, sentence) of a collapse that one part's numbers show, the worst first.

    Args:
        row: feature_std, uniformity and rankme, as far as they were measured; dim and examples, the rows behind them.
    """
    if any(key in row and number(row[key]) is None for key in ("feature_std", "uniformity", "rankme")):
        return "divergence", "its outputs are not finite numbers."
    std, spread, rank, dim = (number(row.get(key)) for key in ("feature_std", "uniformity", "rankme", "dim"))
    if std is not None and dim and (gauge := std * math.sqrt(dim)) < GAUGE:
        return "complete collapse", f"nearly all examples get the same features, spread {gauge:.2g} of 1."
    if spread is not None and spread > SPREAD:
        return "complete collapse", f"nearly all examples get the same features, uniformity {spread:.2g} of -4."
    if rank is not None and dim and rank < USED * (most := min(dim, number(row.get("examples")) or dim)):
        return "dimensional collapse", f"about {rank:.1f} of {most:.0f} directions are in use."
    return None


def _collapse(seen: Round) -> Iterator[tuple[str, str, str]]:
    for part in _MEASURED:
        row = seen.merged.get(part, {})
        if row.get("partial") or seen.rising(part):
            continue
        if (found := features(row)) is not None:
            yield found[0], part, found[1]
        elif (rank := seen.rank(part)) is not None and rank < FALL * (peak := seen.peak[part]):
            yield "dimensional collapse", part, f"the rank has fallen from {peak:.1f} to {rank:.1f}."


def _merge(seen: Round) -> Iterator[tuple[str, str, str]]:
    for part in _MEASURED:
        ratio, rank, clients = seen.merge_ratio(part), seen.rank(part), seen.client_rank(part)
        again = seen.previous is not None and seen.previous.merge_ratio(part) < MERGE[1]
        if ratio < MERGE[0] or (ratio < MERGE[1] and again):
            yield "merge hurts", part, f"merging took the rank from {clients:.1f} (median client) to {rank:.1f}."


def _skew(seen: Round) -> Iterator[tuple[str, str, str]]:
    twice = all(r is not None and r.local_ratio() < LOCAL and r.likeness() < APART for r in (seen, seen.previous))
    if twice and seen.skewed():
        change = f"local training took the rank to {100 * seen.local_ratio():.0f} % of what it was (median client)"
        yield "skew hurts", "encoder", f"{change}, and clients grow unlike each other (CKA {seen.likeness():.2f})."


def _scale(seen: Round) -> Iterator[tuple[str, str, str]]:
    for part, row in seen.merged.items():
        scale, low, high = (number(row.get(key)) for key in ("merge_scale", "scale_low", "scale_high"))
        if scale is not None and low is not None and high is not None and not low - SCALE < scale < high + SCALE:
            yield "weights do not add up to 1", part, f"the clients' weights add up to {scale:.3f}."


def _teacher(seen: Round) -> Iterator[tuple[str, str, str]]:
    row = seen.merged.get("teacher", {})
    gap, step = number(row.get("gap")), number(row.get("step"))
    moved = number(seen.merged.get("encoder", {}).get("moved")) or 0.0
    if gap == 0 and moved > 0:
        yield "teacher is the student", "teacher", "after training both have exactly the same weights."
    elif step is not None and step > STEP:
        yield (
            "teacher moves too fast",
            "teacher",
            f"in one step it covers {100 * step:.0f} % of its way to the student.",
        )


def _predictor(seen: Round) -> Iterator[tuple[str, str, str]]:
    row = seen.merged.get("predictor", {})
    moved, pace = (number(parts.get("moved")) for parts in (row, seen.merged.get("projector", {})))
    identity = number(row.get("identity"))
    if moved is not None and pace and moved < STILL * pace:
        yield "predictor idle", "predictor", f"it moved {moved:.1g} of its length in a round, the projector {pace:.1g}."
    elif identity is not None and identity > SAME:
        yield "predictor idle", "predictor", f"it passes on what it gets (likeness {identity:.2f} of 1)."


def _cause(before: Sequence[str], method: Mapping[str, Any]) -> str:
    """What explains a collapse better than the usual: an option of the method, or an alarm that was raised before."""
    said = [meaning for option, value, meaning in SUSPECTS if option in method and method[option] == value]
    said += [f"the {name} alarm came first" for name in dict.fromkeys(before) if name not in COLLAPSES]
    return f"Likely cause: {'; '.join(said)}." if said else ""
