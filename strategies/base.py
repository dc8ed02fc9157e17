"""PartStrategy: a Flower strategy whose rule is one function of arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.codec import Memo
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout, Part, part_of
from fedssl.tree import PartialMean


@dataclass(frozen=True)
class Update:
    """What one client, or the mean of a round's clients, brings to a merge."""

    arrays: Arrays  # the trained values (not differences) of all merged parts
    weight: float
    client: int | None  # None: a weighted mean of many
    metrics: Mapping[str, float]  # the scalars of the reply; empty for a mean
    clients: int = 1  # for how many it stands


class PartStrategy(Strategy):
    """A rule that merges the parts of a model, usable by `strategy.start(grid, ...)` in any Flower app.

    `reads` says what the rule needs: "mean", the weighted mean only (it streams, in O(model) memory, and the order of
    arrival does not matter), or "each", every update, given in order of the clients. A rule that
    reads the mean lets clients leave out arrays that they cannot train: the mean of each is over the clients that sent
    it, and what nobody sent keeps its present value. The nodes it instructs are all that the grid lists: who takes part
    is decided before, by a seeded cohort.
    """

    reads: ClassVar[Literal["mean", "each"]] = "mean"
    needs: ClassVar[tuple[str, ...]] = ()  # of a method's `summaries`, those that this rule reads
    proximal: float = 0.0
    exact: ClassVar[bool] = True  # whether means are free of the order of arrival; a run sets it on its own strategy
    _now: Arrays
    _at: int  # the round that is being merged

    @abstractmethod
    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The next values of the merged parts, from the present ones and the updates (exactly one if reads="mean")."""

    def weigh(self, update: Update, part: str) -> float:
        """The weight of a part of one client's update in the mean: its examples."""
        return update.weight

    @property
    def keeps(self) -> Collection[str]:
        """The parts whose trained values a client keeps for its next `receive`. Default: none."""
        return ()

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Who owns which part under this rule; the configuration's `share` wins. Default: as the method says."""
        return {}

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """On the client: the values to start from, given the server's and the client's own. Default: the server's.

        They may include parts that are local, such as a teacher; what is left out starts from the client's own.
        """
        return now, own.memo

    def remember(self, start: Arrays, trained: Arrays, memo: Memo, layout: Layout) -> Memo:
        """On the client: what to remember after training from `start` to `trained`. Default: what it knew before."""
        return memo

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One instruction for each node of the grid; all share one record."""
        self._now, self._at = codec.decode(arrays), server_round
        config["server-round"] = server_round
        content = codec.instruction(arrays, config)
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the replies as they come; error replies are left to the caller's policy."""
        scalars: list[tuple[float, Mapping[str, float]]] = []

        def updates() -> Iterator[Update]:
            for message in replies:
                if message.has_content():
                    update = read(message)
                    scalars.append((update.weight, update.metrics))
                    yield update

        if self.reads == "mean":
            mean = PartialMean(self._now, self.exact)
            for update in updates():
                for part in dict.fromkeys(map(part_of, update.arrays)):
                    own = {key: value for key, value in update.arrays.items() if part_of(key) == part}
                    mean.add(own, self.weigh(update, part))
            total = sum(weight for weight, _ in scalars)
            merged = self.merge(self._now, [Update(mean.result(), total, None, {}, len(scalars))])
        else:
            everyone = sorted(updates(), key=lambda update: update.client if update.client is not None else -1)
            if not everyone:
                raise ProtocolError("no client sent an update this round: there is nothing to merge")
            merged = self.merge(self._now, everyone)
        return codec.encode(merged), _mean_metrics(scalars)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: representations are measured on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None: see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Nothing to log: the run directory holds the configuration."""


def read(message: Message) -> Update:
    """A training reply as an update.

    Raises:
        ProtocolError: the reply lacks the arrays or the weight.
    """
    try:
        arrays, numbers = codec.arrays_of(message.content), codec.metrics_of(message.content)
        weight = float(cast(float, numbers[codec.WEIGHT]))
    except KeyError:
        raise ProtocolError(
            f"node {message.metadata.src_node_id} replied without {codec.ARRAYS!r} or {codec.WEIGHT!r}: "
            "it does not run this ClientApp"
        ) from None
    metrics = {key: cast(float, value) for key, value in numbers.items()}
    client = metrics.get("partition-id")
    return Update(
        codec.decode(arrays),
        weight,
        None if client is None else int(client),
        metrics,
    )


def _mean_metrics(scalars: Sequence[tuple[float, Mapping[str, float]]]) -> MetricRecord:
    total = sum(weight for weight, _ in scalars)
    keys = scalars[0][1].keys() - {codec.WEIGHT, "partition-id"} if scalars else set()
    return MetricRecord({key: sum(w * m[key] for w, m in scalars) / total for key in sorted(keys)})
