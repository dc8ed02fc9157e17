"""What a reply must be before anything is made of it: otherwise it is refused, by the name of its client."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from flwr.app import ArrayRecord, Message

from fedssl import tree
from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.codec import LazyArray
from fedssl.parts import Arrays

_SPARE = 1 << 20  # bytes that a reply may have beyond a few times what was asked for
_TIMES = 4  # a sparse update of an array of few entries, or a masked one, is longer than the array


@dataclass(frozen=True)
class Admitted:
    """A reply that fits."""

    row: dict[str, float | int]  # for the log
    arrays: Arrays | None  # in full precision; None: the client had no time for a step
    packed: bool  # whether they came otherwise, or in another order


def admit(
    reply: Message,
    client: int,
    asked: Arrays,
    unpack: Callable[[Arrays, Arrays, str], Arrays],
    max_change: float | None = None,
) -> Admitted:
    """Read an ordinary update.

    Args:
        reply: without an error.
        client: whose.
        asked: the arrays that it was sent, and should send back.
        unpack: a client's arrays from the wire's.
        max_change: L2 norm of the longest change of weights that is let in; None: any that is finite.

    Raises:
        ProtocolError: it is no such reply, too long to be one, has other arrays than was asked for, or values that are
            not finite or too far away.
    """
    metrics = numbers(reply, client)
    if codec.WEIGHT not in metrics or not isinstance(reply.content.get(codec.ARRAYS), ArrayRecord):
        raise ProtocolError(
            f"client {client} replied without {codec.ARRAYS!r} or {codec.WEIGHT!r}: it does not run this ClientApp"
        )
    weight = metrics[codec.WEIGHT]
    if not (math.isfinite(weight) and weight >= 0):
        raise ProtocolError(f"client {client} weighs its update with {weight}: it is refused")
    wire = read(reply, client, tree.size_bytes(asked))
    arrays: Arrays | None = None
    if metrics.get("steps") != 0:
        try:
            arrays = unpack(wire, asked, f"client {client}")
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise ProtocolError(f"client {client} sent an update that cannot be unpacked ({error})") from error
        tree.check_same(arrays, asked, f"client {client}")
        if list(arrays) != list(asked):  # some of Flower's strategies pair arrays by their places
            arrays = {key: arrays[key] for key in asked}
        if max_change is not None:
            change = math.sqrt(tree.squared_distance(arrays, asked))
            if not change <= max_change:
                raise ProtocolError(
                    f"client {client} sent a change of length {change:.4g}, and federation.max_change={max_change:g}: "
                    "it is refused"
                )
    row: dict[str, float | int] = {
        "client": client,
        "examples": int(weight),
        **{key: value for key, value in metrics.items() if key not in (codec.WEIGHT, "partition-id")},
        "bytes_up": tree.size_bytes(wire),
    }
    return Admitted(row, arrays, arrays is not wire)


def numbers(reply: Message, client: int) -> dict[str, float | int]:
    """The scalars of a reply.

    Raises:
        ProtocolError: there are none, or they name another client.
    """
    try:
        found = {key: cast(float, value) for key, value in codec.metrics_of(reply.content).items()}
    except KeyError:
        raise ProtocolError(
            f"client {client} replied without {codec.METRICS!r}: it does not run this ClientApp"
        ) from None
    if int(found.get("partition-id", client)) != client:
        raise ProtocolError(f"client {client} says that it is client {found['partition-id']}: it is refused")
    return found


def read(reply: Message, client: int, expected: int) -> Arrays:
    """The arrays of a reply as they came.

    Args:
        reply: has them.
        client: whose.
        expected: bytes of what was asked for; what is many times as long is not even read.

    Raises:
        ProtocolError: they are too long or cannot be read.
    """
    record = codec.arrays_of(reply.content)
    size = sum(array.nbytes if isinstance(array, LazyArray) else len(array.data) for array in record.values())
    if size > _TIMES * expected + _SPARE:
        raise ProtocolError(f"client {client} sent {size:,} bytes where {expected:,} were asked for: they are refused")
    try:
        return codec.decode(record)
    except (ValueError, TypeError, EOFError, OSError, SyntaxError) as error:
        raise ProtocolError(f"client {client} sent arrays that cannot be read ({error})") from error


def named(sentence: str, client: int) -> str:
    """A failure with the name of its client, if that is known and not in it."""
    return sentence if client < 0 or f"client {client}" in sentence else f"client {client}: {sentence}"
