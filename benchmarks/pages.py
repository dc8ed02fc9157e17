"""Pages that benchmarks write tables into, between marks that name the command."""

from __future__ import annotations

from pathlib import Path

from fedssl.files import write_text

END = "<!-- end -->"


def begin(command: str) -> str:
    """The mark that a table of this command follows."""
    return f"<!-- begin: {command} -->\n"


def put(page: Path, command: str, text: str) -> None:
    """Put a text between the marks of a command.

    Raises:
        RuntimeError: the page has no such marks.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(begin(command))
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise RuntimeError(f"{page.name} has no marks for {command!r}")
    write_text(page, f"{before}{found}{text}{ended}{after}")
