"""A client's answers in secure aggregation. Its secrets stay in its Context from one to the next, until the last."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedssl.flower.secagg import records
from fedssl.flower.secagg.records import SECAGG
from fedssl.privacy.secagg import participant


def register(app: ClientApp) -> None:
    """Let an app answer the three queries of secure aggregation."""
    app.query("secagg_advertise")(advertise)
    app.query("secagg_share")(share)
    app.query("secagg_reveal")(reveal)


def advertise(message: Message, context: Context) -> Message:
    """Step 1: fresh keys for this round."""
    me = participant.advertise(int(context.node_config["partition-id"]))
    records.save(context, me)
    return _answer(message, ConfigRecord(records.roster({me.client: me.advert})))


def share(message: Message, context: Context) -> Message:
    """Step 2: letters with shares of this client's secrets."""
    record: Any = message.content.config_records[SECAGG]
    me = records.announced(context)
    records.save(context, None)
    state, letters = participant.share(me, records.session_of(record), records.roster_of(record))
    records.save(context, state)
    return _answer(message, ConfigRecord(records.table("letters", letters)))


def mask(message: Message, context: Context, vector: np.ndarray) -> np.ndarray:
    """Step 3, a part of training: the vector as the server may see it."""
    record: Any = message.content.config_records[SECAGG]
    me = records.shared(context)
    records.save(context, None)
    state, masked = participant.mask(me, records.table_of(record, "letters"), vector)
    records.save(context, state)
    return masked


def reveal(message: Message, context: Context) -> Message:
    """Step 4: one share of each client's secrets, once."""
    record: Any = message.content.config_records[SECAGG]
    me = records.holding(context)
    records.save(context, None)  # before the answer: there is no second one
    return _answer(message, records.reveal(participant.reveal(me, record["survivors"])))


def _answer(message: Message, record: ConfigRecord) -> Message:
    return Message(RecordDict({SECAGG: record}), reply_to=message)
