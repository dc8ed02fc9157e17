"""Who took part in another run, again: one schedule for several strategies, or a deployment's in a simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedssl.errors import ConfigError
from fedssl.participation.base import Attendance, Turn, check_scale, in_order, scale


@dataclass(frozen=True)
class Replay:
    """The turns that a file lists. Rounds that it does not mention have nobody.

    Attributes:
        path: JSON lines as in `clients.jsonl` of a run: `round` and `client`, and if there are any `work`, `staleness`
            and `lost` (a word: the update never comes); other keys are not read. Read by the server only.
        rate: differences are multiplied by rate / (1 + staleness)^discount, as in `Buffered`.
        discount: see there.
    """

    path: str
    rate: float = 1.0
    discount: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.rate, self.discount)

    @property
    def max_staleness(self) -> int:
        """The largest of the file."""
        return read_turns(self.path)[1]

    def plan(self, clients: int, at: int, seed: int) -> Attendance:
        """See `Participation`.

        Raises:
            ConfigError: the file is missing or not such a list, or has more clients.
        """
        turns = read_turns(self.path)[0].get(at, ())
        if turns and turns[-1].client >= clients:
            raise ConfigError(
                f"{self.path} has client {turns[-1].client} in round {at}, and federation.clients={clients}: "
                "set federation.clients to the recorded run's"
            )
        return Attendance(turns)

    def scale(self, staleness: int) -> float:
        """See `Participation`."""
        return scale(staleness, self.rate, self.discount)


def read_turns(path: str) -> tuple[Mapping[int, tuple[Turn, ...]], int]:
    """The turns of each round, and their largest staleness; read again when the file has changed.

    Raises:
        ConfigError: the file is missing or not a list of turns.
    """
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): pass the clients.jsonl of a run") from error


@lru_cache(maxsize=2)
def _read(path: str, changed: int) -> tuple[Mapping[int, tuple[Turn, ...]], int]:
    rounds: dict[int, dict[int, Turn]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            at, client = int(row["round"]), int(row["client"])
            start = at - 1 - int(row.get("staleness", 0))
            turn = Turn(client, start, float(row.get("work", 1.0)), str(row.get("lost", "")))
            if at < 1 or client < 0 or not 0 <= start < at or not 0 <= turn.work <= 1:
                raise ValueError(f"{turn} in round {at}")
            if client in rounds.setdefault(at, {}):
                raise ValueError(f"client {client} twice in round {at}")
            rounds[at][client] = turn
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a list of turns ({error}): give JSON lines with `round` and `client`, each client once a "
            "round, as in clients.jsonl of a run"
        ) from error
    oldest = max((turn.staleness(at) for at, turns in rounds.items() for turn in turns.values()), default=0)
    return {at: in_order(turns.values()) for at, turns in rounds.items()}, oldest
