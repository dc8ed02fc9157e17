"""What has a proof, from the configuration alone: whose records are alone, and the change that makes them so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations
from typing import Any, cast

from fedssl.errors import FedsslError, PrivacyError
from fedssl.method import SSLMethod
from fedssl.model import Model
from fedssl.norms import has_batch_norm
from fedssl.parts import Coupling

# Options that take something from between records. The fewer of them are needed the better, and the earlier.
CHANGES = (
    ("norm", "group"),
    ("negatives", "public"),
    ("center", "public"),
    ("center", "none"),
    ("balance", "fixed"),
    ("decay_schedule", "constant"),
)


def alone(method: SSLMethod) -> str:
    """Why a record's loss or its traces are not its own, in half a sentence; empty if the method says they are."""
    if why := lingers(method):
        return why
    if method.coupling is Coupling.history:
        return "lets examples of earlier batches act on later ones"
    if method.coupling is Coupling.batch:
        return "has a loss in which the examples of a batch act on each other"
    return ""


def lingers(method: SSLMethod) -> str:
    """What of a record outlives its step, in half a sentence; empty if nothing does by the method's parts."""
    if method.summaries:
        return f"uploads a summary of its examples ({method.summaries[0]}) that no noise covers"
    for part in method.parts:
        if part.holds_examples or part.sized:
            return f"keeps what it has seen of examples in its part {part.name!r}, where they act in later steps"
    return ""


def changes(method: SSLMethod) -> tuple[str, ...] | None:
    """The fewest overrides after which `alone` has nothing to say; () if it has nothing now, None if none are known."""
    if not alone(method):
        return ()
    own = {field.name for field in fields(cast(Any, method))}
    usable = [(name, value) for name, value in CHANGES if name in own and getattr(method, name) != value]
    for chosen in _subsets(usable):
        try:
            other = cast(SSLMethod, replace(cast(Any, method), **dict(chosen)))
            if not alone(other):
                public = ("data@public=NAME",) if other.reads_public else ()
                return (*(f"method.{name}={value}" for name, value in chosen), *public)
        except FedsslError:
            continue
    return None


def _subsets(items: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], ...]]:
    for size in range(1, len(items) + 1):
        yield from (chosen for chosen in combinations(items, size) if len(dict(chosen)) == size)


def check_alone(method: SSLMethod, mechanism: str) -> None:
    """Refuse a method whose records are not alone.

    Raises:
        PrivacyError: with the reason and the nearest settings that have a proof.
    """
    why = alone(method)
    if not why:
        return
    name = type(method).__name__
    named = changes(method)
    first = f"set {' '.join(named)}, or " if named else ""
    raise PrivacyError(
        f"privacy={mechanism} has no proof for {name}, which {why}: {first}use {nearest(method, mechanism)}"
    )


def nearest(method: SSLMethod, mechanism: str) -> str:
    """Other ways to privacy that a refusal names."""
    return "method=byol method.norm=group, method=mae, or aggregation=client_dp, under which every method is valid"


def check_network(model: Model, method: SSLMethod) -> None:
    """Refuse batch normalisation anywhere, teachers and heads included.

    Raises:
        PrivacyError: with the part and what to set instead.
    """
    for name, part in model.items():
        if has_batch_norm(part):
            where = "encoder" if name in ("encoder", "teacher") else "method"
            raise PrivacyError(
                f"the {name} of {type(method).__name__} has batch normalisation, through which the records of a batch "
                f"act on each other and stay in its running statistics: use {where}.norm=group or layer"
            )
