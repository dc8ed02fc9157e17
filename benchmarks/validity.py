"""Which methods are private under which mechanism: asked of the code, cell by cell, nothing is written by hand.

`python -m benchmarks.validity` composes every combination, looks for the fewest named changes that make a refused one
valid, and writes the table into docs/privacy.md. Nothing is trained; tests/test_validity.py trains every valid cell.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from benchmarks.pages import put
from fedssl import config
from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy.contract import CHANGES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "privacy.md"
COMMAND = "python -m benchmarks.validity"  # marks its place in the page
MECHANISMS = {  # heading -> options
    "`example`": ("privacy=example",),
    "`groups`": ("privacy=groups",),
    "`pairs`": ("privacy=pairs",),
    "`statistics`": ("privacy=statistics",),
    "clients (`client_dp`, `ftrl`, `local_dp`, `secure_dp`)": ("aggregation=client_dp", "aggregation.delta=1e-5"),
}
MORE = (("temperature", "1.0"), ("learn", "false"))  # beside the contract's


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        options: that make it valid; empty if none are known.
        changes: those of them that are no default, for the reader.
        reason: why it is refused as it is, or "".
    """

    options: tuple[str, ...]
    changes: tuple[str, ...]
    reason: str

    @property
    def text(self) -> str:
        """For the table."""
        if not self.options:
            return "refused"
        return "valid" if not self.changes else f"with `{' '.join(self.changes)}`"


def methods() -> list[str]:
    """All but wrappers of other methods, which are what they wrap."""
    return [name for name in config.options_of("method") if "/method@base" not in _yaml(name)]


def _yaml(method: str) -> str:
    return (config.conf_dir() / "method" / f"{method}.yaml").read_text()


def base(method: str) -> tuple[str, ...]:
    """What the method needs to be itself: data that it reads, and the strategy of which it is one half."""
    own = (config.conf_dir() / "strategy" / f"{method}.yaml").exists()
    data = "synthetic_pairs" if method == "clip" else "synthetic"
    consent = ("payload.allow=[projections]",) if method == "fedca" else ()
    public = (f"data@public={data}", "public.seed=1") if method in ("flesd",) else ()
    return (f"method={method}", f"data={data}", *((f"strategy={method}",) if own else ()), *consent, *public)


def cell(method: str, mechanism: Sequence[str]) -> Cell:
    """Ask the code, and look for the fewest changes."""
    reason = ""
    for changes in candidates(method):
        public = ("data@public=synthetic", "public.seed=1") if any(c.endswith("=public") for c in changes) else ()
        options = (*base(method), *mechanism, *changes, *public)
        try:
            config.compose([*options])
        except (PrivacyError, ConfigError) as error:
            reason = reason or str(error)
            continue
        return Cell(options, changes, reason)
    return Cell((), (), reason)


def candidates(method: str) -> Iterator[tuple[str, ...]]:
    """No change, and then all combinations of the known ones that the method has, fewest first."""
    known = {line.partition(":")[0] for line in _yaml(method).splitlines() if re.match(r"[a-z_]+:", line)}
    usable = [f"method.{name}={value}" for name, value in (*CHANGES, *MORE) if name in known]
    for size in range(len(usable) + 1):
        for chosen in combinations(usable, size):
            if len({each.partition("=")[0] for each in chosen}) == size:
                yield chosen


def table() -> str:
    """All cells as Markdown."""
    rows = [["`method=`", *MECHANISMS], ["---"] * (len(MECHANISMS) + 1)]
    rows += [[f"`{m}`", *(cell(m, options).text for options in MECHANISMS.values())] for m in methods()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(page: Path) -> None:
    """Put the table between the page's marks."""
    put(page, COMMAND, table())


def main() -> int:
    """Write the table into the page."""
    write(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
