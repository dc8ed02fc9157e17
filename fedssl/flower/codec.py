"""Between arrays and Flower's records. In one process nothing is serialised; bytes are made only if somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fedssl.parts import Arrays

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
WEIGHT = "num-examples"  # the key by which Flower's strategies weigh a reply
KEEPS = "keeps-state"  # in a node's word on itself: whether what its client keeps outlives the node's process
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)
Memo = dict[str, float]  # what a strategy's `receive` remembers on a client


@lru_cache(maxsize=64)
def _name(kind: np.dtype[Any]) -> str:
    """Of a type; numpy takes longer to find it than to copy a small array."""
    return str(kind)


class LazyArray(Array):
    """A Flower `Array` that holds the numpy array itself and serialises it on demand."""

    _value: np.ndarray

    def __init__(self, value: np.ndarray) -> None:
        value = np.asarray(value)  # arithmetic turns 0-d arrays into scalars
        # At once, for a model has many arrays and a round many models.
        self.__dict__.update(dtype=_name(value.dtype), shape=value.shape, stype="numpy.ndarray", _value=value)

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a dataclass field of the parent, computed here
        """The bytes that go over a wire: numpy's own format, without pickle."""
        buffer = BytesIO()
        np.save(buffer, self._value, allow_pickle=False)
        return buffer.getvalue()

    @property
    def nbytes(self) -> int:
        """Of the values in memory."""
        return int(self._value.nbytes)

    def deflate(self) -> bytes:
        """As a plain `Array`: the receiving side of Flower knows no other class."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def numpy(self) -> np.ndarray:
        """The array itself, read-only: server and clients share its memory in one process."""
        return self._view

    @cached_property
    def _view(self) -> np.ndarray:  # made once for all clients of a round
        view = self._value.view()
        view.flags.writeable = False
        return view


def encode(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays to a record that shares their memory."""
    record = ArrayRecord()
    # Past its checks of every key and value, which take longer than all else here: their types are known.
    record.__dict__["_data"].update({key: LazyArray(value) for key, value in arrays.items()})
    return record


def config_of(content: RecordDict) -> ConfigRecord:
    """The configuration of an instruction.

    This and its neighbours read the record itself: Flower's views by type are made anew whenever they are asked for.

    Raises:
        KeyError: there is none.
    """
    return _record(content, CONFIG, ConfigRecord)


def arrays_of(content: RecordDict) -> ArrayRecord:
    """The arrays of an instruction or a reply; raises KeyError where there are none."""
    return _record(content, ARRAYS, ArrayRecord)


def metrics_of(content: RecordDict) -> MetricRecord:
    """The numbers of a reply; raises KeyError where there are none."""
    return _record(content, METRICS, MetricRecord)


def _record(content: RecordDict, key: str, kind: type[Record]) -> Record:
    record = content[key]
    if not isinstance(record, kind):
        raise KeyError(key)
    return record


def decode(record: ArrayRecord) -> Arrays:
    """A record to arrays; read-only views where the record came from this process."""
    return {key: value.numpy() for key, value in record.items()}


@dataclass
class ClientState:
    """What stays on a client between rounds."""

    local: Arrays = field(default_factory=dict)  # parts with share=local
    mine: Arrays = field(default_factory=dict)  # the client's last trained merged parts, if the strategy keeps them
    memo: Memo = field(default_factory=dict)
    round: int = 0  # the last round in which the client trained; 0 = never
    residual: Arrays = field(default_factory=dict)  # what compression has not sent yet
    ledger: str = ""  # what has been spent of its examples' privacy: `Ledger.text`
    own: str = ""  # and of its own, where it adds the noise to its update itself
    examples: Arrays = field(default_factory=dict)  # which ones rows of `local` are of; see `deploy.growing`

    def save(self, context: Context) -> None:
        """Put the state into a Flower context."""
        context.state["local"] = encode(self.local)
        context.state["mine"] = encode(self.mine)
        context.state["residual"] = encode(self.residual)
        context.state["examples"] = encode(self.examples)
        context.state["memo"] = ConfigRecord({**self.memo, "round": self.round})
        context.state["ledger"] = ConfigRecord({"text": self.ledger, "own": self.own})

    @classmethod
    def load(cls, context: Context) -> ClientState:
        """Read the state of a Flower context; an empty one belongs to a client that never trained."""
        state = context.state
        if "memo" not in state:
            return cls()
        memo: dict[str, Any] = dict(_record(state, "memo", ConfigRecord))
        last = int(memo.pop("round"))
        kept = ("local", "mine", "residual", "examples")
        local, mine, residual, rows = (decode(_record(state, name, ArrayRecord)) for name in kept)
        spent = _record(state, "ledger", ConfigRecord)
        return cls(local, mine, memo, last, residual, str(spent["text"]), str(spent.get("own", "")), rows)

    @staticmethod
    def forget(context: Context) -> None:
        """Take the state out of a Flower context; what others have put there stays."""
        for name in ("local", "mine", "residual", "examples", "memo", "ledger"):
            if name in context.state:
                del context.state[name]

    @property
    def empty(self) -> bool:
        """Whether nothing would be lost with it."""
        return not (self.local or self.mine or self.memo or self.residual or self.ledger or self.own)


def step_seconds(context: Context) -> float | None:
    """How long a step took in this node's last round, if it has counted."""
    found = context.state.get("pace")
    return float(cast(float, found["step-seconds"])) if isinstance(found, MetricRecord) else None


def remember_step(context: Context, seconds: float) -> None:
    """Note how long a step took, for the node's next round."""
    context.state["pace"] = MetricRecord({"step-seconds": seconds})


def reply(arrays: Mapping[str, np.ndarray], metrics: Mapping[str, float | int]) -> RecordDict:
    """The content of a client's reply to a training instruction."""
    return RecordDict({ARRAYS: encode(arrays), METRICS: MetricRecord(dict(metrics))})


def instruction(arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
    """The content of a training instruction."""
    return RecordDict({ARRAYS: arrays, CONFIG: config})
