"""A client's accounts: what its turn costs of the privacy of its examples and of itself, paid before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flwr.app import Context

from fedssl.edge.allowance import Allowance
from fedssl.flower.aggregation import clients
from fedssl.flower.client.instruction import Instruction
from fedssl.flower.codec import ClientState, step_seconds
from fedssl.gradient import GradientTransform
from fedssl.job import Job
from fedssl.privacy.record_dp import Planned
from fedssl.privacy.spending import Spending, agree, pay, pay_turn


@dataclass(frozen=True)
class Account:
    """What has been settled before a client trains.

    Attributes:
        gradient: planned for this client.
        paid: the ledger of its examples from now on, and the work that could be paid.
        own: the client's own ledger, where it adds the noise to its update itself.
        allowance: for a clock that ends the round; None: there is no limit, or the steps have been chosen by it.
    """

    gradient: GradientTransform
    paid: Spending
    own: str
    allowance: Allowance | None


def settle(
    asked: Instruction,
    client: int,
    examples: int,
    state: ClientState,
    work: float,
    allowance: Allowance | None,
    context: Context,
) -> Account:
    """Plan a turn, agree to it, and pay for it; what is paid is in the context before a step is taken.

    Args:
        asked: for the turn.
        client: which one this is.
        examples: how many it has.
        state: as it is before the turn.
        work: the share of the steps that it would take.
        allowance: the seconds that it may take.
        context: of its node.

    Raises:
        PrivacyError: the node's owner demands more protection, or the turn has been paid before.
    """
    job, turn = asked.job, (asked.at, asked.attempt)
    gradient = job.privacy.planned(examples, job.local.batch_size, job.local.epochs, _rounds(job, client))
    agree(gradient, context.node_config, job.aggregation, job.planned, clients.lost(asked.config))
    if allowance is not None and isinstance(gradient, Planned):  # what is paid for is chosen before, not by the clock
        work, allowance = min(work, allowance.share(gradient.steps, step_seconds(context))), None
    lost = _lost(asked, client)
    paid = pay(gradient, state.ledger, *turn, work, lost)
    told = clients.told(asked.config)
    own = pay_turn(job.aggregation, job.planned, state.own, turn, lost, told, context.node_config)
    ledger = paid.ledger.text()
    if (ledger, own) != (state.ledger, state.own):
        replace(state, ledger=ledger, own=own).save(context)
    return Account(gradient, paid, own, allowance)


def _rounds(job: Job, client: int) -> float:
    """How many rounds a private client has to plan for; all of them where it does not know which cohorts it is in."""
    if not job.privacy.private:
        return 0.0
    return job.federation.rounds if job.aggregation.secret_cohorts else job.rounds_of(client)


def _lost(asked: Instruction, client: int) -> dict[tuple[int, int], float]:
    """By round and attempt: the share of a round that this client was asked for in what a kill has lost.

    Where cohorts are secret it does not know which of them it was in, and counts all.
    """
    job, lost = asked.job, clients.lost(asked.config)
    if job.aggregation.secret_cohorts:
        return dict.fromkeys(lost, 1.0)
    turns = [(at, attempt, turn) for at, attempt in lost for turn in job.attendance(at).turns]
    return {(at, attempt): turn.work for at, attempt, turn in turns if turn.client == client}
