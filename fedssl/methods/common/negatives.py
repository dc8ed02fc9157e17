"""Where negatives come from: a client's own examples, or public ones, which leave its examples uncoupled."""

from __future__ import annotations

from torch import Tensor, nn

from fedssl import temperature as rules
from fedssl.errors import ConfigError
from fedssl.method import Batch
from fedssl.parts import Coupling

PUBLIC = "public"


def check_negatives(negatives: str, own: str) -> None:
    """Refuse a word that is not known.

    Args:
        negatives: the method's option.
        own: its word for negatives among the client's own examples.

    Raises:
        ConfigError: neither that word nor public.
    """
    if negatives not in (own, PUBLIC):
        raise ConfigError(f"method.negatives={negatives!r} is unknown: use {own} or {PUBLIC}")


def coupling_of(negatives: str, norm: str, temperature: float | str | rules.Rule, own: Coupling) -> Coupling:
    """What an example's loss may depend on: with public negatives on nothing of the client but the example.

    Public keys are a function of the weights and of public examples. What may still couple are batch normalisation,
    and a rule that reads a batch's scores for its temperature.

    Args:
        negatives: public, or the method's word for its own.
        norm: of the head.
        temperature: as configured.
        own: the coupling with negatives of its own.
    """
    if negatives != PUBLIC:
        return own
    chosen = rules.rule(temperature)
    reads = not isinstance(chosen, float) and chosen.reads_scores
    return Coupling.batch if norm == "batch" or reads else Coupling.none


def public_keys(network: nn.Module, batch: Batch) -> Tensor:
    """(P, D) projections of the public examples beside a batch, with their gradient.

    Where no teacher makes the keys, they must be pushed too: a network whose views alone are pushed moves its keys
    along, and collapses. So every record sends a gradient through all P of them: the work of P views more.

    Raises:
        ConfigError: there are none beside the batch.
    """
    if batch.public is None:
        raise ConfigError("method.negatives=public has no public examples beside the batch: add data@public=NAME")
    keys: Tensor = network(batch.public)
    return keys
