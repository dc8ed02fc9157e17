"""Refusals shared by all losses: shapes, types and settings, none of which waits for the device."""

from __future__ import annotations

from torch import Tensor

from fedssl.errors import ConfigError


def check_floating(name: str, x: Tensor) -> None:
    """Refuses integers and booleans."""
    if not x.is_floating_point():
        raise ConfigError(f"{name} holds {x.dtype}, which has no gradient; pass floating-point embeddings.")


def check_embeddings(name: str, x: Tensor) -> None:
    """Refuses what is not a (B, D) batch of at least one floating-point example."""
    if x.ndim != 2 or x.numel() == 0:
        raise ConfigError(
            f"{name} has the shape {tuple(x.shape)}, but a loss is per example and needs (B, D) with at least one "
            "example and one dimension; flatten the features, or skip an empty batch."
        )
    check_floating(name, x)


def check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Refuses two batches whose rows do not belong together."""
    check_embeddings(name_a, a)
    check_embeddings(name_b, b)
    if a.shape != b.shape:
        raise ConfigError(
            f"{name_a} has the shape {tuple(a.shape)} and {name_b} {tuple(b.shape)}, so rows cannot be paired; pass "
            "two views of the same examples in one order and one dimension."
        )


def check_batch(z: Tensor, what: str) -> None:
    """Refuses a batch of one example to a loss of batch statistics."""
    if len(z) < 2:
        raise ConfigError(
            f"This loss takes {what} over the batch and got one example; give each client more examples "
            "(partition.min_size) or larger batches, or choose a method that takes examples one by one, such as byol."
        )


def check_negatives(negatives: Tensor, anchor: Tensor) -> None:
    """Refuses negatives that are neither (K, D) nor (B, K, D) beside anchors of (B, D)."""
    b, d = anchor.shape
    shape = tuple(negatives.shape)
    if len(shape) not in (2, 3) or shape[-1] != d or (len(shape) == 3 and shape[0] != b):
        raise ConfigError(
            f"negatives has the shape {shape} beside anchors of ({b}, {d}), so they cannot be compared; pass (K, {d}) "
            f"shared by the batch or ({b}, K, {d}) for each anchor."
        )


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> None:
    """Refuses a number that is not above 0; of a tensor only the shape, as its value would have to be waited for."""
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0:
            raise ConfigError(
                f"The {name} has the shape {tuple(temperature.shape)}, but one value divides all similarities; pass a "
                "number or a 0-d tensor."
            )
    elif not temperature > 0:  # also refuses nan
        raise ConfigError(
            f"The {name} is {temperature}, but similarities are divided by it; set a value above 0, often 0.1."
        )
