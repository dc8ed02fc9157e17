"""Before a client trains: what this round will cost, whether it can be paid, and whether the device agrees at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedssl.aggregation.base import Answering, OwnAccount, Private, Told
from fedssl.aggregation.base import Planned as Schedule
from fedssl.aggregation.spending import planned, spend
from fedssl.errors import PrivacyError
from fedssl.gradient import GradientTransform
from fedssl.privacy.ledger import Entry, Ledger
from fedssl.privacy.record_dp import Planned


@dataclass(frozen=True)
class Spending:
    """What a round of a client costs, written down before it trains."""

    ledger: Ledger
    work: float  # share of the round's steps that can be paid, at most the share that was asked
    public: Mapping[str, float]  # for the server: what decides epsilon, none of it private


def pay(
    gradient: GradientTransform, text: str, at: int, attempt: int, work: float, lost: Mapping[tuple[int, int], float]
) -> Spending:
    """Pay for a round before its first step; the steps that the budget leaves no room for are not taken.

    Args:
        gradient: planned for this client.
        text: its ledger so far.
        at: the round.
        attempt: how often it has been begun, from 1.
        work: the share of its steps that the client is asked for.
        lost: by round and attempt, the shares of rounds that were begun and lost. They may have been seen, so they are
            paid in full, whatever the budget says.

    Raises:
        PrivacyError: this attempt has been paid: its noise is spent.
    """
    ledger = Ledger.read(text)
    if not isinstance(gradient, Planned):
        return Spending(ledger, work, {})
    _new(ledger, at, attempt)
    _same_number(ledger, gradient)
    known = {(entry.round, entry.attempt) for entry in ledger.entries}
    for (round, earlier), share in lost.items():
        if (round, earlier) not in known and (count := gradient.steps_of(share)):
            ledger = ledger.spend(gradient.entry(round, earlier, count))
    wanted = count = gradient.steps_of(work)
    entry = gradient.entry(at, attempt, wanted)
    budget, spent = gradient.mechanism.epsilon, sum(e.count for e in ledger.entries)
    alike = all(_kind(each) == _kind(entry) for each in ledger.entries)  # else another job has spent of it
    if budget is not None and not (alike and spent + wanted <= gradient.planned_steps):  # what was planned fits
        count = ledger.affordable(entry, budget, gradient.mechanism.delta)
    if count:
        ledger = ledger.spend(replace(entry, count=count))
    public = {
        "noise_multiplier": gradient.noise_multiplier,
        "sample_rate": gradient.sample_rate,
        "spent": spent + count,
    }
    return Spending(ledger, work if count == wanted else count / gradient.steps, public)


def pay_turn(
    aggregation: object,
    plan: Schedule,
    text: str,
    turn: tuple[int, int],
    lost: Iterable[tuple[int, int]],
    told: Told,
    floor: Mapping[str, object],
) -> str:
    """Pay for a turn of a client that adds the noise to its update itself, before it trains.

    Args:
        aggregation: of the job; one without accounts of its clients leaves the ledger as it is.
        plan: of the run.
        text: the client's own ledger so far.
        turn: the round and its attempt.
        lost: turns of this client that have begun and are lost. They may have been seen, so they are paid.
        told: by the server, to this client.
        floor: the node's own configuration; see `agree`.

    Returns:
        Its ledger from now on.

    Raises:
        PrivacyError: the server would have it take less noise, the same noise again, or spend more than the job or its
            node allows.
    """
    if not isinstance(aggregation, OwnAccount) or not isinstance(aggregation, Private):
        return text
    aggregation.assure(plan, told)
    ledger = Ledger.read(text)
    _new(ledger, *turn)
    for each in (*lost, turn):
        ledger = ledger.spend(aggregation.turn(plan, *each))
    (target, delta), allowed = aggregation.budget(plan), floor.get("max-epsilon")
    epsilon = ledger.epsilon(delta)
    limits = [value for value in (target, None if allowed is None else float(str(allowed))) if value is not None]
    if limits and epsilon > min(limits) * (1 + 1e-6):  # the target is met to about 1e-12
        raise PrivacyError(
            f"this turn would bring the client's own account to epsilon {epsilon:.3g} at delta={delta:g}, above "
            f"{min(limits):g}: it does not train; end the run here, or do without this client"
        )
    return ledger.text()


def _same_number(ledger: Ledger, gradient: Planned) -> None:
    """The noise was found for the rate at which one number of records is sampled."""
    rates = {entry.sample_rate for entry in ledger.entries}
    if gradient.mechanism.sample_rate is None and rates - {gradient.sample_rate}:
        raise PrivacyError(
            f"this client's number of records has changed to {gradient.n} since it began, and its noise was found for "
            "the number that it had: leave its data as it was until the run ends, or run with a privacy.sample_rate, "
            "which no number of records changes"
        )


def _kind(entry: Entry) -> tuple[float, float, bool]:
    """What decides how much each of an entry's releases costs."""
    return entry.noise_multiplier, entry.sample_rate, entry.concentrated


def _new(ledger: Ledger, at: int, attempt: int) -> None:
    if (at, attempt) in {(entry.round, entry.attempt) for entry in ledger.entries}:
        raise PrivacyError(
            f"round {at} asks this client a second time for attempt {attempt}, whose noise is spent: it does not "
            "send again what the same noise would hide; let the server number its attempts"
        )


@dataclass(frozen=True)
class _Offer:
    """What a job promises for one unit."""

    epsilon: float | None
    delta: float
    seeded: bool
    group: str  # of the options that decide it
    budget: str  # what to set for an epsilon


def agree(
    gradient: GradientTransform,
    floor: Mapping[str, object],
    aggregation: object = None,
    plan: Schedule | None = None,
    lost: Sequence[tuple[int, int]] = (),
) -> None:
    """Refuse a job that protects less than the owner of a device demands.

    Args:
        gradient: planned for this client.
        floor: the node's own configuration. `max-epsilon` and `max-delta` are the most that a job may spend, of records
            and of clients, whichever it claims; `secure-noise` demands noise that does not follow from a seed;
            `trust-server` lets the server see an update before it has noise.
        aggregation: of the job.
        plan: of the run; needed with an aggregation that claims something.
        lost: attempts of rounds that are lost, by round and attempt: they were repeated, and cost.

    Raises:
        PrivacyError: for the first demand that is not met, before anything is read or sent.
    """
    demands = [floor.get(key) for key in ("max-epsilon", "max-delta")]
    if demands == [None, None] and not floor.get("secure-noise"):
        return
    offers = []
    if isinstance(gradient, Planned):
        own = gradient.mechanism
        offers.append(_Offer(own.epsilon, own.delta, not own.secure, "privacy", "privacy.epsilon"))
    elif isinstance(aggregation, Private) and not (
        isinstance(aggregation, OwnAccount | Answering) or floor.get("trust-server")
    ):
        raise PrivacyError(
            "this node does not trust the server, which under this aggregation sees an update before it has noise: "
            "use aggregation=local_dp or secure_dp, add privacy=example, or start the node with trust-server=true"
        )
    if isinstance(aggregation, Private) and plan is not None:
        repeated = () if isinstance(aggregation, OwnAccount) else tuple(lost)  # own accounts count those themselves
        offers.append(_promised(aggregation, plan, repeated))  # type: ignore[arg-type]  # options are hashable
    if not offers:
        raise PrivacyError(
            "this node takes part in private training only and the job claims no privacy: run it with "
            "privacy=example, or do without this node"
        )
    for offer in offers:
        _check(offer, floor)


@lru_cache(maxsize=16)
def _promised(private: Private, plan: Schedule, lost: tuple[tuple[int, int], ...]) -> _Offer:
    """What an aggregation claims for the whole run: its budget, or what all rounds cost, repeated ones as well."""
    declared = private.declaration(plan)
    epsilon = declared.budget
    if epsilon is None:
        ledger = planned(private, plan)
        for at, attempt in lost:  # each was begun once more
            ledger = spend(private, plan, ledger, at, attempt + 1)
        epsilon = ledger.epsilon(declared.delta)
    words = "a larger aggregation.noise_multiplier for an epsilon"
    return _Offer(epsilon, declared.delta, declared.seeded, "aggregation", words)


def _check(offer: _Offer, floor: Mapping[str, object]) -> None:
    highest, delta, secure = (floor.get(key) for key in ("max-epsilon", "max-delta", "secure-noise"))
    if highest is not None and (offer.epsilon is None or offer.epsilon > float(str(highest)) * (1 + 1e-9)):
        asked = offer.epsilon if offer.epsilon is None else round(offer.epsilon, 4)
        way = f"{offer.budget}={highest}" if offer.group == "privacy" else f"{offer.budget} of {highest}"
        raise PrivacyError(
            f"this node allows epsilon {highest} and the job asks for {asked}: set {way}, or do without this node"
        )
    if delta is not None and offer.delta > float(str(delta)):
        raise PrivacyError(
            f"this node allows delta {delta} and the job asks for {offer.delta}: set {offer.group}.delta={delta}, or "
            "do without this node"
        )
    if secure and offer.seeded:
        raise PrivacyError(
            "this node wants noise from its own operating system and the job's follows from a seed: set "
            f"{offer.group}.secure=true, or do without this node"
        )
