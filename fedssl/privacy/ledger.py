"""What has been spent: an append-only list of releases, chained by hashes, that decides before each further one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedssl.errors import PrivacyError
from fedssl.privacy.accountant import FAST, Release, compose


@dataclass(frozen=True)
class Entry:
    """A round's releases of one unit's data, all alike."""

    round: int
    attempt: int  # of the round; a round that is repeated after a kill has released twice
    what: str  # e.g. "gradients"
    noise_multiplier: float
    sample_rate: float
    count: int
    concentrated: bool = False  # as of a `Release`

    @property
    def release(self) -> Release:
        """As the accountants take it."""
        return Release(self.noise_multiplier, self.sample_rate, self.count, self.concentrated)

    def row(self) -> dict[str, Any]:
        """As it is written down; what only some entries have is left out of the others."""
        return {key: value for key, value in asdict(self).items() if key != "concentrated" or value}


@dataclass(frozen=True)
class Ledger:
    """All that one client, or one federation, has released; adding to it gives another ledger, nothing is taken back.

    Attributes:
        entries: in the order in which they were written.
    """

    entries: tuple[Entry, ...] = ()

    def spend(self, entry: Entry) -> Ledger:
        """With one entry more. Writing the same round and attempt of the same thing again changes nothing.

        Raises:
            PrivacyError: that round, attempt and thing are there with other numbers.
        """
        for old in self.entries:
            if (old.round, old.attempt, old.what) == (entry.round, entry.attempt, entry.what):
                if old != entry:
                    raise PrivacyError(
                        f"the ledger has {old.what} of round {entry.round} with other noise or more steps: what is "
                        "spent cannot be changed; start a new run"
                    )
                return self
        return Ledger((*self.entries, entry))

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Of everything in it; 0 for an empty one."""
        return compose([entry.release for entry in self.entries], delta, accountant)

    def affordable(self, entry: Entry, budget: float, delta: float) -> int:
        """How many of the entry's releases, from 0 to all, keep epsilon at or below the budget."""

        def fits(count: int) -> bool:
            more = replace(entry.release, count=count)
            return compose((*(e.release for e in self.entries), more), delta, grid=FAST) <= budget

        if fits(entry.count):
            return entry.count
        low, high = 0, entry.count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def text(self) -> str:
        """As JSON lines, each with the hash of all before it."""
        lines, last = [], ""
        for entry in self.entries:
            body = json.dumps(entry.row(), sort_keys=True)
            last = hashlib.sha256(f"{last}{body}".encode()).hexdigest()
            lines.append(json.dumps({"entry": entry.row(), "hash": last}, sort_keys=True))
        return "\n".join(lines)

    @classmethod
    def read(cls, text: str) -> Ledger:
        """The ledger that `text()` has written.

        Raises:
            PrivacyError: a line was changed, taken out or put in.
        """
        entries: list[Entry] = []
        last = ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                entry = Entry(**row["entry"])
                last = hashlib.sha256(f"{last}{json.dumps(entry.row(), sort_keys=True)}".encode()).hexdigest()
                sound = row["hash"] == last
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise PrivacyError(
                    f"line {number} of the privacy ledger is not what was written there, so what has been spent is not "
                    "known: restore the file, or start a new run"
                )
            entries.append(entry)
        return cls(tuple(entries))
