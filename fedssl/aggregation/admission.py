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


@runtime_checkable
class Rated(Protocol):
    """Example-level privacy whose steps sample records at a rate."""

    sample_rate: float | None


def reads_mean(strategy: object) -> bool:
    """Whether a strategy needs the mean of the updates only."""
    if isinstance(strategy, Reader):
        return strategy.reads == "mean"
    return type(strategy).__module__.startswith("flwr.") and type(strategy).__name__ in MEANS


def refuse(
    strategy: object, summaries: Collection[str], compression: Compression, quorum: float, privacy: object, secret: bool
) -> None:
    """Refuse what reads single updates, changes them after they are bounded, or tells what they hide.

    Args:
        strategy: the one that would merge.
        summaries: parts of the method in which each client summarises its data.
        compression: how updates are coded.
        quorum: updates that a round needs, or their share of those that are asked.
        privacy: of examples.
        secret: whether cohorts do not follow from the run's seed.

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
    if quorum != 1:
        raise ConfigError(
            f"federation.quorum={quorum} would tell how many clients took part, which the aggregation hides: use "
            "federation.quorum=1"
        )
    if isinstance(privacy, Rated) and privacy.sample_rate is None:
        raise ConfigError(
            "privacy.sample_rate=null makes the number of a client's records public, which the aggregation hides: "
            "give a rate, such as privacy.sample_rate=0.1"
        )
    if isinstance(privacy, Rated) and secret:
        raise ConfigError(
            "clients find the rounds that their records pay for by the run's seed, and aggregation.secure=true draws "
            "cohorts from a secret: use aggregation=ftrl with participation=cohorts, or privacy=none"
        )
