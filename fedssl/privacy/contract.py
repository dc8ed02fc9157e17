"""What has a proof, from the configuration alone: whose records are alone, and the change that makes them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import combinations
from typing import Any, cast

from fedssl.errors import FedsslError, PrivacyError
from fedssl.method import SSLMethod
from fedssl.methods.sigmoid import SigmoidPairs
from fedssl.methods.simclr import SimCLR
from fedssl.model import Model
from fedssl.networks.norms import has_batch_norm
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


def normalised(method: SSLMethod) -> str:
    """Whether heads normalise over the batch, in half a sentence: running statistics keep what it was."""
    return "has batch normalisation in its heads" if getattr(method, "norm", "") == "batch" else ""


def changes(method: SSLMethod, objection: Callable[[SSLMethod], str] = alone) -> tuple[str, ...] | None:
    """The fewest overrides after which nothing is objected; () if nothing is now, None if none are known."""
    if not objection(method):
        return ()
    own = {field.name for field in fields(cast(Any, method))}
    usable = [(name, value) for name, value in CHANGES if name in own and getattr(method, name) != value]
    for chosen in _subsets(usable):
        try:
            other = cast(SSLMethod, replace(cast(Any, method), **dict(chosen)))
            if not objection(other):
                public = ("data@public=NAME",) if other.reads_public else ()
                return (*(f"method.{name}={value}" for name, value in chosen), *public)
        except FedsslError:
            continue
    return None


def _subsets(items: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], ...]]:
    for size in range(1, len(items) + 1):
        yield from (chosen for chosen in combinations(items, size) if len(dict(chosen)) == size)


def outlives(method: SSLMethod) -> str:
    """Why a record acts beyond its batch, in half a sentence; empty if the method says that it does not."""
    return normalised(method) if method.coupling is Coupling.batch and not lingers(method) else alone(method)


def check_alone(method: SSLMethod, mechanism: str) -> None:
    """Refuse a method whose records are not alone.

    Raises:
        PrivacyError: with the reason and the nearest settings that have a proof.
    """
    _refuse(method, mechanism, alone)


def check_stateless(method: SSLMethod, mechanism: str) -> None:
    """Refuse a method in which something of a record outlives its batch; what happens within it is not asked.

    Raises:
        PrivacyError: with the reason and the nearest settings that have a proof.
    """
    _refuse(method, mechanism, outlives)


def check_heads(method: SSLMethod, mechanism: str) -> None:
    """Refuse heads with batch normalisation.

    Raises:
        PrivacyError: with what to set instead.
    """
    _refuse(method, mechanism, normalised)


def _refuse(method: SSLMethod, mechanism: str, objection: Callable[[SSLMethod], str]) -> None:
    why = objection(method)
    if not why:
        return
    name = type(method).__name__
    named = changes(method, objection)
    first = f"set {' '.join(named)}, or " if named else ""
    raise PrivacyError(
        f"privacy={mechanism} has no proof for {name}, which {why}: {first}use {nearest(method, mechanism)}"
    )


def nearest(method: SSLMethod, mechanism: str) -> str:
    """Other ways to privacy that a refusal names, those that keep the method first."""
    norm = " method.norm=group" if getattr(method, "norm", "") == "batch" else ""
    ways = []
    if mechanism != "pairs" and type(method) in (SimCLR, SigmoidPairs):
        ways.append(f"privacy=pairs{norm}")
    if mechanism != "groups" and method.coupling is Coupling.batch and not lingers(method):
        ways.append(f"privacy=groups{norm}")
    alone_already = "" if mechanism == "example" else "privacy=example with "
    ways += [f"{alone_already}method=byol method.norm=group", "method=mae"]
    return f"{', '.join(ways)}, or aggregation=client_dp, under which every method is valid"


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
