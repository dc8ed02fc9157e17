"""The server's side: a round's replies become one, and a conversation with the clients where one is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedssl import tree
from fedssl.aggregation import spending
from fedssl.aggregation.base import Memory, Occasion, Private, Session, Told
from fedssl.errors import ProtocolError, TooFewError
from fedssl.flower import codec
from fedssl.flower.aggregation.clients import untold
from fedssl.flower.exchange import exchange, reason
from fedssl.flower.in_process import InProcessGrid
from fedssl.job import Job
from fedssl.model import Model
from fedssl.networks.norms import variance_keys
from fedssl.participation.base import Attendance
from fedssl.parts import Arrays
from fedssl.privacy import statement
from fedssl.privacy.ledger import Ledger
from fedssl.progress import Reporter

ASK = "query.aggregation"


@dataclass
class Aggregator:
    """The server's side of a run's aggregation: what it remembers between rounds."""

    job: Job
    grid: Grid
    nodes: Mapping[int, int]  # client -> node id
    memory: Memory
    seed: int  # of the cohorts
    variances: frozenset[str] = frozenset()  # arrays that may not become negative
    ledger: Ledger = field(default_factory=Ledger)  # of the federation, if the aggregation claims an epsilon
    row: dict[str, float] = field(default_factory=dict)  # of the round that was finished last
    skipped: str = ""  # why nothing was opened in it, where the session found too few
    silent: dict[int, str] = field(default_factory=dict)  # who did not answer before it, and why
    _session: Session | None = None
    _asked: Arrays = field(default_factory=dict)

    @classmethod
    def begin(
        cls, job: Job, grid: Grid, nodes: Mapping[int, int], model: Model, secret: Callable[[], int] = lambda: 0
    ) -> Aggregator:
        """Before the first round.

        Args:
            job: what is run.
            grid: of all nodes.
            nodes: client -> node id.
            model: only its kind is read.
            secret: gives the run's secret, where cohorts are drawn from one.
        """
        if job.aggregation.each:
            return cls(job, grid, nodes, Memory(), job.seed)
        seed = secret() if job.aggregation.secret_cohorts else job.seed
        return cls(job, grid, nodes, job.aggregation.begin(job.planned), seed, variance_keys(model))

    def attendance(self, at: int) -> Attendance:
        """The turns that end in round `at`."""
        return self.job.participation.plan(self.job.federation.clients, at, self.seed)

    @property
    def each(self) -> bool:
        """Whether the strategy sees every update as it was trained."""
        return self.job.aggregation.each

    def replay(self, attempts: Iterable[int], done: int) -> None:
        """Pay for all rounds that have begun, also if the run was killed before its first checkpoint.

        Args:
            attempts: the rounds that have begun, in order, whatever became of them.
            done: the round of the checkpoint; 0 without one.
        """
        if (private := self._private) is not None:
            self.ledger = spending.replayed(private, self.job.planned, attempts, done)

    def affords(self, at: int, attempt: int) -> bool:
        """Whether a round stays within the budget."""
        private = self._private
        return private is None or spending.fits(private, self.job.planned, self.ledger, at, attempt)

    @property
    def _private(self) -> Private | None:
        private = self.job.aggregation
        return private if isinstance(private, Private) else None

    @property
    def epsilon(self) -> float | None:
        """What has been spent, quickly and a little too large; None where nothing is claimed or spent."""
        if self._private is None:
            return None
        return statement.running(spending.total(self.ledger), self._private.budget(self.job.planned)[1])

    def claim(self) -> dict[str, Any]:
        """The content of `privacy.json`; empty where nothing is claimed."""
        return {} if self._private is None else spending.claim(self._private, self.job.planned, self.ledger)

    def announce(self, reporter: Reporter, size: int) -> None:
        """Say what is switched off because the server shall not see it, and how long the noise is.

        Args:
            reporter: says it.
            size: numbers in an update.
        """
        if self._private is not None:
            for sentence in self._private.remarks(self.job.planned, size):
                reporter.say(sentence)
            if not isinstance(self.grid, InProcessGrid) and self._private.declaration(self.job.planned).seeded:
                reporter.say(
                    "the noise follows from the seed of the run, which the server and every client know: on real "
                    "devices set aggregation.secure=true, or the epsilon holds against nobody of them"
                )
        if not self.each and self.job.evaluate.clients:
            reporter.say(
                f"evaluate.clients={self.job.evaluate.clients} is read as 0, and clients report no loss: with this "
                "aggregation nobody sees what a single client has trained"
            )

    def open(self, asked: Arrays, at: int, attempt: int, clients: Collection[int]) -> bool:
        """Begin a round, before its clients are instructed; it is paid for whatever becomes of it.

        Args:
            asked: the present values of the arrays that clients send.
            at: the round.
            attempt: of it, from 1.
            clients: whose updates are awaited.

        Returns:
            Whether it goes on; False if too few clients are there for it, so that nobody should train.
        """
        self.row, self.skipped, self.silent = {}, "", {}
        if (private := self._private) is not None:
            self.ledger = spending.spend(private, self.job.planned, self.ledger, at, attempt)
        if not self.each:
            self._asked = asked
            lost = [turn.client for turn in self.job.attendance(at).turns if turn.lost] if clients else ()
            occasion = Occasion(at, attempt, sorted(clients), lost)
            try:
                self._session = self.job.aggregation.open(asked, occasion, self.memory, self.job.planned, self.ask)
            except TooFewError as error:
                self.skipped = str(error)
        return not self.skipped

    def instruct(self, messages: Iterable[Message], client_of: Mapping[int, int]) -> None:
        """Add to each instruction what the session tells its client; equal contents stay shared."""
        if self._session is None:
            return
        shared: dict[tuple[Any, ...], RecordDict] = {}
        for message in messages:
            words = untold(self._session.told(client_of[message.metadata.dst_node_id]))
            key = (id(message.content), *sorted(words.items()))
            if words and key not in shared:
                config = ConfigRecord({**codec.config_of(message.content), **words})
                shared[key] = RecordDict({**message.content, codec.CONFIG: config})
            message.content = shared.get(key, message.content)

    def one(
        self, replies: Iterable[Message], client_of: Mapping[int, int], refuse: Callable[[int, str], None]
    ) -> Iterator[Message]:
        """Fold all replies into one: the round's start plus the mean of the changes, of weight 1.

        It comes even if nobody has sent anything, for noise alone is an outcome, too; but not if there are fewer than
        a quorum of several, or the session finds the round too small. An update that is not what was asked for is told
        to `refuse`, and counts as none.
        """
        session = self._session
        if session is None:
            yield from replies
            return
        count = 0
        for reply in replies:
            client = client_of[reply.metadata.src_node_id]
            try:
                session.add(client, codec.decode(codec.arrays_of(reply.content)))
            except ProtocolError as error:
                refuse(client, str(error))
                continue
            count += 1
        self._session = None
        if 1 < self.job.federation.needed(len(client_of)) > count:
            return
        try:
            outcome = session.finish()
        except TooFewError as error:
            outcome, self.skipped = None, str(error)
        if outcome is None:
            return
        self.memory, self.row = outcome.memory, dict(outcome.row)
        # In the order of the model's arrays: some of Flower's strategies pair arrays by their places.
        moved = {k: np.asarray(now, np.float64) + outcome.change[k] for k, now in self._asked.items()}
        moved |= {k: np.maximum(moved[k], 0.0) for k in self.variances & moved.keys()}
        content = codec.reply(tree.like(moved, self._asked), {codec.WEIGHT: 1})
        yield Message(content, reply_to=Message(RecordDict(), 0, MessageType.TRAIN))

    def ask(self, questions: Mapping[int, Told]) -> dict[int, Told]:
        """Send each client its question and wait for the answers; who fails or is late has none."""
        messages = []
        for client, words in questions.items():
            config = ConfigRecord({"job": self.job.text, **untold(words)})
            messages.append(Message(RecordDict({codec.CONFIG: config}), self.nodes[client], ASK))
        clients = {self.nodes[client]: client for client in questions}
        answers: dict[int, Told] = {}
        for reply in exchange(self.grid, messages, self.job.federation.timeout_s):
            client = clients[reply.metadata.src_node_id]
            if reply.has_content():
                answers[client] = dict(codec.config_of(reply.content))  # type: ignore[arg-type]
            else:
                self.silent[client] = reason(reply.error.reason)
        for client in questions.keys() - answers.keys():
            self.silent.setdefault(client, f"client {client} did not answer in time")
        return answers
