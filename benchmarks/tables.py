"""The results of a benchmark for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _show(spread: Mapping[str, float], form: str = ".3f") -> str:
    return f"{spread['median']:{form}} ({spread['min']:{form}} to {spread['max']:{form}})"


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("system", "system", str),
    ("start-up s", "startup_s", "{:.2f}".format),
    ("first round s", "first_round_s", "{:.2f}".format),
    ("later rounds s", "round_s", "{:.2f}".format),
    ("CPU s a round", "round_cpu_s", "{:.2f}".format),
    ("peak MiB", "peak_mib", "{:.0f}".format),
    ("wall / bare", "wall_ratio", _show),
    ("CPU / bare", "cpu_ratio", _show),
)
NO_RAY = " Ray was not measured: it is not installed, or was not asked for."


def tables(result: Mapping[str, Any]) -> str:
    """The results for people, as Markdown that can be read as it is."""
    work, about = result["work"], result["machine"]
    body = [[form(row[key]) for _, key, form in COLUMNS] for row in result["rows"]]
    idle_body = [[r["system"], _show(r["us_per_client"], ".0f")] for r in result["empty"]]
    absent = "" if any("ray" in r["system"] for r in result["rows"]) else NO_RAY
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join(
        [
            "# Engines against a bare loop\n",
            f"{about['date']}; {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; {versions}; load "
            f"before the start {about['load_before']}.",
            f"Command: `{result['command']}`.\n",
            f"{work['clients']} clients of {work['examples']} examples, batch {work['batch_size']}, one local epoch of "
            f"SimCLR, {result['parameters']} parameters, {work['rounds']} rounds, one torch thread a client.",
            f"Turns, in fresh processes: {result['pairs']}. Medians, and ratios of each turn as median (min to max). "
            "No evaluation in the rounds, one checkpoint at the end.",
            "Start-up is from the call of the engine to the first client, without imports. Memory is that of all "
            "processes; pages they share count in each.",
            f"All runs ended with the same bits: SHA-256 {result['sha256'][:16]}.{absent}\n",
            _table([name for name, _, _ in COLUMNS], body),
            f"\nClients that do nothing, of {result['parameters']} parameters, microseconds a client:\n",
            _table(["system", "us a client"], idle_body),
        ]
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *body]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(x, widths, strict=True)) + " |" for x in lines)
