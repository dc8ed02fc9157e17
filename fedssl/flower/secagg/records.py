"""The protocol's states and messages as Flower records: bytes and lists of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context

from fedssl.errors import ProtocolError
from fedssl.privacy.secagg.participant import Advert, Announced, Holding, Reveal, Roster, Session, Shared

SECAGG = "secagg"  # the name of the record, in messages and in a client's Context
State = Announced | Shared | Holding


def save(context: Context, state: State | None) -> None:
    """Remember what the next step needs, in place of what the last one did; None forgets all of it."""
    context.state.pop(SECAGG, None)
    if state is not None:
        context.state[SECAGG] = ConfigRecord({"step": type(state).__name__, **_state(state)})


def announced(context: Context) -> Announced:
    """The state after the first step.

    Raises:
        ProtocolError: the client is at another step.
    """
    record = _at(context, Announced)
    return _announced(record)


def shared(context: Context) -> Shared:
    """The state after the second step.

    Raises:
        ProtocolError: the client is at another step.
    """
    record = _at(context, Shared)
    return Shared(_announced(record), session_of(record), roster_of(record), record["kept"])


def holding(context: Context) -> Holding:
    """The state after the third step.

    Raises:
        ProtocolError: the client is at another step.
    """
    record = _at(context, Holding)
    return Holding(record["client"], session_of(record), table_of(record, "shares"))


def session(value: Session) -> dict[str, Any]:
    """A session as fields of a record."""
    return {"session": value.name, "threshold": value.threshold}


def session_of(record: Mapping[str, Any]) -> Session:
    """The session in a record."""
    return Session(record["session"], record["threshold"])


def roster(value: Roster) -> dict[str, Any]:
    """A roster as fields of a record."""
    order = sorted(value)
    return {
        "clients": order,
        "sealing": [value[client].sealing for client in order],
        "masking": [value[client].masking for client in order],
        "commitment": [value[client].commitment for client in order],
    }


def roster_of(record: Mapping[str, Any]) -> dict[int, Advert]:
    """The roster in a record."""
    rows = zip(record["clients"], record["sealing"], record["masking"], record["commitment"], strict=True)
    return {client: Advert(*keys) for client, *keys in rows}


def table(name: str, value: Mapping[int, bytes]) -> dict[str, Any]:
    """Bytes by client as fields of a record."""
    order = sorted(value)
    return {f"{name}-of": order, name: [value[client] for client in order]}


def table_of(record: Mapping[str, Any], name: str) -> dict[int, bytes]:
    """Bytes by client in a record."""
    return dict(zip(record[f"{name}-of"], record[name], strict=True))


def reveal(value: Reveal) -> ConfigRecord:
    """An answer as a record."""
    return ConfigRecord({**table("own", value.own), **table("masking", value.masking)})


def reveal_of(record: Mapping[str, Any]) -> Reveal:
    """The answer in a record."""
    return Reveal(table_of(record, "own"), table_of(record, "masking"))


def _state(state: State) -> dict[str, Any]:
    if isinstance(state, Holding):
        return {"client": state.client, **session(state.session), **table("shares", state.shares)}
    if isinstance(state, Shared):
        return {**_state(state.me), **session(state.session), **roster(state.roster), "kept": state.kept}
    return {
        "client": state.client,
        "sealing-seed": state.sealing_seed,
        "masking-seed": state.masking_seed,
        "own-seed": state.own_seed,
    }


def _announced(record: Mapping[str, Any]) -> Announced:
    return Announced(record["client"], record["sealing-seed"], record["masking-seed"], record["own-seed"])


def _at(context: Context, step: type[State]) -> Mapping[str, Any]:
    record: Any = context.state.get(SECAGG, {})
    if record.get("step") != step.__name__:
        raise ProtocolError(
            f"client {context.node_config['partition-id']} was asked for a step of secure aggregation that it is not "
            "at, so it answers nothing: each step is done once, in order; repeat the round"
        )
    return record  # type: ignore[no-any-return]  # a ConfigRecord
