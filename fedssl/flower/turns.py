"""Turns that are not a whole round from the present model: what their client is told, what their update becomes."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedssl import tree
from fedssl.flower import codec
from fedssl.participation.base import Attendance, Turn
from fedssl.parts import Arrays, part_of


@dataclass
class History:
    """The server's models: the present one, earlier ones that turns may still begin with, and who made them."""

    models: dict[int, Arrays] = field(default_factory=dict)  # by the round after which it was there; 0: the initial one
    merges: list[int] = field(default_factory=list)  # the rounds that changed the model, ascending

    def add(self, at: int, model: Arrays, max_staleness: int) -> None:
        """Add the model after round `at`, and forget those that no later turn can have begun with."""
        self.models[at] = model
        for old in [round for round in self.models if round < at - max_staleness]:
            del self.models[old]

    def made(self, at: int) -> int:
        """The round that made the model after round `at`: that one, or an earlier one if it was skipped; 0: none."""
        count = bisect_right(self.merges, at)
        return self.merges[count - 1] if count else 0


def instruct(message: Message, turn: Turn, at: int, history: History) -> None:
    """Tell a client which share of its steps it does, and give it the model that its turn began with.

    Whole turns from the present model keep the strategy's own message, which their clients share.
    """
    if not turn.staleness(at) and turn.work == 1:
        return
    content = dict(message.content)
    told = {"begun": turn.start + 1, "work": turn.work, "made": history.made(turn.start)}
    content[codec.CONFIG] = ConfigRecord({**codec.config_of(message.content), **told})
    if turn.staleness(at):
        content[codec.ARRAYS] = codec.encode(history.models[turn.start])
    message.content = RecordDict(content)


def rebase(trained: Arrays, start: Arrays, now: Arrays, scale: float) -> Arrays:
    """now + scale * (trained - start): what a client learnt, applied to the present model.

    In float64, rounded once to the type of `now`; integers to the nearest. An array that is not in `trained` is not
    in the result.
    """
    moved = {
        key: now[key].astype(np.float64) + scale * (value.astype(np.float64) - start[key].astype(np.float64))
        for key, value in trained.items()
    }
    return tree.like(moved, now)


def catch_up(
    replies: Iterable[Message],
    turns: Mapping[int, Turn],
    at: int,
    history: History,
    scale: Callable[[int], float],
    summaries: Collection[str],
    moved: Callable[[int, Arrays], None],
) -> Iterator[Message]:
    """Replies as the strategy merges them: values relative to the present model, whichever one they began with.

    Args:
        replies: to the instructions of round `at`.
        turns: by node id.
        at: the round.
        history: with the present model (after round `at` - 1) and those that the turns began with.
        scale: by staleness; see `Participation.scale`.
        summaries: parts that say something of the client's data: they are no change of what they were before.
        moved: called with the client and the arrays that the strategy will see, where they are not what it sent.
    """
    now = history.models[at - 1]
    for reply in replies:
        turn = turns[reply.metadata.src_node_id]
        factor = scale(turn.staleness(at))
        if turn.staleness(at) or factor != 1:
            sent = codec.decode(codec.arrays_of(reply.content))
            weights = {key: value for key, value in sent.items() if part_of(key) not in summaries}
            seen = sent | rebase(weights, history.models[turn.start], now, factor)
            reply.content[codec.ARRAYS] = codec.encode(seen)
            moved(turn.client, seen)
        yield reply


def summary(attendance: Attendance, at: int, asynchronous: bool) -> dict[str, float]:
    """What a round's row says of its turns: how many were lost and why, how old the others, how long it took."""
    row: dict[str, float] = dict(Counter(turn.lost for turn in attendance.turns if turn.lost))
    ages = [turn.staleness(at) for turn in attendance.arriving]
    if asynchronous and ages:
        row["staleness"] = sum(ages) / len(ages)
    if attendance.seconds is not None:
        row["simulated_seconds"] = attendance.seconds
    return row
