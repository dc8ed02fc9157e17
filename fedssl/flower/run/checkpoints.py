"""From a run to a checkpoint and back: the model, the strategy, the aggregation, and the states of the clients."""

from __future__ import annotations

from typing import Any

from fedssl import tree
from fedssl.aggregation.base import Memory
from fedssl.flower import state_files, strategy_state
from fedssl.flower.deploy import reminders
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.run.running import Running
from fedssl.parts import Arrays
from fedssl.rundir import Checkpoint


def take(run: Running, strategy: Any, at: int, now: Arrays, clients: list[int]) -> None:
    """Make round `at` resumable.

    Args:
        run: what is resumed.
        strategy: with its state.
        at: the round.
        now: the merged arrays after it.
        clients: those that have taken part in it.
    """
    if isinstance(run.grid, InProcessGrid):
        state_files.take(run.grid, run.nodes, None if run.job.checkpoint_every > 1 else clients, run.rundir.clients)
    past = {version: model for version, model in run.history.models.items() if version != at}
    memory = run.aggregation.memory
    run.rundir.checkpoint(Checkpoint(at, now, strategy_state.take(strategy), past, (memory.arrays, memory.numbers)))
    if isinstance(run.grid, InProcessGrid) and run.rundir.clients.exists():
        state_files.prune(run.rundir.clients, clients, at)


def give(run: Running, strategy: Any, point: Checkpoint, now: Arrays, initial: Arrays) -> Arrays:
    """Put back what the server had at a checkpoint.

    Args:
        run: gets the history and the memory.
        strategy: gets its state.
        point: the checkpoint.
        now: the merged arrays; only their names and order are read, for Flower's FedAvgM counts on it.
        initial: all arrays, with their types.

    Returns:
        The merged arrays of the checkpoint.
    """
    saved = tree.like(point.arrays, initial)
    strategy_state.give(strategy, *point.strategy)
    run.aggregation.memory = Memory(*point.aggregation)
    run.history.models.update({at: tree.like(model, initial) for at, model in point.past.items()})
    return {key: saved[key] for key in now}


def give_clients(run: Running, done: int) -> None:
    """Give the clients of this process the states they had at the checkpoint of round `done`; look after the others'.

    Raises:
        ResumeError: a client elsewhere has forgotten what it kept.
    """
    if isinstance(run.grid, InProcessGrid):
        state_files.give(run.grid, run.nodes, run.rundir.clients, done)
        return
    rows = run.rundir.rows("clients.jsonl")
    run.last.update({int(row["client"]): int(row["round"]) for row in rows if row.get("steps", 1)})
    if done and run.state_dir is None:
        reminders.check(run)
