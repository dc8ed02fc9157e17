"""The conversation of secure aggregation as words of messages: what each side says, and what a client remembers.

A word is a number, a text or bytes; what belongs to a client has its number behind a dot: `letter.7`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import numpy as np

from fedssl.aggregation.base import Scalar, Told
from fedssl.errors import ProtocolError
from fedssl.privacy.secagg import participant
from fedssl.privacy.secagg.graph import Graph
from fedssl.privacy.secagg.participant import Advert, Announced, Holding, Reveal, Roster, Session, Shared

State = Announced | Shared | Holding
Words = dict[str, Scalar]
_KEY = 32  # bytes of each of the three of an advert


def answer(question: Told, secrets: Told, client: int) -> tuple[Words, Words]:
    """On the client, the steps 1, 2 and 4: what it says, and what it remembers from then on.

    Raises:
        ProtocolError: the client is at another step, or refuses what it is told.
    """
    step = str(question.get("step"))
    if step == "advertise":  # whatever was before: this is another round
        me = participant.advertise(client)
        return advert_words(me.advert), remembered(me)
    if step == "share":
        state, letters = participant.share(_announced(secrets, client), session_of(question), roster_of(question))
        return by_client("letter", letters), remembered(state)
    revealed = participant.reveal(_holding(secrets, client), numbers(question["survivors"]))
    return by_client("own", revealed.own) | by_client("masking", revealed.masking), {}  # nothing, so only once


def mask(vector: np.ndarray, told: Told, client: int) -> np.ndarray:
    """On the client, step 3: the vector as the server may see it.

    Args:
        vector: (d,) uint32 or uint64.
        told: the letters, and behind `own.` what the client remembered.
        client: its number.

    Raises:
        ProtocolError: the client is at another step, or refuses the letters.
    """
    me = _shared(_own(told), client)
    return participant.mask(me, participant.receive(me, of_client("letter", told)), vector)


def masked(told: Told, client: int) -> Words:
    """On the client, after step 3: what it remembers for step 4; its own secrets are not among it."""
    return remembered(participant.receive(_shared(_own(told), client), of_client("letter", told)))


def remembered(state: State) -> Words:
    """A client's state as words."""
    words: Words = {"at": type(state).__name__}
    if isinstance(state, Holding):
        return words | session_words(state.session) | _graph_words(state.graph) | by_client("held", state.shares)
    me = state.me if isinstance(state, Shared) else state
    words |= {"sealing_seed": me.sealing_seed, "masking_seed": me.masking_seed, "own_seed": me.own_seed}
    if isinstance(state, Shared):
        words |= session_words(state.session) | roster_words(state.roster) | {"kept": state.kept}
    return words


def session_words(session: Session) -> Words:
    """A session as words."""
    return {"name": session.name, "threshold": session.threshold, "colluders": session.colluders}


def session_of(words: Told) -> Session:
    """The session in words."""
    return Session(_bytes(words["name"]), int(words["threshold"]), int(words["colluders"]))


def advert_words(advert: Advert) -> Words:
    """What one client advertises, as one word."""
    return {"advert": advert.sealing + advert.masking + advert.commitment}


def advert_of(words: Told) -> Advert:
    """What one client advertises, from its word.

    Raises:
        ProtocolError: there is no such word.
    """
    text = words.get("advert")
    if not isinstance(text, bytes) or len(text) != 3 * _KEY:
        raise ProtocolError("a client sent no keys: it runs another aggregation or version, leave it out")
    return Advert(text[:_KEY], text[_KEY : 2 * _KEY], text[2 * _KEY :])


def roster_words(roster: Roster) -> Words:
    """A roster as words."""
    return {f"advert.{client}": advert_words(advert)["advert"] for client, advert in roster.items()}


def roster_of(words: Told) -> dict[int, Advert]:
    """The roster in words."""
    return {client: advert_of({"advert": text}) for client, text in of_client("advert", words).items()}


def reveal_of(words: Told) -> Reveal:
    """The answer of step 4 in words."""
    return Reveal(of_client("own", words), of_client("masking", words))


def by_client(word: str, values: Mapping[int, bytes]) -> Words:
    """Bytes by client as words."""
    return {f"{word}.{client}": value for client, value in sorted(values.items())}


def of_client(word: str, words: Told) -> dict[int, bytes]:
    """Bytes by client in words."""
    start = f"{word}."
    return {int(key.removeprefix(start)): _bytes(value) for key, value in words.items() if key.startswith(start)}


def listed(clients: Collection[int]) -> str:
    """Numbers of clients as one word."""
    return ",".join(map(str, sorted(clients)))


def numbers(word: Scalar) -> list[int]:
    """The numbers of clients in a word."""
    return [int(number) for number in str(word).split(",") if number]


def _own(words: Told) -> Words:
    return {key.removeprefix("own."): value for key, value in words.items() if key.startswith("own.")}


def _announced(words: Told, client: int) -> Announced:
    _check(words, Announced, client)
    return _me(words, client)


def _shared(words: Told, client: int) -> Shared:
    _check(words, Shared, client)
    return Shared(_me(words, client), session_of(words), roster_of(words), _bytes(words["kept"]))


def _holding(words: Told, client: int) -> Holding:
    _check(words, Holding, client)
    graph = Graph(tuple(numbers(words["ring"])), int(words["reach"]), int(words["shares"]))
    return Holding(client, session_of(words), graph, of_client("held", words))


def _graph_words(graph: Graph) -> Words:
    return {"ring": ",".join(map(str, graph.ring)), "reach": graph.reach, "shares": graph.shares}


def _me(words: Told, client: int) -> Announced:
    return Announced(client, *(_bytes(words[key]) for key in ("sealing_seed", "masking_seed", "own_seed")))


def _bytes(value: Scalar) -> bytes:
    return cast(bytes, value)


def _check(words: Told, state: type[State], client: int) -> None:
    if words.get("at") != state.__name__:
        raise ProtocolError(
            f"client {client} was asked for a step of secure aggregation that it is not at, so it answers nothing: "
            "each step is done once, in order; repeat the round"
        )
