"""What a run says of its privacy, of single examples and of whole clients."""

from __future__ import annotations

from typing import Any

from fedssl.aggregation import spending
from fedssl.flower.run.running import Running
from fedssl.privacy.record_dp import RecordDP
from fedssl.privacy.statement import running, with_public_start


def claims(run: Running) -> dict[str, Any]:
    """The content of `privacy.json`."""
    content = spending.whole(run.job.privacy, list(run.spent.values()), run.aggregation.claim())
    return content if run.job.start is None else with_public_start(content)


def so_far(run: Running) -> dict[str, float | None]:
    """The epsilons of a round's row, absent where nothing is claimed: of clients, or else of records."""
    private, client = run.job.privacy, run.aggregation.epsilon
    record = running(list(run.spent.values()), private.delta) if isinstance(private, RecordDP) else None
    if client is None:
        return {} if record is None else {"epsilon": record}
    return {"epsilon": client} if record is None else {"epsilon": client, "record_epsilon": record}
