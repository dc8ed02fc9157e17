"""Audits: what an attacker gets out of a mechanism or a finished run, as lower bounds of epsilon and as ROC curves."""

from __future__ import annotations

from fedssl.privacy.audit.bounds import (
    epsilon_lower_bound,
    gdp_lower_bound,
    guess_bound,
    one_run_lower_bound,
    split_bound,
)
from fedssl.privacy.audit.clients import client_canary_estimate
from fedssl.privacy.audit.mechanism import one_run, repeated_runs, through

__all__ = [
    "client_canary_estimate",
    "epsilon_lower_bound",
    "gdp_lower_bound",
    "guess_bound",
    "one_run",
    "one_run_lower_bound",
    "repeated_runs",
    "split_bound",
    "through",
]
