"""Mechanisms for records that meet, each wrong in one place."""

from __future__ import annotations

from typing import Any

import pytest

from fedssl.privacy.coupled import pair_dp, statistics_dp
from fedssl.privacy.coupled.group_dp import GroupDP
from fedssl.privacy.coupled.pair_rules import NTXentPairs
from fedssl.privacy.example_dp import clipped_gradients
from fedssl.privacy.per_record import Engine


def quieten_the_statistic(patch: pytest.MonkeyPatch) -> None:
    """Broken: the statistic's noise is a quarter of what is accounted."""
    sound = statistics_dp.multipliers

    def quieter(noise_multiplier: float, share: float) -> tuple[float, float]:
        first, second = sound(noise_multiplier, share)
        return first / 4, second

    patch.setattr(statistics_dp, "multipliers", quieter)


class PerRow(GroupDP):
    """Broken: the rows of a group are clipped, not the group, so that an empty slot takes `size` bounds away."""

    def noisy_sum(self, *arguments: Any) -> Any:
        method, model, batch, step, planned, noise = arguments
        sums, out = clipped_gradients(self, Engine.vmap, method, model, batch, step)
        return [total + noise.like(total, planned.noise_multiplier * self.clip_norm) for total in sums], out


class OneBound(GroupDP):
    """Broken: labels with the noise of slots, although a record turns its group round."""

    @property
    def sensitivity(self) -> float:
        return self.clip_norm


def forget_the_others_weights(patch: pytest.MonkeyPatch) -> None:
    """Broken: the noise is for the record's own pair only, as if its weight in all other rows were nothing."""

    class Own(NTXentPairs):
        def sensitivity(self, temperature: float) -> float:
            return 1 / temperature

    patch.setattr(pair_dp, "NTXentPairs", Own)
