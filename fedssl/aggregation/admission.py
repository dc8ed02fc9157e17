"""What cannot be combined with an aggregation that shows the strategy one mean instead of every update."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from fedssl.compression import Compression
from fedssl.errors import ConfigError

MEANS = ("FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedProx")  # Flower's, of which this is known


@runtime_checkable
class Reader(Protocol):
    """A strategy that says what it reads: "mean" or "each"."""

    reads: str


def reads_mean(strategy: object) -> bool:
    """Whether a strategy needs the mean of the updates only."""
    if isinstance(strategy, Reader):
        return strategy.reads == "mean"
    return type(strategy).__module__.startswith("flwr.") and type(strategy).__name__ in MEANS


def refuse(strategy: object, summaries: Collection[str], compression: Compression) -> None:
    """Refuse what reads single updates, or changes them after they are bounded.

    Args:
        strategy: the one that would merge.
        summaries: parts of the method in which each client summarises its data.
        compression: how updates are coded.

    Raises:
        ConfigError: for the first that does not fit.
    """
    name = type(strategy).__name__
    if summaries:
        part = sorted(summaries)[0]
        raise ConfigError(
            f"each client sends {part!r}, a summary of its own data that is no change of a weight, and this "
            "aggregation shows the server only a mean: use another method, or aggregation=plain"
        )
    if not reads_mean(strategy):
        raise ConfigError(
            f"{name} compares the updates of single clients, and this aggregation shows it only their mean: "
            "use strategy=fedavg, fedprox, fedadam, fedyogi, fedavgm or fedema, or aggregation=plain"
        )
    if not compression.lossless:
        raise ConfigError(
            f"compression.keep={compression.keep} and values={compression.values} would change an update after the "
            "aggregation has bounded it: use compression=none; compression.down=float16 is allowed"
        )
