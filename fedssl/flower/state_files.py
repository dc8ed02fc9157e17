"""Client state on disk: one safetensors file for each client and round, written atomically.

Used by the in-process engine's checkpoints, and by clients themselves where their node has a `state-dir`
(`fedssl.flower.deploy.memory`): Flower keeps a Context only as long as a process lives.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedssl.edge import sealed
from fedssl.errors import ResumeError
from fedssl.files import array_bytes, arrays_of, read_arrays, write_bytes
from fedssl.flower.codec import ClientState
from fedssl.parts import Arrays

if TYPE_CHECKING:
    from fedssl.flower.in_process import InProcessGrid


_FORMAT = 1  # of the files; to be raised with every change that an earlier reader would misread


def write(folder: Path, client: int, state: ClientState, key: bytes | None = None) -> Path:
    """Write a client's state under the round in which it was last changed, encrypted if there is a key; returns where.

    The name does not tell which; what is read must be what the reader's key says.
    """
    groups = {"local": state.local, "mine": state.mine, "residual": state.residual, "examples": state.examples}
    arrays = {f"{group}/{key}": value for group, own in groups.items() for key, value in own.items()}
    meta = {
        "format": str(_FORMAT),
        "memo": json.dumps(state.memo),
        "round": str(state.round),
        "ledger": state.ledger,
        "own": state.own,
    }
    path = folder / f"{client:06d}-{state.round:06d}.safetensors"
    content = array_bytes(arrays, meta)
    write_bytes(path, content if key is None else sealed.seal(content, key, path.name))
    return path


def newest(folder: Path, client: int, at_most: int) -> Path | None:
    """The newest file of a client whose round is not above `at_most`."""
    rounds = {int(path.stem.partition("-")[2]): path for path in folder.glob(f"{client:06d}-*.safetensors")}
    usable = [r for r in rounds if r <= at_most]
    return rounds[max(usable)] if usable else None


def read(path: Path, key: bytes | None = None) -> ClientState:
    """Read a state back.

    Raises:
        ResumeError: the file is damaged, or of a later version; it is encrypted and there is no key, or another one, or
            there is a key and anybody might have written it.
    """
    arrays, meta = _contents(path, key)
    try:
        if int(meta.get("format", _FORMAT)) > _FORMAT:
            raise ResumeError(f"{path} was written by a later version of fedssl: install that one")
        memo, last, ledger = json.loads(meta["memo"]), int(meta["round"]), meta["ledger"]
    except (KeyError, ValueError) as error:
        raise ResumeError(f"{path} is not a client state: delete it, or start the run anew") from error
    groups: dict[str, Arrays] = {"local": {}, "mine": {}, "residual": {}, "examples": {}}
    for full, value in arrays.items():
        group, _, name = full.partition("/")
        groups[group][name] = value
    return ClientState(memo=memo, round=last, ledger=ledger, own=meta.get("own", ""), **groups)


def _contents(path: Path, key: bytes | None) -> tuple[Arrays, dict[str, str]]:
    try:
        with path.open("rb") as file:
            encrypted = sealed.is_sealed(file.read(64))
            content = b"" if key is None else path.read_bytes()
    except OSError as error:
        raise ResumeError(f"{path} cannot be read ({error.strerror}): give it back, or start the run anew") from error
    if key is None:
        if encrypted:
            raise ResumeError(f"{path} is encrypted and this node has no state-key: start it with the one it had")
        return read_arrays(path)
    if not encrypted:
        raise ResumeError(
            f"{path} is not encrypted and this node has a state-key: somebody else may have written it; delete it, or "
            "start the node without state-key"
        )
    return arrays_of(sealed.unseal(content, key, path))


def prune(folder: Path, clients: Collection[int], at_most: int) -> None:
    """Delete the files of clients that newer ones, not above `at_most`, replace; reads the folder once."""
    files: dict[str, list[Path]] = {f"{client:06d}": [] for client in clients}
    for path in folder.glob("*.safetensors"):
        files.get(path.stem.partition("-")[0], []).append(path)
    for paths in files.values():
        kept = max((path.name for path in paths if int(path.stem.partition("-")[2]) <= at_most), default="")
        for path in paths:
            if path.name < kept:
                path.unlink(missing_ok=True)


def take(grid: InProcessGrid, nodes: Mapping[int, int], clients: Collection[int] | None, folder: Path) -> None:
    """Write the states of clients of this process, where there is anything in them.

    Args:
        grid: holds them.
        nodes: client -> node id.
        clients: of the round; None: all that have ever taken part, because their files may be older.
        folder: of the files.
    """
    for node in grid.states.nodes() if clients is None else [nodes[client] for client in clients]:
        grid.states.keep(node, folder)


def give(grid: InProcessGrid, nodes: Mapping[int, int], folder: Path, done: int) -> None:
    """Give the clients of this process the states that they had after round `done`, each when it is first needed."""
    grid.states.clear()
    for path in sorted(folder.glob("*.safetensors")):
        client, _, last = path.stem.partition("-")
        if int(last) <= done:  # sorted, so a newer file of the same client comes later and wins
            grid.states.found(nodes[int(client)], path)
