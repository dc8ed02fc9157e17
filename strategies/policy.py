"""PartPolicy: who merges each part, by which weight, and how a client receives it, all as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedssl import tree
from fedssl.build import construct
from fedssl.errors import ConfigError
from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout, Part, part_of
from strategies import rules
from strategies.base import PartStrategy, Update
from strategies.fedema import refreshed_teachers

WEIGHTS = ("examples", "uniform")
RECEIVES = ("overwrite", "keep", "ema", "gate")
FEDBYOL: Mapping[str, Mapping[str, str]] = {
    "encoder": {"receive": "overwrite"},
    "projector": {"receive": "overwrite"},
    "predictor": {"receive": "overwrite"},
    "teacher": {"receive": "keep"},
}
MOVED = "moved"  # memo: the squared distance that the last training moved the online network


@dataclass(frozen=True)
class Policy:
    """What happens to one part.

    Attributes:
        merges: the part whose trained values the server averages into this one; empty: its own. A teacher can stand
            in for what it follows: `encoder: {merges: teacher}`.
        weight: examples or uniform.
        receive: overwrite by the server's values, keep the client's own, blend them (ema), or keep the client's own
            only where its last training moved the encoder far (gate, as FedU's predictor).
        mu: share of its own that a client keeps in a blend, in [0, 1].
        threshold: of the squared distance that the encoder moved, from which a gate keeps the client's own.
    """

    merges: str = ""
    weight: str = "examples"
    receive: str = "overwrite"
    mu: float = 0.5
    threshold: float = 0.4

    def __post_init__(self) -> None:
        for name, value, allowed in (("weight", self.weight, WEIGHTS), ("receive", self.receive, RECEIVES)):
            if value not in allowed:
                raise ConfigError(f"strategy.parts: {name}={value!r} is unknown: use {', '.join(allowed)}")
        if not 0 <= self.mu <= 1:
            raise ConfigError(f"strategy.parts: mu={self.mu} leaves the line between two models: give one in [0, 1]")


@dataclass
class PartPolicy(PartStrategy):
    """Weighted means of parts, each with its own `Policy`; a part that is not named has the default one.

    The update policies of FedBYOL (Zhuang et al. 2021, figure 4) are tables of it: which network the server averages,
    online or target; which of the two a client overwrites; whose predictor it uses. A client that has never trained
    takes the server's values whatever the policy. A teacher that is not averaged costs no bytes: `keep` leaves it with
    its client, `overwrite` makes it the copy of the server's online network.

    Attributes:
        parts: part -> the options of its `Policy`; by default FedBYOL's.
    """

    parts: Mapping[str, Any] = field(default_factory=lambda: FEDBYOL)

    def __post_init__(self) -> None:
        _ = self._policies  # wrong options are refused when they are read

    @cached_property
    def _policies(self) -> dict[str, Policy]:
        return {name: construct(Policy, dict(node), f"strategy.parts.{name}") for name, node in self.parts.items()}

    def _of(self, part: str) -> Policy:
        return self._policies.get(part, Policy())

    @property
    def keeps(self) -> Collection[str]:
        """The parts that a client does not simply overwrite."""
        return [name for name, policy in self._policies.items() if policy.receive != "overwrite"]

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Teachers that the server averages are sent; others stay at home."""
        follows = {part.name: part.follows for part in parts}
        merged = {policy.merges for policy in self._policies.values() if policy.merges}
        for name, policy in self._policies.items():
            if policy.merges and name in follows and name not in follows.get(policy.merges, ()):
                raise ConfigError(
                    f"strategy.parts.{name} merges {policy.merges!r}, which is no teacher of it in this method: "
                    "choose a method with one, such as byol, or another strategy"
                )
        chosen = {}
        for part in parts:
            if part.teaches and part.name in merged:
                chosen[part.name] = "merge"
            elif part.teaches and part.name in self._policies:
                chosen[part.name] = "local"
        return chosen

    def weigh(self, update: Update, part: str) -> float:
        """By the policy of the part, or of the one that it stands in for."""
        stands_for = [name for name, policy in self._policies.items() if policy.merges == part]
        return update.weight if self._of((stands_for or [part])[0]).weight == "examples" else 1.0

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean of each part, or of the part that stands in for it."""
        mean = updates[0].arrays
        sources = {key: f"{merges}.{key}" for key in now if (merges := self._of(part_of(key)).merges)}
        return {key: mean[sources.get(key, key)] for key in now}

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """Each part by its policy."""
        start = dict(now)
        if own.round:
            for name, policy in self._policies.items():
                start |= self._received(policy, now, rules.of_parts(own.arrays, (name,)), own.memo)
        fresh = refreshed_teachers(now, layout)
        for teacher in layout.follows:
            if teacher in self._policies and (not own.round or self._of(teacher).receive == "overwrite"):
                start |= {key: value for key, value in rules.of_parts(fresh, (teacher,)).items() if key not in now}
        return start, own.memo

    def _received(self, policy: Policy, now: Arrays, mine: Arrays, memo: Memo) -> Arrays:
        if policy.receive == "keep":
            return mine
        if policy.receive == "ema":
            return rules.blend(now, mine, policy.mu)
        return mine if policy.receive == "gate" and memo.get(MOVED, 0.0) >= policy.threshold else {}

    def remember(self, start: Arrays, trained: Arrays, memo: Memo, layout: Layout) -> Memo:
        """How far training moved the encoder, where a gate reads it."""
        if not any(policy.receive == "gate" for policy in self._policies.values()):
            return memo
        online = {k: v for k, v in rules.of_parts(trained, ("encoder",)).items() if k in layout.parameters}
        return {**memo, MOVED: tree.squared_distance(online, start)}
