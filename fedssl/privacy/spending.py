"""Before a client trains: what this round will cost, whether it can be paid, and whether the device agrees at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedssl.errors import PrivacyError
from fedssl.gradient import GradientTransform
from fedssl.privacy.ledger import Ledger
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
    """
    ledger = Ledger.read(text)
    if not isinstance(gradient, Planned):
        return Spending(ledger, work, {})
    known = {(entry.round, entry.attempt) for entry in ledger.entries}
    for (round, earlier), share in lost.items():
        if (round, earlier) not in known and (count := gradient.steps_of(share)):
            ledger = ledger.spend(gradient.entry(round, earlier, count))
    wanted = count = gradient.steps_of(work)
    entry = gradient.entry(at, attempt, wanted)
    budget, spent = gradient.mechanism.epsilon, sum(e.count for e in ledger.entries)
    if budget is not None and spent + wanted > gradient.planned_steps:  # what was planned was found to fit
        count = ledger.affordable(entry, budget, gradient.mechanism.delta)
    if count:
        ledger = ledger.spend(replace(entry, count=count))
    public = {
        "noise_multiplier": gradient.noise_multiplier,
        "sample_rate": gradient.sample_rate,
        "spent": spent + count,
    }
    return Spending(ledger, work if count == wanted else count / gradient.steps, public)


def agree(gradient: GradientTransform, floor: Mapping[str, object]) -> None:
    """Refuse a job that protects less than the owner of a device demands.

    Args:
        gradient: planned for this client.
        floor: the node's own configuration. `max-epsilon` and `max-delta` are the most that a job may spend;
            `secure-noise` demands noise that does not follow from a seed.

    Raises:
        PrivacyError: for the first demand that is not met, before anything is read or sent.
    """
    highest, delta, secure = (floor.get(key) for key in ("max-epsilon", "max-delta", "secure-noise"))
    if highest is None and delta is None and not secure:
        return
    if not isinstance(gradient, Planned):
        raise PrivacyError(
            "this node takes part in private training only and the job claims no record-level privacy: run it with "
            "privacy=example, or do without this node"
        )
    claimed = gradient.mechanism
    if highest is not None and (claimed.epsilon is None or claimed.epsilon > float(str(highest))):
        raise PrivacyError(
            f"this node allows epsilon {highest} and the job asks for {claimed.epsilon}: set "
            f"privacy.epsilon={highest}, or do without this node"
        )
    if delta is not None and claimed.delta > float(str(delta)):
        raise PrivacyError(
            f"this node allows delta {delta} and the job asks for {claimed.delta}: set privacy.delta={delta}, or do "
            "without this node"
        )
    if secure and not claimed.secure:
        raise PrivacyError(
            "this node wants noise from its own operating system and the job's follows from a seed: set "
            "privacy.secure=true, or do without this node"
        )
