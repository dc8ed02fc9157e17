"""What a server tells its clients of what they keep between rounds, so that nothing is forgotten unnoticed."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from fedssl.aggregation.base import OwnAccount
from fedssl.errors import ResumeError
from fedssl.flower import codec
from fedssl.flower.deploy.roster import Roster
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.run.running import Running
from fedssl.parts import Share


def told(run: Running, at: int) -> dict[str, str | int]:
    """What an instruction says of where state is kept, and what will not be asked for again."""
    checkpoint = (at - 1) // run.job.checkpoint_every * run.job.checkpoint_every
    if run.state_dir is not None:
        return {"state-dir": str(run.state_dir), "checkpoint": checkpoint}
    return {} if isinstance(run.grid, InProcessGrid) else {"run": run.rundir.identity(), "checkpoint": checkpoint}


def remind(run: Running, message: Message, client: int) -> None:
    """Tell a client when it took part last, so that it notices if it has forgotten that."""
    last = run.last.get(client, 0)
    if last and isinstance(run.nodes, Roster) and run.state_dir is None and _stateful(run):
        told = {"last": last if run.aggregation.each else 1}  # the others' rows do not tell whether they took a step
        content = dict(message.content)
        content[codec.CONFIG] = ConfigRecord({**codec.config_of(message.content), **told})
        message.content = RecordDict(content)


def check(run: Running) -> None:
    """Refuse to go on with clients that keep something and have forgotten it.

    Raises:
        ResumeError: there is one.
    """
    forgetful = sorted(run.nodes.forgetful & run.last.keys()) if isinstance(run.nodes, Roster) else []
    if forgetful and _stateful(run):
        raise ResumeError(
            f"this run keeps state on its clients, and the node of client {forgetful[0]} has forgotten it: give "
            "nodes a state-dir in their --node-config before a run begins, and start this one anew under another name"
        )


def _stateful(run: Running) -> bool:
    own = isinstance(run.job.aggregation, OwnAccount)
    private = run.job.privacy.private or own
    if not run.aggregation.each:
        return private
    return Share.local in run.shares.values() or run.job.compression.remembers or private
