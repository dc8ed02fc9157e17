"""The bounds that the owner of a device sets in its node's configuration, and what follows from them for a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedssl.edge import sensors
from fedssl.edge.allowance import Allowance
from fedssl.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a device may give to a round; None: there is no bound.

    Attributes:
        seconds: `time-budget`, from the instruction's arrival to the last step, > 0; a round takes one step at least.
        min_battery: `min-battery`, the share of charge below which a device on battery declines a round, in [0, 1].
        max_celsius: `max-celsius`, the degrees above which it declines.
    """

    seconds: float | None = None
    min_battery: float | None = None
    max_celsius: float | None = None

    @classmethod
    def of(cls, node: Mapping[str, object]) -> Limits:
        """Read a node's configuration.

        Raises:
            ConfigError: a bound that is no number, or out of its range.
        """
        return cls(
            _number(node, "time-budget", "seconds above 0", 0.0, math.inf, above=True),
            _number(node, "min-battery", "a share of the charge in [0, 1]", 0.0, 1.0),
            _number(node, "max-celsius", "degrees Celsius", -273.15, math.inf),
        )

    def allowance(self) -> Allowance | None:
        """The time of a round that begins now."""
        return None if self.seconds is None else Allowance(self.seconds)

    def declined(self, root: Path | None = None) -> str:
        """Why the device takes no step in a round that begins now; empty if it may.

        Raises:
            ConfigError: there is a bound, and nothing that measures.
        """
        root = sensors.ROOT if root is None else root
        if self.min_battery is not None:
            battery = sensors.battery(root)
            if battery is None:
                raise ConfigError(_blind("min-battery", self.min_battery, "battery", root / "power_supply"))
            if not battery.powered and battery.charge < self.min_battery:
                return f"its battery is at {battery.charge:.0%}, below min-battery={self.min_battery:g}, not charging"
        if self.max_celsius is not None:
            degrees = sensors.celsius(root)
            if degrees is None:
                raise ConfigError(_blind("max-celsius", self.max_celsius, "temperature", root / "thermal"))
            if degrees > self.max_celsius:
                return f"it has {degrees:.0f} degrees Celsius, above max-celsius={self.max_celsius:g}"
        return ""


def _blind(key: str, value: float, what: str, where: Path) -> str:
    return (
        f"this node has {key}={value:g} and shows no {what} in {where}: a bound that nothing measures protects "
        "nothing, leave it out"
    )


def _number(
    node: Mapping[str, object], key: str, what: str, low: float, high: float, *, above: bool = False
) -> float | None:
    found = node.get(key)
    if found is None:
        return None
    ok = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if not ok or not low <= found <= high or (above and found == low):  # type: ignore[operator]  # a number by now
        raise ConfigError(f"this node has {key}={found!r}: give {what} in its node-config, or leave it out")
    return float(found)  # type: ignore[arg-type]
