"""What a client keeps between rounds, on its node's disk: Flower keeps a Context only as long as a process lives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedssl.edge import sealed
from fedssl.errors import ConfigError, FedsslError, ResumeError
from fedssl.flower import state_files
from fedssl.flower.codec import ClientState

Config = Mapping[str, Any]  # of an instruction


def restore(config: Config, context: Context, client: int, at: int) -> None:
    """Before a client trains: take its state from the disk, if it is kept there.

    Raises:
        ResumeError: it is damaged, or gone although the client has taken part.
    """
    folder = _folder(config, context)
    if folder is not None:
        path = state_files.newest(folder, client, at - 1)
        try:
            (state_files.read(path, _key(context)) if path else ClientState()).save(context)
        except FedsslError as error:
            raise ResumeError(_told(error, folder, client)) from error
    last = int(config.get("last", 0))
    if not last:
        return
    state = ClientState.load(context)
    if state.round < last and (state.round or state.empty):
        where = "its state-dir has lost" if folder is not None else "its node has no state-dir and has forgotten"
        raise ResumeError(
            f"client {client} trained in round {last}, and {where} what it kept: bring that back, or start the run "
            "anew under another name with a state-dir in the --node-config of every node"
        )


def keep(config: Config, context: Context, client: int) -> None:
    """After it has trained: have its state on the disk before anything leaves it.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = _folder(config, context)
    if folder is None:
        return
    state = ClientState.load(context)
    if not state.empty:
        try:
            state_files.write(folder, client, state, _key(context))
        except ConfigError as error:
            raise ConfigError(_told(error, folder, client)) from error
        state_files.prune(folder, [client], int(config["checkpoint"]))


def _told(error: FedsslError, folder: Path, client: int) -> str:
    """What the server learns: what is wrong, and not where. A node has no `out`."""
    said = str(error).removesuffix(" or pass another out=").replace(str(folder.parent), "its state-dir")
    return f"client {client}: {said}"


def _key(context: Context) -> bytes | None:
    """The key in the file that the node's owner names, for what it keeps."""
    place = context.node_config.get("state-key")
    if place is None:
        return None
    try:
        return sealed.key_in(Path(str(place)))
    except ConfigError as error:  # the server learns what is wrong, and not where
        raise ConfigError(str(error).replace(str(place), "FILE")) from error


def _folder(config: Config, context: Context) -> Path | None:
    """The node's own place if it has one, a folder a run; else the one of the instruction; else memory."""
    own, run = context.node_config.get("state-dir"), str(config.get("run", ""))
    if own and re.fullmatch("[0-9a-f]{16}", run):
        return Path(str(own)) / run
    return Path(str(config["state-dir"])) if "state-dir" in config else None
