"""What a run says of its privacy, of single examples and of whole clients, in `privacy.json`."""

from __future__ import annotations

from typing import Any

from fedssl.flower.running import Running
from fedssl.privacy.record_dp import RecordDP
from fedssl.privacy.statement import running, statement


def claims(run: Running) -> dict[str, Any]:
    """Both claims, never added up, and `epsilon` and `says` of the first that there is."""
    private, releases = run.job.privacy, list(run.spent.values())
    record = statement(private.declared, releases) if isinstance(private, RecordDP) else None
    client = run.aggregation.declare() or None
    made = [claim for claim in (record, client) if claim is not None]
    says = "; ".join(claim["says"] for claim in made) or "no differential privacy is claimed"
    return {"epsilon": made[0]["epsilon"] if made else None, "says": says, "record": record, "client": client}


def so_far(run: Running) -> dict[str, float | None]:
    """The epsilon of a round's row: of examples, or else of clients; absent where nothing is claimed."""
    if isinstance(run.job.privacy, RecordDP):
        return {"epsilon": running(list(run.spent.values()), run.job.privacy.delta)}
    spent = run.aggregation.epsilon
    return {} if spent is None else {"epsilon": spent}
