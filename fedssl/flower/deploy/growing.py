"""A node's own data that grows between rounds: what a client keeps for each example goes with it."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.flower.codec import ClientState
from fedssl.method import Examples
from fedssl.parts import Arrays, part_of

_AT_ONCE = 512  # examples that are read


def follow(
    state: ClientState, examples: Examples, sized: Collection[str], initial: Mapping[str, np.ndarray]
) -> ClientState:
    """A client's state for the examples that it has now.

    In arrays with a row an example, rows go with their examples wherever these stand now; new examples have the rows of
    a new model, those of examples that are gone are dropped. Examples are known by their content.

    Args:
        state: as the client has left it.
        examples: those that it has now, on any device.
        sized: the names of parts with a row an example.
        initial: the arrays of a new model for these examples.
    """
    if not sized:
        return state
    now, known = digests(examples), state.examples.get("digests")
    if known is None or np.array_equal(known, now):
        return replace(state, examples={"digests": now})
    there, here = places(known, now)
    local: Arrays = {}
    for key, value in state.local.items():
        local[key] = value
        if part_of(key) in sized and value.shape[:1] == known.shape:
            local[key] = initial[key].copy()
            local[key][here] = value[there]
    return replace(state, local=local, examples={"digests": now})


def digests(examples: Examples) -> NDArray[np.uint64]:
    """(n,) eight bytes of a hash of each example's content."""
    found: list[bytes] = []
    for index in torch.split(torch.arange(len(examples)), _AT_ONCE):
        batch = examples.batch(index)
        if isinstance(batch, Tensor):
            found += [_hash([row]) for row in batch.cpu().numpy()]
        else:  # examples of different sizes
            found += [_hash(_values(examples.batch(one))) for one in torch.split(index, 1)]
    return np.frombuffer(b"".join(found), np.uint64)


def places(known: NDArray[np.uint64], now: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the examples that are in both stand there and here; of equal ones the first with the first."""
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for at, digest in enumerate(known.tolist()):
        waiting[digest].append(at)
    pairs = [(waiting[digest].popleft(), at) for at, digest in enumerate(now.tolist()) if waiting[digest]]
    there, here = np.array(pairs, np.int64).reshape(-1, 2).T
    return there, here


def _values(example: Any) -> list[np.ndarray]:
    return [value.cpu().numpy() for _, value in sorted(vars(example).items()) if isinstance(value, Tensor)]


def _hash(values: list[np.ndarray]) -> bytes:
    content = hashlib.blake2b(digest_size=8)
    for value in values:
        content.update(repr(value.shape).encode() + value.tobytes())
    return content.digest()
