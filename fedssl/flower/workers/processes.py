"""Workers that are processes: forked from this one, so they have its imports and its data without a start-up.

Threads of tiny steps wait for Python's lock; processes have one each. A client's message and Context travel as bytes,
as to a device, and what the client keeps comes back with its reply: a worker knows nothing from one turn to the next.
The arrays of an instruction, which the clients of a round share, are sent to each worker once.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common import serde  # private: Flower's own form of messages on a wire
from flwr.proto.message_pb2 import Context as ContextBytes
from flwr.proto.message_pb2 import Message as MessageBytes
from flwr.proto.recorddict_pb2 import RecordDict as RecordBytes

from fedssl import errors
from fedssl.errors import FedsslError, ProtocolError
from fedssl.files import array_bytes, arrays_of
from fedssl.flower import codec
from fedssl.flower.workers.threads import Call, Threads, Took
from fedssl.parts import Arrays

Parsed = TypeVar("Parsed", MessageBytes, ContextBytes, RecordBytes)


class WorkerDiedError(ProtocolError):
    """A worker process has ended without being asked to: what its clients keep is lost, so the run ends."""


def forked(count: int, client_app: ClientApp, took: Took) -> list[Process]:
    """So many worker processes; to be called while this process has no threads whose locks a child would need."""
    made: list[Process] = []
    for _ in range(count):
        near, far = multiprocessing.Pipe()
        others = [one.wire for one in made] + [near]  # a child that held them would outlive this process
        child = multiprocessing.get_context("fork").Process(target=_live, args=(far, others, client_app), daemon=True)
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside threads warns; those of progress and trackers hold nothing of ours.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        far.close()
        made.append(Process(child, near, took))
    return made


class Process:
    """The near end of a worker process."""

    def __init__(self, child: BaseProcess, wire: Connection, took: Took) -> None:
        self._child, self.wire, self._took = child, wire, took
        self._told: ArrayRecord | None = None  # the arrays that the child has

    def run(self, calls: Sequence[Call]) -> None:
        """See `Worker`."""
        try:
            self._send(calls)
            self._receive(calls)
        except (EOFError, OSError):
            self._child.join()
            lost = WorkerDiedError(
                f"a worker process ended by itself ({_ending(self._child.exitcode)}): free memory or take fewer "
                "engine.workers; `fedssl resume` continues from the last checkpoint"
            )
            _fail(calls, lost)
        except Exception as error:  # noqa: BLE001  # handed to the thread that waits for the replies
            self.stop()  # what is left on the wire belongs to nobody
            _fail(calls, error)

    def close(self) -> None:
        """Let the child end, and wait for it."""
        self.wire.close()
        self._child.join()
        self._child.close()

    def stop(self) -> None:
        """Kill the child."""
        with suppress(ValueError):  # it has ended meanwhile
            self._child.kill()

    def _send(self, calls: Sequence[Call]) -> None:
        asked: list[dict[str, bool]] = []
        parcels: list[bytes] = []
        for call in calls:
            content = RecordDict(dict(call.message.content))
            model = content.pop(codec.ARRAYS, None)
            fresh = model is not None and model is not self._told
            if isinstance(model, ArrayRecord) and fresh:
                parcels += _pack(RecordDict({codec.ARRAYS: model}))
                self._told = model
            parcels += (*_pack_message(call.message, content), *_pack_context(call.context))
            asked.append({"model": model is not None, "fresh": fresh})
        self.wire.send_bytes(json.dumps(asked).encode())
        for parcel in parcels:
            self.wire.send_bytes(parcel)

    def _receive(self, calls: Sequence[Call]) -> None:
        said = json.loads(self.wire.recv_bytes())
        for times in said["took"]:
            self._took(*times)
        for call, failure in zip(calls, said["failures"], strict=True):
            call.context.state = _unpack(self.wire)
            if failure is None:
                call.reply = _unpack_message(self.wire)
            else:
                call.failure = _error(*failure)
            call.finished.set()


def _fail(calls: Sequence[Call], failure: Exception) -> None:
    for call in calls:
        if not call.finished.is_set():
            call.failure = failure
            call.finished.set()


def _live(wire: Connection, others: Sequence[Connection], client_app: ClientApp) -> None:
    """The life of a worker process: one cohort after another, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that has forked, which ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    gc.freeze()  # what was there before is never freed here, and looking at it would copy it
    took: list[tuple[int, int, float]] = []
    threads, model = Threads(client_app, lambda *times: took.append(times)), RecordDict()
    with suppress(EOFError, BrokenPipeError):
        while True:
            calls = []
            for asked in json.loads(wire.recv_bytes()):
                if asked["fresh"]:
                    model = _unpack(wire)
                message, context = _unpack_message(wire), _unpack_context(wire)
                if asked["model"]:
                    message.content.update(model)
                calls.append(Call(message, context))
            threads.run(calls)
            _answer(wire, calls, took)
            took.clear()


def _answer(wire: Connection, calls: Sequence[Call], took: Sequence[tuple[int, int, float]]) -> None:
    failures = [None if call.failure is None else _described(call.failure) for call in calls]
    wire.send_bytes(json.dumps({"took": took, "failures": failures}).encode())
    for call in calls:
        # Of a client that failed, too: it may have paid for steps before it took them.
        parcels = _pack(call.context.state)
        if call.reply is not None:
            parcels += _pack_message(call.reply, call.reply.content)
        for parcel in parcels:
            wire.send_bytes(parcel)


def _pack(records: RecordDict) -> list[bytes]:
    """Flower's form, but for arrays: safetensors takes a tenth of the time."""
    rest, arrays, keys = RecordDict(), Arrays(), {}
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            arrays |= {f"{name}/{key}": value for key, value in codec.decode(record).items()}
            keys[name] = list(record)  # in order, which a file of arrays does not keep
        else:
            rest[name] = record
    return [serde.recorddict_to_proto(rest).SerializeToString(), array_bytes(arrays, {"keys": json.dumps(keys)})]


def _unpack(wire: Connection) -> RecordDict:
    records = serde.recorddict_from_proto(_parsed(RecordBytes(), wire))
    arrays, meta = arrays_of(wire.recv_bytes())
    for name, keys in json.loads(meta["keys"]).items():
        records[name] = codec.encode({key: arrays[f"{name}/{key}"] for key in keys})
    return records


def _pack_message(message: Message, content: RecordDict) -> list[bytes]:
    """The message, with this content."""
    bare = serde.message_to_proto(make_message(message.metadata, RecordDict()))
    return [bare.SerializeToString(), *_pack(content)]


def _unpack_message(wire: Connection) -> Message:
    message = serde.message_from_proto(_parsed(MessageBytes(), wire))
    message.content = _unpack(wire)
    return message


def _pack_context(context: Context) -> list[bytes]:
    bare = Context(context.run_id, context.node_id, context.node_config, RecordDict(), context.run_config)
    return [serde.context_to_proto(bare).SerializeToString(), *_pack(context.state)]


def _unpack_context(wire: Connection) -> Context:
    context = serde.context_from_proto(_parsed(ContextBytes(), wire))
    context.state = _unpack(wire)
    return context


def _parsed(into: Parsed, wire: Connection) -> Parsed:
    """What comes next on the wire."""
    into.ParseFromString(wire.recv_bytes())
    return into


def _described(failure: BaseException) -> tuple[str, str, str]:
    """An exception's class, sentence and origin."""
    return type(failure).__name__, str(failure), "".join(traceback.format_exception(failure))


def _error(kind: str, sentence: str, origin: str) -> Exception:
    """Ours as it was; any other with the place where it was raised."""
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, FedsslError):
        return ours(sentence)
    error = RuntimeError(f"{kind}: {sentence}")
    error.add_note(origin)
    return error


def _ending(code: int | None) -> str:
    return f"exit code {code}" if code is None or code >= 0 else f"signal {-code}"
