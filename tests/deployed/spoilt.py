"""Updates as no honest client sends them, by name, and the words with which a server refuses each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from fedssl.flower import codec


def at_round(message: Message) -> int:
    """Of an instruction to train."""
    return int(message.content.config_records[codec.CONFIG]["server-round"])  # type: ignore[arg-type]


def swap(reply: Message, **arrays: Any) -> Message:
    sent = dict(reply.content.array_records[codec.ARRAYS])
    reply.content[codec.ARRAYS] = ArrayRecord({**sent, **arrays})
    return reply


def number(reply: Message, **numbers: float) -> Message:
    reply.content.metric_records[codec.METRICS].update({k.replace("_", "-"): v for k, v in numbers.items()})
    return reply


def value(reply: Message, key: str) -> np.ndarray:
    return np.array(reply.content.array_records[codec.ARRAYS][key].numpy())


def wire(kind: str, content: bytes) -> Array:
    return Array(dtype=kind, shape=(1,), stype="numpy.ndarray", data=content)


KEY = "encoder.0.weight"
SPOILT: dict[str, tuple[Callable[[Message], Message], str]] = {
    "nan": (lambda r: swap(r, **{KEY: Array(value(r, KEY) * np.nan)}), "not finite"),
    "infinite": (lambda r: swap(r, **{KEY: Array(np.full_like(value(r, KEY), np.inf))}), "not finite"),
    "shape": (lambda r: swap(r, **{KEY: Array(value(r, KEY)[:1])}), "with shape"),
    "key": (lambda r: swap(r, **{"encoder.backdoor": Array(np.zeros(1))}), "other arrays than it was asked for"),
    "huge": (lambda r: swap(r, **{KEY: Array(np.zeros(500_000))}), "bytes where"),
    "far": (lambda r: swap(r, **{KEY: Array(value(r, KEY) + np.float32(1e6))}), "federation.max_change=100"),
    "letters": (lambda r: swap(r, **{KEY: Array(np.array(["a", "b"]))}), "with shape"),
    "torn": (lambda r: swap(r, **{KEY: wire("float32", b"\x93NUMPY\x01")}), "cannot be read"),
    "pickle": (
        lambda r: swap(r, **{KEY: wire("object", b"\x80\x04K\x01.")}),
        "cannot be read",
    ),
    "weight": (lambda r: number(r, num_examples=float("nan")), "weighs its update with nan"),
    "other client": (lambda r: number(r, partition_id=0), "says that it is client 0"),
}
