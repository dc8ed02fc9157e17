"""A finished run as an attacker's target: its model, the examples it was trained on, and others like them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedssl import seeds
from fedssl.config import Plan
from fedssl.datasets.base import Shard
from fedssl.errors import ConfigError
from fedssl.export import load_encoder
from fedssl.job.setup import build_model, data_of, device_of, public_of, shares_of, untrained
from fedssl.job.shards import as_dealt, as_held, parts_of
from fedssl.model import derive, load_arrays, tensors, to_arrays
from fedssl.partition import Indices
from fedssl.partition.base import owner_of
from fedssl.parts import Arrays, Share, part_of
from fedssl.privacy.audit.membership import Attacked, statistics
from fedssl.rundir import RunDirectory

DELTA = 1e-5  # where a run claims no epsilon, and so no delta


@dataclass(frozen=True)
class Claim:
    """What a run's accountant says; without an epsilon it says nothing."""

    epsilon: float | None
    delta: float = DELTA
    unit: str = "record"
    relation: str = "added or removed"
    counted: bool = False  # whether the number of records is taken as public

    @property
    def replaced(self) -> bool:
        """Whether neighbours are data sets with one unit replaced by another; by zeros is as good as removed."""
        return "replaced by any" in self.relation or self.relation == "replace_one"

    @classmethod
    def all_of(cls, run: RunDirectory) -> list[Claim]:
        """Those in privacy.json: of records, then of clients; without any, one that says nothing.

        Raises:
            ResumeError: the file is damaged.
        """
        told = run.read("privacy.json") if (run.path / "privacy.json").exists() else {}
        found = [cls._read(each) for each in (told.get("record"), told) if each and each.get("epsilon") is not None]
        return found or [cls(None)]

    @classmethod
    def _read(cls, told: Mapping[str, Any]) -> Claim:
        return cls(
            float(told["epsilon"]),
            float(told.get("delta") or DELTA),
            str(told.get("unit", cls.unit)),
            str(told.get("relation", cls.relation)),
            any("number of" in text for text in told.get("public") or ()),
        )

    def contradicted_by(self, epsilon: float) -> bool:
        """Whether a lower bound is above what was claimed."""
        return self.epsilon is not None and epsilon > self.epsilon


class Run:
    """What an audit reads of a finished run.

    Args:
        path: the run directory.
        examples: members and others, at most so many each.
        seed: draws them.

    Raises:
        ResumeError: no run, or one that has not ended.
        ConfigError: its clients hold a part of each example only, or no update was ever merged.
    """

    def __init__(self, run: RunDirectory, examples: int, seed: int) -> None:
        self.rundir, self.seed = run, seed
        self.plan = Plan.of(run.config())
        run.read("summary.json")  # refuses a run that has not ended
        self.job = self.plan.job
        torch.set_num_threads(self.job.threads)
        self.device = device_of(self.job)
        self.data = data_of(self.job, self.device)
        self.claims = Claim.all_of(run)
        if any(untrained(self.data, c, self._names) for c in range(self.job.federation.clients)):
            raise ConfigError(
                "some clients of this run hold one modality of each example, so that members and others would differ "
                "in more than membership: audit a run whose clients hold both"
            )
        rng = seeds.stream(seed, "audit", "examples")
        held = np.concatenate([self.parts[client] for client in self.participants])
        self.members = np.sort(rng.permutation(held)[:examples])
        self.others = np.sort(rng.permutation(len(self.data.test))[:examples])
        self._eyes = rng.choice(owner_of(self.parts), len(self.data.test))

    @cached_property
    def parts(self) -> list[Indices]:
        """The clients' rows of the training set."""
        return parts_of(self.job, self.device)

    @cached_property
    def participants(self) -> list[int]:
        """The clients of which at least one update was merged, sorted."""
        return sorted(self.steps)

    @cached_property
    def steps(self) -> dict[int, list[int | None]]:
        """Client -> how many steps each of its merged updates took; None where the run does not tell."""
        found: dict[int, list[int | None]] = {}
        for row in self.rundir.rows("clients.jsonl"):
            found.setdefault(int(row["client"]), []).append(row.get("steps"))
        if not found:
            raise ConfigError("no update was ever merged in this run, so it has no members: audit another")
        return found

    @property
    def classes(self) -> tuple[Any, Any]:
        """Labels of members and others, or None: many data sets were divided class by class."""
        train, test = self.data.train.targets, self.data.test.targets
        return (None, None) if train is None or test is None else (train[self.members], test[self.others])

    def statistics(self, run: RunDirectory | None = None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Of members and others, under this run's model or that of a shadow run: see `membership.statistics`."""
        return self._statistics(_released(self.rundir if run is None else run))

    def untrained(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The same under the model before any training, which knows nothing: a difference is one of the data."""
        return self._statistics(to_arrays(build_model(self.job, self.data.train.shape)))

    def _statistics(self, arrays: Arrays) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        attacked = self._attacked(arrays)
        inside = Shard.of(as_held(self.job, self.device), self.members)
        outside = Shard.of(as_dealt(self.job, self.device, self._eyes), self.others)
        return statistics(attacked, inside, "members"), statistics(attacked, outside, "others")

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _ in tensors(build_model(self.job, self.data.train.shape))]

    def _attacked(self, arrays: Arrays) -> Attacked:
        model = build_model(self.job, self.data.train.shape)
        load_arrays(model, {key: value for key, value in arrays.items() if key in set(self._names)})
        shares = shares_of(self.job, model)
        derived = [key for key, share in shares.items() if share is Share.derived]
        derive(model, self.job.method.parts, derived)
        lacking = {part_of(key) for key in self._names if key not in arrays and key not in derived}
        for part in self.job.method.parts:  # a copy of what is not known is not known either
            if set(part.follows) & lacking and f"{part.name}." in "".join(derived):
                lacking.add(part.name)
        known = frozenset(model.keys()) - lacking | {"encoder"}
        return Attacked(
            self.job.method,
            model.to(self.device),
            self.job.data.augment,
            known,
            public_of(self.job, self.device) if self.job.method.reads_public else None,
            seed=self.seed,
        )


def _released(run: RunDirectory) -> Arrays:
    """The arrays that left the federation: the last merged model, or at least the encoder."""
    encoder = {f"encoder.{key}": value for key, value in to_arrays(load_encoder(run.path).network).items()}
    point = run.latest()
    return encoder if point is None else {**encoder, **point.arrays}
