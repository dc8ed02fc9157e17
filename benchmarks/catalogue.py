"""What can be chosen, for the README: asked of `conf/`, nothing is written by hand.

`python -m benchmarks.catalogue` writes one row a group of options into README.md; tests/test_docs.py compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import put
from fedssl import config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
COMMAND = "python -m benchmarks.catalogue"  # marks its place in the page
PAGES = {  # group of options -> the page on it
    "method": "methods",
    "strategy": "strategies",
    "data": "data",
    "encoder": "data",
    "partition": "data",
    "participation": "participation",
    "available": "participation",
    "pace": "participation",
    "privacy": "privacy",
    "aggregation": "client_privacy",
    "compression": "communication",
    "engine": "engines",
    "track": "sweeps",
    "study": "studies",
    "experiment": "start",
}
MANY = 3  # variants of one name that are still listed one by one


def table() -> str:
    """All groups as Markdown.

    Raises:
        RuntimeError: a group of options has no page.
    """
    there = {name for name in config.groups() if config.options_of(name)}
    if odd := there ^ PAGES.keys():
        raise RuntimeError(f"{', '.join(sorted(odd))}: PAGES and conf/ differ; say which page is on it")
    rows = [["group", "options"], ["---", "---"]]
    rows += [[f"[`{group}`](docs/{page}.md)", shown(config.options_of(group))] for group, page in PAGES.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown(options: Sequence[str]) -> str:
    """Names in a row; those of a family with many variants of one name as `name_*`."""
    families = {name: [other for other in options if other.startswith(f"{name}_")] for name in options}
    hidden = {other for variants in families.values() if len(variants) > MANY for other in variants}
    names = []
    for name in options:
        names += [] if name in hidden else [f"`{name}`"]
        names += [f"`{name}_*` ({len(families[name])})"] if len(families[name]) > MANY else []
    return ", ".join(names)


def main() -> int:
    """Write the table into the page."""
    put(PAGE, COMMAND, table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
