"""What a model is made of, as data: named parts, who owns them, and how examples may be coupled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Protocol, runtime_checkable

import numpy as np

from fedssl.errors import ConfigError, PrivacyError

Arrays = dict[str, np.ndarray]  # "encoder.stem.weight" -> array; the part is the first component of every name


class Share(StrEnum):
    """Who owns a part between rounds."""

    merge = auto()  # sent to the server, merged there, returned with the next instruction
    local = auto()  # stays on the client, in its Context.state
    derived = auto()  # rebuilt by the client from the parts it follows: 0 bytes
    received = auto()  # made by the server, comes with every instruction, is never sent back

    @property
    def comes(self) -> bool:
        """Whether the server sends it with every instruction."""
        return self in (Share.merge, Share.received)


class Coupling(StrEnum):
    """What one example's loss may depend on, besides the example and the parameters."""

    none = auto()  # nothing else: per-example gradients are well defined
    batch = auto()  # the other examples of the batch
    history = auto()  # examples of earlier batches (queue, memory bank, running centre)


@dataclass(frozen=True)
class Part:
    """One part of a model: a key of its `nn.ModuleDict`.

    Attributes:
        name: the key, e.g. "encoder".
        trainable: whether gradients reach it.
        share: who owns it unless the strategy's `share` says otherwise.
        follows: for a teacher, the parts that it copies when it is derived and tracks by EMA.
        frozen: whether it is their copy as a round begins and stays so until the next; then it is always derived.
        holds_examples: whether it stores (embeddings of) examples; merging such a part is refused unless allowed.
        sized: whether its shape depends on the client's number of examples, as a memory bank's does.
    """

    name: str
    trainable: bool = True
    share: Share = Share.merge
    follows: tuple[str, ...] = ()
    holds_examples: bool = False
    sized: bool = False
    frozen: bool = False

    @property
    def teaches(self) -> bool:
        """Whether it moves with what it follows, as a teacher does."""
        return bool(self.follows) and not self.frozen


@runtime_checkable
class Owner(Protocol):
    """A strategy that has a say in who owns which part, and may need summaries that only some methods make."""

    @property
    def needs(self) -> Collection[str]:
        """Of a method's `summaries`, those that it reads."""
        ...

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Its word on who owns which of a model's parts; the configuration's `share` wins over it."""
        ...


@dataclass(frozen=True)
class Layout:
    """What the arrays of a model are, told by the modules that hold them, never by their names.

    Attributes:
        parameters: arrays that gradients can change, as against buffers such as running statistics.
        kernels: weights of convolutions.
        follows: for each teacher the parts that it tracks; `teacher.encoder.x` is the copy of `encoder.x`.
    """

    parameters: frozenset[str]
    kernels: frozenset[str]
    follows: Mapping[str, tuple[str, ...]]


def part_of(key: str) -> str:
    """The part that an array belongs to: `part_of("encoder.stem.weight") == "encoder"`."""
    return key.partition(".")[0]


def resolve_shares(
    parts: Sequence[Part],
    override: Mapping[str, str],
    keys: Iterable[str],
    norm_keys: frozenset[str],
    allow: Collection[str] = (),
) -> dict[str, Share]:
    """Decide for each array of a model who owns it.

    Args:
        parts: the parts that the method declares.
        override: the strategy's `share`; keys are a part ("predictor"), the normalisation layers of a part
            ("encoder:norm") or of all parts ("*:norm"); values are those of `Share`. A more specific key wins.
        keys: the names of all arrays of the model.
        norm_keys: those names that belong to normalisation layers.
        allow: the parts that may be merged although they hold examples.

    Raises:
        ConfigError: an override names no part, derives a part that follows nothing, or merges one whose size is the
            client's; or `allow` names no part.
        PrivacyError: a part that holds examples would be merged.
    """
    by_name = {part.name: part for part in parts}
    for name in allow:
        if name not in by_name:
            raise ConfigError(f"payload.allow names {name!r}, no part of this method: use some of {', '.join(by_name)}")
    for pattern, value in override.items():
        name, _, kind = pattern.partition(":")
        if (name not in by_name and name != "*") or (":" in pattern and kind != "norm") or (name == "*" and not kind):
            raise ConfigError(
                f"share.{pattern} names no part of this method: use one of {', '.join(by_name)}, "
                "a part followed by ':norm', or '*:norm'"
            )
        if value not in list(Share):
            raise ConfigError(f"share.{pattern}={value!r} is not merge, local or derived, nor received")
        if value == Share.derived and (kind or not by_name[name].follows):
            raise ConfigError(f"share.{pattern}=derived, but nothing says what to derive it from: use merge or local")
        if name != "*" and by_name[name].frozen and value != Share.derived:
            raise ConfigError(f"share.{pattern}={value}, but {name} is a copy of how a round began: leave it out")
        if kind and name != "*" and override.get(name, by_name[name].share) == Share.derived:
            raise ConfigError(
                f"share.{pattern}={value} cuts a derived part apart, which is a copy as a whole: "
                f"set share.{name} to merge or local first"
            )
    shares: dict[str, Share] = {}
    for key in keys:
        part = by_name[part_of(key)]
        patterns = [part.name, *(("*:norm", f"{part.name}:norm") if key in norm_keys else ())]
        if override.get(part.name, part.share) == Share.derived:
            patterns = []  # a derived part is a copy as a whole: its norm layers follow their originals
        chosen = [override[p] for p in patterns if p in override]
        shares[key] = Share(chosen[-1]) if chosen else Share(override.get(part.name, part.share))
        if shares[key] is not Share.merge:
            continue
        if part.holds_examples and part.name not in allow:
            raise PrivacyError(
                f"part {part.name!r} holds embeddings of single examples and share=merge would upload them; "
                f"use strategy.share.{part.name}=local, or payload.allow=[{part.name}] if every client agrees to that"
            )
        if part.sized:
            raise ConfigError(
                f"part {part.name!r} has one entry an example, so no two clients' can be merged: "
                f"use strategy.share.{part.name}=local"
            )
    return shares
