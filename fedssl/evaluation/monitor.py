"""The collapse monitor: what a measured round did to each part of each model, as rows; no labels but for kNN."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from fedssl import diagnostics, partition
from fedssl.evaluation.evaluator import Evaluator, Seen
from fedssl.measures.alarms import Alarm, at_end, judge
from fedssl.measures.collapse import WeightLog, by_client, describe, likeness
from fedssl.measures.outputs import Outputs
from fedssl.parts import Arrays, part_of

Row = dict[str, Any]
Parts = dict[str, Row]  # part -> its measures
MERGED = "merged"  # in the place of a client's number
_COMPACT = (
    "rankme",
    "effective_rank",
    "feature_std",
    "uniformity",
    "alignment",
    "uniformity_intra",
    "uniformity_inter",
)
_MOTION = ("moved", "gap", "step")  # as `Movement` names them, after a part's name


@dataclass
class Watch:
    """A measured round while it goes on: the models of some clients, and a few numbers of all."""

    at: int
    initial: Arrays
    now: Arrays  # the merged arrays as the round begins
    watched: Collection[int]
    weights: WeightLog
    kept: dict[int, tuple[Arrays, Collection[str]]] = field(default_factory=dict)  # all arrays, and the client's own

    def keep(self, client: int, arrays: Arrays, local: Arrays) -> None:
        """Take note of a client's update, and of what stays at home where that is known."""
        self.weights.add(client, arrays)
        own = arrays | local
        if client in self.watched and any(part_of(key) == "encoder" for key in own):
            self.kept[client] = (self.initial | self.now | own, own.keys())


class Monitor:
    """Measures rounds: the merged model before and after, and some clients' in between.

    Args:
        evaluator: passes the examples through models.
        shards: the training examples of each client.
        method: the options of the method, which may explain a collapse.
        rows: of `collapse.jsonl`, if the run has begun.
    """

    def __init__(
        self, evaluator: Evaluator, shards: partition.Parts, method: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        self._evaluator, self._method, self._rows = evaluator, method, list(rows)
        self._owners = _owners(shards, np.asarray(evaluator.bank))

    def final(self, arrays: Arrays, keys: Collection[str], last: int) -> tuple[dict[str, float], list[Alarm]]:
        """The numbers of the model that a run ends with, as in `metrics.jsonl`, and all alarms of the run.

        Args:
            arrays: of the whole model.
            keys: the merged ones.
            last: the run's last round.
        """
        seen = self._evaluator.look(arrays, keys)
        mine = self._parts(seen)
        alarms = at_end(self._rows, self._method, mine["encoder"], last, mine["encoder"]["dim"])
        return self._compact(seen, mine), alarms

    def watch(self, at: int, initial: Arrays, now: Arrays, clients: Collection[int]) -> Watch:
        """Begin to measure a round: the models of these clients will be kept until it is closed."""
        weights = {key: now[key] for key in self._evaluator.parameters if key in now}
        return Watch(at, initial, now, clients, WeightLog(weights))

    def news(self, rows: Sequence[Row]) -> list[Alarm]:
        """The alarms that the rows of a new round raise for the first time."""
        known = {(alarm.name, alarm.part) for alarm in judge(self._rows, self._method)}
        self._rows += rows
        return [alarm for alarm in judge(self._rows, self._method) if (alarm.name, alarm.part) not in known]

    def close(
        self, watch: Watch, merged: Arrays, replies: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], list[Row]]:
        """Measure a round that has ended.

        Args:
            watch: what was kept of it.
            merged: what the strategy made of the updates.
            replies: the clients' rows of `clients.jsonl`.

        Returns:
            What `metrics.jsonl` gets, and the rows of `collapse.jsonl`: one for each part of the merged model and of
            each watched client's.
        """
        started = time.perf_counter()
        before = self._evaluator.queries(watch.initial | watch.now, merged.keys())
        partial = self._evaluator.partial(merged.keys())
        after = self._evaluator.look(watch.initial | merged, merged.keys())
        clients = {client: self._evaluator.look(*watch.kept.pop(client), client) for client in sorted(watch.kept)}
        mine, theirs = self._parts(after), {client: self._parts(seen, client) for client, seen in clients.items()}
        for part, features in before.items():
            mine[part]["cka_round"] = diagnostics.linear_cka(features, after.queries[part])
            mine[part]["rankme_before"] = diagnostics.rankme(features)
            if part in partial:
                mine[part]["partial"] = True  # some of its arrays are the clients' own, so it is nobody's model
        _compare(after.queries, {client: seen.queries for client, seen in clients.items()}, mine, theirs)
        examples = {int(reply["client"]): int(reply["examples"]) for reply in replies if "examples" in reply}
        _add(mine, watch.weights.compare(merged, examples))
        motions = {int(reply["client"]): _motion(reply) for reply in replies}
        _add(mine, _mean_motion(motions, examples))
        for client in theirs:
            _add(theirs[client], motions.get(client, {}))
        row = self._compact(after, mine)
        row |= self._beside(clients, row, mine, theirs)
        rows = [
            {"round": watch.at, "client": who, "part": part, **values}
            for who, parts in ((MERGED, mine), *theirs.items())
            for part, values in parts.items()
        ]
        return row | {"measure_seconds": time.perf_counter() - started}, rows

    def _parts(self, seen: Seen, client: int | None = None) -> Parts:
        """What each part of one model gives; of a client, its own examples against those of others."""
        rows: Parts = {}
        for part, features in seen.queries.items():
            rows[part] = describe(features)
            rows[part]["alignment"] = diagnostics.alignment(*(view[part] for view in seen.views))
            rows[part] |= by_client(seen.bank[part], self._owners, client)
        if "predictor" in rows and seen.queries["predictor"].shape == seen.queries["projector"].shape:
            rows["predictor"]["identity"] = likeness(seen.queries["predictor"], seen.queries["projector"])
        return rows

    def _compact(self, seen: Seen, mine: Parts) -> dict[str, float]:
        row = {key: mine["encoder"][key] for key in _COMPACT if key in mine["encoder"]}
        if self._evaluator.labelled:
            row["knn_accuracy"] = self._evaluator.knn(seen)
        return row

    def _beside(
        self, clients: Mapping[int, Seen], merged: Mapping[str, float], mine: Parts, theirs: Mapping[int, Parts]
    ) -> dict[str, float]:
        """What else a compact row tells: clients' means and how merging compares (positive: it helps), and causes."""
        encoders = [parts["encoder"] for parts in theirs.values()]
        row = {f"client_{key}": fmean(e[key] for e in encoders) for key in ("rankme", "feature_std") if encoders}
        if clients and self._evaluator.labelled:
            row["client_knn_accuracy"] = fmean(self._evaluator.knn(seen) for seen in clients.values())
        for key in ("knn_accuracy", "rankme"):
            if f"client_{key}" in row:
                row[f"merge_gap_{key.removesuffix('_accuracy')}"] = merged[key] - row[f"client_{key}"]
        told = {
            "client_cka": ("encoder", "cka_clients"),
            "global_cka": ("encoder", "cka_global"),
            "round_cka": ("encoder", "cka_round"),
            "merge_scale": ("encoder", "merge_scale"),
            "teacher_gap": ("teacher", "gap"),
            "teacher_step": ("teacher", "step"),
            "predictor_identity": ("predictor", "identity"),
        }
        return row | {name: mine[part][key] for name, (part, key) in told.items() if key in mine.get(part, {})}


def _owners(shards: partition.Parts, bank: np.ndarray) -> np.ndarray:
    """The client that holds each of these examples; -1 where there is none, or not one alone."""
    if isinstance(shards, partition.Drawn | partition.Elsewhere):
        return np.full(len(bank), -1)
    n = 1 + max(int(bank.max()), int(partition.rows_of(shards).max()))
    owners: np.ndarray = partition.owner_of(shards, n)[bank]
    return owners


def _compare(after: Outputs, clients: Mapping[int, Outputs], mine: Parts, theirs: Mapping[int, Parts]) -> None:
    """Add linear CKA between the clients and from each of them to the merged model."""
    for part in {part for seen in clients.values() for part in seen}:
        have = {client: seen[part] for client, seen in clients.items() if part in seen}
        pairs = {(a, b): diagnostics.linear_cka(have[a], have[b]) for a, b in combinations(have, 2)}
        for client, features in have.items():
            if part in after:
                theirs[client][part]["cka_global"] = diagnostics.linear_cka(features, after[part])
            if pairs:
                theirs[client][part]["cka_clients"] = fmean(v for pair, v in pairs.items() if client in pair)
        if part in after:
            mine[part]["cka_global"] = fmean(theirs[client][part]["cka_global"] for client in have)
            if pairs:
                mine[part]["cka_clients"] = fmean(pairs.values())


def _motion(reply: Mapping[str, Any]) -> Parts:
    """What a client said of its parts: how far each moved, and how its teacher follows."""
    found: Parts = {}
    for key, value in reply.items():
        part, _, kind = key.rpartition("_")
        if part and kind in _MOTION:
            found.setdefault(part, {})[kind] = value
    return found


def _mean_motion(motions: Mapping[int, Parts], examples: Mapping[int, int]) -> Parts:
    """The clients' means, weighted by examples."""
    found: Parts = {}
    for part in {part: None for parts in motions.values() for part in parts}:
        for kind in _MOTION:
            have = {client: parts[part][kind] for client, parts in motions.items() if kind in parts.get(part, {})}
            if have:
                total = sum(examples[client] for client in have)
                found.setdefault(part, {})[kind] = sum(examples[c] * have[c] for c in sorted(have)) / total
    return found


def _add(parts: Parts, more: Parts) -> None:
    for part, values in more.items():
        parts.setdefault(part, {}).update(values)
