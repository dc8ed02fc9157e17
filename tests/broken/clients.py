"""Aggregations that claim more than they give, each wrong in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fedssl.aggregation.base import Planned, Told
from fedssl.parts import Arrays
from fedssl.privacy.clients import client_dp
from fedssl.privacy.clients.client_dp import ClientDP
from fedssl.privacy.clients.flat import clip
from fedssl.privacy.clients.ftrl import FTRL
from fedssl.privacy.clients.local_dp import SPREAD, LocalDP


def clip_all_but_scalars(change: Arrays, bound: float, weight: float = 1.0) -> tuple[Arrays, float]:
    """Broken: arrays of shape () go through as they are, as Flower 1.41 lets them."""
    rest = {key: value for key, value in change.items() if value.shape}
    clipped, norm = clip(rest, bound, weight)
    return {key: clipped.get(key, np.asarray(value, np.float64)) for key, value in change.items()}, norm


class OtherDivisor(ClientDP):
    """Broken: the noise is for a mean over all clients of the run, the divisor is the clients of a round."""

    def open(self, *arguments: Any) -> Any:
        asked, occasion, memory, plan, ask = arguments
        share = client_dp.sampling_of(plan).expected / plan.clients
        quiet = replace(self, noise_multiplier=(self.noise_multiplier or 1.0) * share)
        return ClientDP.open(quiet, asked, occasion, memory, plan, ask)


class OneTurn(FTRL):
    """Broken: the sensitivity is that of a client that comes once."""

    def sensitivity(self, plan: Planned) -> float:
        return 1.0


class OneBound(LocalDP):
    """Broken: the noise is for updates that are a clip norm apart, and any two may be two."""

    def send(self, change: Arrays, told: Told, sender: Any) -> Arrays:
        return LocalDP.send(self, change, {SPREAD: float(told[SPREAD]) / 2}, sender)
