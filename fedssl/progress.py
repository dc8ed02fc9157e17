"""What a person sees while a run goes on: one live line on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SHOWN = (
    ("loss", "loss", ".4f"),
    ("knn_accuracy", "kNN", ".3f"),
    ("effective_rank", "rank", ".1f"),
    ("epsilon", "ε", ".2f"),
)


def duration(seconds: float) -> str:
    """A length of time for people: 8 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Reporter:
    """Shows rounds as they finish. `quiet` shows nothing.

    Values that a round did not measure are shown as last measured.
    """

    def __init__(self, quiet: bool = False) -> None:
        style: dict[str, Any] = {"quiet": quiet, "highlight": False, "soft_wrap": True}
        self._console = Console(stderr=True, **style)
        self._live = self._console.is_terminal and not quiet
        self._notebook = self._console.is_jupyter and not quiet
        if self._notebook:  # there rich makes a paragraph of each line, and what goes to stderr is shown in red
            self._console = Console(force_jupyter=False, color_system=None, **style)
        self._open = 0  # characters of a notebook's line that the next one is drawn over
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last: dict[str, float] = {}
        self._first, self._start, self._rounds = 0, 0.0, 0

    def begin(self, title: str, done: int, rounds: int) -> None:
        """Start counting rounds."""
        self._first, self._rounds, self._start, self._last = done, rounds, time.monotonic(), {}
        if self._live:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=rounds, completed=done, text="starting")
        else:
            self.say(f"{title}: {rounds - done} of {rounds} rounds to go")

    def round(self, number: int, row: Mapping[str, Any]) -> None:
        """Show a finished round."""
        self._last |= {key: row[key] for key, _, _ in _SHOWN if row.get(key) is not None}
        spent = time.monotonic() - self._start
        left = spent / max(1, number - self._first) * (self._rounds - number)
        values = "  ".join(f"{name} {self._last[key]:{form}}" for key, name, form in _SHOWN if key in self._last)
        text = f"{number}/{self._rounds}  {values}  {duration(left)} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, text=text)
        elif self._notebook:
            self._console.file.write(f"\r{f'round {text}':{self._open}}")  # rich would strip the return
            self._console.file.flush()
            self._open = len(text) + len("round ")
        else:
            self.say(f"round {text}")

    def end(self) -> None:
        """Stop the live line; what it showed last stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._close()

    def say(self, text: str) -> None:
        """Print one line."""
        self._close()
        self._console.print(text, markup=False)

    def _close(self) -> None:
        """Let a notebook's line stand."""
        if self._open:
            self._console.print()
            self._open = 0
