"""The state of any strategy as arrays and scalars, so that Flower's own strategies resume as ours do.

Flower keeps what a strategy learns (the moments of FedAdam, say) in its attributes. Every attribute that is a number,
an array, or a dictionary or list of arrays is state; functions and words are configuration, and
names with a leading underscore hold nothing beyond a round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedssl.parts import Arrays

_ARRAY = (np.ndarray, np.generic)  # arithmetic turns 0-d arrays into scalars


def take(strategy: object) -> tuple[Arrays, dict[str, Any]]:
    """Copy the state out: arrays under "attribute", "attribute/key" or "attribute#index", and scalars by attribute."""
    arrays: Arrays = {}
    scalars: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if name.startswith("_"):
            continue
        if isinstance(value, bool | int | float):
            scalars[name] = value
        elif isinstance(value, _ARRAY):
            arrays[name] = np.array(value)
        elif isinstance(value, dict) and value and all(isinstance(v, _ARRAY) for v in value.values()):
            arrays.update({f"{name}/{key}": np.array(v) for key, v in value.items()})
        elif isinstance(value, list) and value and all(isinstance(v, _ARRAY) for v in value):
            arrays.update({f"{name}#{i:06d}": np.array(v) for i, v in enumerate(value)})
    return arrays, scalars


def give(strategy: object, arrays: Arrays, scalars: dict[str, Any]) -> None:
    """Put a state back into a new strategy of the same configuration."""
    groups: dict[str, Any] = dict(scalars)
    for key, value in sorted(arrays.items()):
        if "/" in key:
            name, _, inner = key.partition("/")
            groups.setdefault(name, {})[inner] = value
        elif "#" in key:
            groups.setdefault(key.partition("#")[0], []).append(value)
        else:
            groups[key] = value
    for name, value in groups.items():
        setattr(strategy, name, value)
