"""Feature skew: who holds what is as without it, but each client sees its examples in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.partition.base import Labels, Partition, Parts, Split, Splittable
from fedssl.partition.even import Iid, iid
from fedssl.partition.virtual import Virtual

SPREADS = ("even", "drawn")
SIGNED = ("rotation", "temperature", "gain")  # either way; blur and noise go one way only
_MOST = {"rotation": 180.0, "blur": 0.5, "temperature": 2.0, "gain": 3.0, "noise": math.inf}


@dataclass(frozen=True)
class Appearance:
    """How one client sees every example, before augmentation; all 0: as it is.

    Attributes:
        rotation: degrees, counter-clockwise; of time series, of the sensor about `axis`.
        blur: standard deviation of a Gaussian, as a share of the side or of the length.
        temperature: of the light, images in colour only: red is multiplied by its exponential, blue divided by it, and
            white keeps its luma. Where 0 is 6,500 K, Wien's law makes 0.3 a lamp of 4,300 K and -0.3 a sky of 13,600 K.
        gain: the logarithm of the exposure, or of the sensor's sensitivity.
        noise: standard deviation of Gaussian noise, fixed for each example: on the 0-1 scale of images, as a share of
            each channel's standard deviation of time series.
        axis: (x, y, z), which the sensor is turned about.
    """

    rotation: float = 0.0
    blur: float = 0.0
    temperature: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)


def feature_shift(targets: Labels | int, clients: int, rng: np.random.Generator, *, base: Split = iid) -> Parts:
    """The parts of a federation with feature skew: those of `base`, drawn alike, so that nothing else differs.

    How each client sees its part is said by `FeatureShift.appearances`.

    Args:
        targets: (n,) labels, or n where `base` needs none.
        clients: number of parts.
        rng: the only source of randomness.
        base: any partition function; its other arguments bound, e.g. `functools.partial(dirichlet, alpha=0.3)`.
    """
    return base(targets, clients, rng)


@dataclass(frozen=True)
class FeatureShift:
    """Feature skew: each client sees its examples, split by `base`, through its own fixed transformation.

    Each option is the largest strength; 0 leaves it out. Rotation, temperature and gain go either way.

    Args:
        rotation, blur, temperature, gain, noise: as in `Appearance`.
        spread: "even": the clients' strengths lie at equal distances from one end to the other; the first option in
            use rises with the client's number, the others are dealt out at random so that they are not tied to it.
            "drawn": uniform.
        base: who holds what.

    Raises:
        ConfigError: a strength out of range, or a base that has feature skew itself.
    """

    rotation: float = 45.0
    blur: float = 0.0
    temperature: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    spread: str = "even"
    base: Partition = field(default_factory=Iid)

    def __post_init__(self) -> None:
        if isinstance(self.base, Virtual):
            raise ConfigError("partition.base is virtual, whose examples belong to nobody alone; use another base.")
        for name, most in _MOST.items():
            strength = getattr(self, name)
            if not (0 <= strength <= most and math.isfinite(strength)):
                raise ConfigError(f"partition.{name} is {strength} but it is a largest strength; use 0 to {most:g}.")
        if self.spread not in SPREADS:
            raise ConfigError(f"partition.spread is {self.spread!r}, which is not known; use {' or '.join(SPREADS)}.")
        if isinstance(self.base, FeatureShift):
            raise ConfigError("partition.base has feature skew of its own, which cannot be added up; use another base.")

    @property
    def uses_labels(self) -> bool:
        """Whether the base does."""
        return self.base.uses_labels

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `feature_shift`."""
        return self.base.split(data, clients, rng)

    def appearances(self, clients: int, seed: int) -> tuple[Appearance, ...]:
        """How each client sees its examples: the same on every machine."""
        rng = seeds.stream(seed, "appearance")
        columns = {name: self._strengths(name, clients, rng) for name in _MOST if getattr(self, name) > 0}
        axes = seeds.stream(seed, "appearance", "axis").standard_normal((clients, 3))
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
        out = []
        for client, (x, y, z) in enumerate(axes.tolist()):
            own = {name: float(column[client]) for name, column in columns.items()}
            out.append(Appearance(**own, axis=(x, y, z)))
        return tuple(out)

    def _strengths(self, name: str, clients: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """(clients,) from -strength, or 0, to strength."""
        most = getattr(self, name)
        low = -most if name in SIGNED else 0.0
        if self.spread == "drawn":
            return rng.uniform(low, most, clients)
        first = next(option for option in _MOST if getattr(self, option) > 0)
        order = np.arange(clients) if name == first else rng.permutation(clients)
        return np.linspace(low, most, clients)[order]
