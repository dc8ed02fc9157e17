"""Who is asked in a round, and who should have been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedssl.flower.deploy.roster import Roster, present
from fedssl.flower.run.running import Running
from fedssl.participation.base import Attendance, Turn


@dataclass(frozen=True)
class Cohort:
    """The clients of a round.

    Attributes:
        at: the round.
        attendance: the turns that end in it; none where there are too few for it.
        needed: how many updates it needs.
        turns: by client, those whose update is awaited.
        absent: by client whose update would be awaited if it had a node, why it has none.
    """

    at: int
    attendance: Attendance
    needed: int
    turns: Mapping[int, Turn]
    absent: Mapping[int, str]

    @property
    def asked(self) -> Mapping[int, Turn]:
        """The turns whose clients are instructed: nobody's, if those without a node leave too few."""
        return self.turns if len(self.turns) >= self.needed or not self.absent else {}


def cohort_of(run: Running, at: int) -> Cohort:
    """The clients of round `at`; nodes that are not there are waited for."""
    attendance = run.aggregation.attendance(at)
    needed = run.job.federation.needed(len(attendance.turns))
    if len(attendance.turns) < needed:
        attendance = Attendance(())
    turns = {turn.client: turn for turn in attendance.arriving}
    absent = _absent(run, turns)
    there = {client: turn for client, turn in turns.items() if client not in absent}
    return Cohort(at, attendance, needed, there, absent)


def _absent(run: Running, turns: Mapping[int, Turn]) -> dict[int, str]:
    """The clients of these turns that have no node now, and why; too few are waited for as long as for replies."""
    if not (turns and isinstance(run.nodes, Roster)):
        return {}
    federation = run.job.federation
    there = present(run.nodes, turns, federation.enough(len(turns)), federation.timeout_s)
    return {client: run.nodes.why(client) for client in turns if client not in there}
