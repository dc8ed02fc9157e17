"""What the rounds of a run share on the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fedssl.evaluation import Evaluator
from fedssl.evaluation.monitor import Monitor
from fedssl.flower import turns
from fedssl.flower.aggregation.server import Aggregator
from fedssl.job import Job
from fedssl.parts import Share
from fedssl.privacy.accountant import Release
from fedssl.privacy.statement import Heard
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory


@dataclass(frozen=True)
class Running:
    """What the rounds share."""

    grid: Grid
    job: Job
    rundir: RunDirectory
    reporter: Reporter
    evaluator: Evaluator
    monitor: Monitor
    data: Any
    device: torch.device
    shares: Mapping[str, Share]  # of every array of the model
    parameters: frozenset[str]  # of the model, by name
    nodes: Mapping[int, int]  # partition -> node id
    state_dir: Path | None  # where clients outside this process keep their state, if they share our disk
    aggregation: Aggregator
    history: turns.History = field(default_factory=turns.History)  # of the merged model
    heard: Heard = field(default_factory=Heard)  # what clients have said that their training cost of their privacy
    spent: dict[int, Release] = field(default_factory=dict)  # of each client's examples, if the run is private
    last: dict[int, int] = field(default_factory=dict)  # the round in which a client's reply was counted last

    @property
    def merged(self) -> list[str]:
        """The names of the arrays that clients send and the strategy merges."""
        return [key for key, share in self.shares.items() if share is Share.merge]

    @property
    def asynchronous(self) -> bool:
        """Whether turns may begin with an earlier model than the present one."""
        return self.job.participation.max_staleness > 0
