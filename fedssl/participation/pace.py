"""How fast the clients are: the time that each needs for all its local steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedssl import seeds
from fedssl.errors import ConfigError


@dataclass(frozen=True)
class Lognormal:
    """Each client has a speed of its own, and each turn varies about it; both are log-normal.

    Attributes:
        median_s: of a turn, in seconds.
        sigma: standard deviation of the logarithm between clients; 0.5: one client in six needs 1.65 times the median.
        jitter: standard deviation of the logarithm between the turns of one client.
    """

    median_s: float = 60.0
    sigma: float = 0.5
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.median_s < math.inf and 0 <= self.sigma < 5 and 0 <= self.jitter < 5):
            raise ConfigError(
                f"pace: median_s={self.median_s}, sigma={self.sigma}, jitter={self.jitter} are not times: "
                "give a median above 0, and sigma and jitter in [0, 5)"
            )

    def seconds(self, client: int, at: int, seed: int) -> float:
        """See `Pace`."""
        between = seeds.stream(seed, "pace", client).standard_normal()
        within = seeds.stream(seed, "pace", client, at).standard_normal()
        return self.median_s * math.exp(self.sigma * between + self.jitter * within)


@dataclass(frozen=True)
class Listed:
    """The times of the clients in order, always the same; a list shorter than the clients repeats.

    Attributes:
        times_s: in seconds.
    """

    times_s: tuple[float, ...] = (60.0, 60.0, 60.0, 120.0)

    def __post_init__(self) -> None:
        if not self.times_s or not all(0 < time < math.inf for time in self.times_s):
            raise ConfigError(f"pace.times_s={list(self.times_s)} are not times: list numbers above 0")

    def seconds(self, client: int, at: int, seed: int) -> float:
        """See `Pace`."""
        return self.times_s[client % len(self.times_s)]
