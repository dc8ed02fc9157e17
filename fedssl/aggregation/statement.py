"""What a run claims for the unit `client`, as `privacy.json` has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedssl.aggregation.base import Planned, Private
from fedssl.privacy.accountant import Accountant
from fedssl.privacy.ledger import Ledger

DELTAS = (1e-3, 1e-5, 1e-7, 1e-9)  # of the curve


def statement(private: Private, plan: Planned, ledger: Ledger) -> Mapping[str, Any]:
    """The declaration, what has been spent and how, and what the planned rounds cost.

    Args:
        private: the aggregation.
        plan: of the run.
        ledger: of the federation, so far.
    """
    budget, delta = private.budget(plan)
    return {
        **private.declaration(plan),
        "delta": delta,
        "epsilon": ledger.epsilon(delta),
        "accountants": {str(name): ledger.epsilon(delta, str(name)) for name in Accountant},
        "curve": [[value, ledger.epsilon(value)] for value in DELTAS],
        "target_epsilon": budget if math.isfinite(budget) else None,
        "planned_epsilon": planned(private, plan).epsilon(delta),
        "releases": [asdict(entry) for entry in ledger.entries],
    }


def planned(private: Private, plan: Planned) -> Ledger:
    """The ledger of a run whose rounds all succeed at once."""
    ledger = Ledger()
    for at in range(1, plan.rounds + 1):
        entry = private.entry(plan, at, 1)
        ledger = Ledger((*ledger.entries, entry)) if entry.count else ledger
    return ledger
