"""The Contexts of the nodes of this process: in memory, and above a limit those unused for longest on disk."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context

from fedssl.flower import state_files
from fedssl.flower.codec import ClientState, LazyArray

_OVERHEAD = 2048  # bytes of a Context without arrays


class States:
    """What clients keep between rounds. Only the thread that hands out and takes back Contexts calls this.

    What is on disk is what the checkpoints have, or has been written since in the same form, to be moved there.

    Args:
        make: an empty Context of a node.
        limit: bytes of idle Contexts in memory; None keeps all there.
        folder: for what does not fit; emptied by `clear`.
    """

    def __init__(self, make: Callable[[int], Context], limit: int | None = None, folder: Path | None = None) -> None:
        self._make, self._limit, self._folder = make, limit, folder
        self.live: OrderedDict[int, Context] = OrderedDict()  # by node, the one used last at the end
        self._rest: dict[int, Context] = {}  # of nodes on disk: records that are no client state
        self._files: dict[int, tuple[Path, bool]] = {}  # of nodes on disk: where, and whether it is empty
        self._busy: set[int] = set()
        self._sizes: dict[int, int] = {}  # of idle ones in memory
        self._used = 0

    def get(self, node: int) -> Context:
        """The Context of a node, made when it is first needed, in memory until it is put away."""
        context = self.live.get(node)
        if context is None:
            context = self._rest.pop(node, None) or self._make(node)
            if node in self._files:
                path, _ = self._files.pop(node)
                state_files.read(path).save(context)
                if path.parent == self._folder:
                    path.unlink()
            self.live[node] = context
        self.live.move_to_end(node)
        return context

    def lend(self, node: int) -> Context:
        """The Context of a node whose client is about to run."""
        self._busy.add(node)
        self._used -= self._sizes.pop(node, 0)
        return self.get(node)

    def back(self, node: int) -> None:
        """The client has run. What is idle for longest goes to disk if there is too much."""
        self._busy.discard(node)
        if self._limit is None or node not in self.live:
            return
        self._used += (size := _size(self.live[node])) - self._sizes.pop(node, 0)
        self._sizes[node] = size
        while self._used > self._limit and self._sizes:
            self._put_away(next(node for node in self.live if node in self._sizes))

    def state(self, node: int) -> ClientState:
        """A client's state, wherever it is."""
        if node in self._files:
            return state_files.read(self._files[node][0])
        return ClientState.load(self.live[node]) if node in self.live else ClientState()

    def nodes(self) -> list[int]:
        """All that have ever been used, ascending."""
        return sorted(self.live.keys() | self._files.keys())

    def found(self, node: int, path: Path) -> None:
        """A node's state is in this file."""
        self._files[node] = (path, False)

    def keep(self, node: int, folder: Path) -> None:
        """Have a node's state in a folder of the checkpoints, if there is anything in it and it is not there yet."""
        if node not in self._files:
            state = self.state(node)
            if not state.empty:
                state_files.write(folder, node - 1, state)
            return
        path, empty = self._files[node]
        if path.parent == self._folder and not empty:
            folder.mkdir(parents=True, exist_ok=True)
            self._files[node] = (path.replace(folder / path.name), False)

    def clear(self) -> None:
        """Delete what an earlier process, or this one, has put away and no checkpoint has."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _put_away(self, node: int) -> None:
        context = self.live.pop(node)
        self._used -= self._sizes.pop(node)
        state = ClientState.load(context)
        if self._folder is not None:
            self._files[node] = (state_files.write(self._folder, node - 1, state), state.empty)
        ClientState.forget(context)
        if len(context.state):
            self._rest[node] = context


def _size(context: Context) -> int:
    """Bytes of a Context, roughly."""
    arrays = [
        array for record in context.state.values() if isinstance(record, ArrayRecord) for array in record.values()
    ]
    return _OVERHEAD + sum(array.nbytes if isinstance(array, LazyArray) else len(array.data) for array in arrays)
