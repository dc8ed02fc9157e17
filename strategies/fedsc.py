"""FedSC: average the networks, and give each client the mean of the others' correlation matrices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout
from strategies import rules
from strategies.base import PartStrategy, Update

MATRIX, CLIENTS = "correlation.matrix", "correlation.clients"  # arrays of the method of the same name


@dataclass
class FedSC(PartStrategy):
    """FedSC (Jing et al. 2024, https://arxiv.org/abs/2405.03949), for the method of that name.

    The networks are averaged as by FedAvg, the matrices with one voice a client, so a sum is all that the server needs.
    A client that was in that mean takes its own matrix out of it; one that sat out the last round has none in it. (The
    authors keep the matrices of absent clients, zero before their first round; here the mean is over who came.) If a
    reply is lost on its way, under federation.tolerate, its client takes out what was not in.
    """

    needs: ClassVar[tuple[str, ...]] = ("correlation",)

    @property
    def keeps(self) -> Collection[str]:
        """Its own matrix, as it sent it."""
        return self.needs

    def weigh(self, update: Update, part: str) -> float:
        """Examples; each client once for the matrices."""
        return 1.0 if part in self.needs else update.weight

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The means, and over how many clients they are."""
        (mean,) = updates
        return {**mean.arrays, CLIENTS: np.array(mean.clients, dtype=now[CLIENTS].dtype)}

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """The server's networks, and the mean of the others' matrices."""
        came = own.arrays[MATRIX] if own.round == at - 1 and own.arrays else None
        matrix, clients = rules.others_mean(now[MATRIX], int(now[CLIENTS]), came)
        return {**now, MATRIX: matrix, CLIENTS: np.array(clients, dtype=now[CLIENTS].dtype)}, own.memo
