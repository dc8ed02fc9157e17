"""FLESD: teach a student how public examples lie to one another in the eyes of all clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedssl.errors import ConfigError
from fedssl.parts import Arrays, Part
from fedssl.workshop import STUDENT, Lesson, Workshop, ensemble, teach
from strategies import rules
from strategies.base import PartStrategy, Update

PUBLIC = "public.rows"  # the array of the method of the same name


@dataclass
class FLESD(PartStrategy):
    """FLESD (Shi et al. 2021, https://arxiv.org/abs/2109.14611), for the method of that name.

    Clients keep their networks, so these may be of any architecture, and send projections of public examples. The
    server sharpens their similarities and averages them (`workshop.ensemble`), and distils the mean into a student of
    its own, the encoder and projector of the configuration's `encoder` (`workshop.teach`): that one is measured and
    exported. It returns the student's projections, which the method pulls clients to.

    The authors distil for 200 epochs with a momentum of 0.999, on thousands of public examples and in few rounds.

    Attributes:
        temperature: of all similarities, above 0.
        top: share of the similarities of each public example that is kept, in (0, 1].
        epochs, batch_size, lr, momentum: of the distillation in each round.
        broadcast: whether clients begin each round with the student's encoder and projector, as the authors' do; only
            for clients that have the server's architecture.
    """

    reads: ClassVar[Literal["mean", "each"]] = "each"
    needs: ClassVar[tuple[str, ...]] = ("public",)
    temperature: float = 0.1
    top: float = 1.0
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.001
    momentum: float = 0.99
    broadcast: bool = False
    learnt: Arrays = field(default_factory=dict, init=False, repr=False)  # the student, which a resumed run needs
    _workshop: Workshop | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top <= 1 and self.lr > 0 and 0 <= self.momentum <= 1):
            raise ConfigError(
                "strategy.temperature and lr must be above 0, top a share in (0, 1] and momentum one in [0, 1]"
            )
        if min(self.epochs, self.batch_size) < 1:
            raise ConfigError("strategy.epochs and batch_size must be at least 1: else the student learns nothing")

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Networks stay at home; with a broadcast the student's replace them."""
        own = {part.name: "local" for part in parts if part.share == "merge" and part.name not in self.needs}
        return own | ({name: "received" for name in STUDENT} if self.broadcast else {})

    @property
    def student(self) -> Arrays:
        """What it has learnt so far."""
        return self.learnt

    def prepare(self, workshop: Workshop) -> None:
        """Keep it for every merge; the student begins as the model does."""
        self._workshop, self.learnt = workshop, workshop.student()

    def begin(self, now: Arrays) -> Arrays:
        """The initial values: there is nothing to say yet."""
        return now

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """Teach the student, and let it project the public examples."""
        sent = [update.arrays for update in updates]
        merged = {**now, **rules.weighted_mean(sent, [update.weight for update in updates])}  # parts shared by hand
        if self._workshop is None:
            raise ConfigError(
                "FLESD was given no model to train: only fedssl's own round loop prepares it, run it there"
            )
        target = ensemble([arrays[PUBLIC] for arrays in sent], self.temperature, self.top)
        lesson = Lesson(self.temperature, self.epochs, self.batch_size, self.lr, self.momentum)
        self.learnt, merged[PUBLIC] = teach(self._workshop, self.learnt, target, lesson, self._at)
        return merged | {key: value for key, value in self.learnt.items() if key in now}
