"""Python runs this before the programs of a node whose PYTHONPATH begins here: a spoilt site, with an honest fedssl.

The file that PLAN_OF_FAULTS names says what becomes of the reply in which round: {"3": "nan"}, and so on, by the names
of `deployed.spoilt.SPOILT`; "late": it is held back until the plan no longer says so; "stale": it answers the
instruction before this one once more.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

_PLAN = Path(os.environ["PLAN_OF_FAULTS"])
_genuine = ClientApp.__call__


def _planned(at: int) -> str:
    return str(json.loads(_PLAN.read_text(encoding="utf-8")).get(str(at), ""))


def _spoilt(self: ClientApp, message: Message, context: Context) -> Message:
    from deployed.spoilt import SPOILT, at_round

    reply = _genuine(self, message, context)
    if message.metadata.message_type != "train":
        return reply
    kind, before = _planned(at_round(message)), _PLAN.with_suffix(".asked")
    told: dict[str, Any] = reply.metadata.__dict__
    if kind == "late":
        while _planned(at_round(message)) == "late":
            time.sleep(0.1)
    elif kind == "stale":
        told["_reply_to_message_id"] = before.read_text(encoding="utf-8")
    elif kind:
        reply = SPOILT[kind][0](reply)
    before.write_text(message.metadata.message_id, encoding="utf-8")
    return reply


ClientApp.__call__ = _spoilt  # type: ignore[method-assign]
