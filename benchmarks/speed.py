"""The tables and the figure of `python -m benchmarks`: systems beside the bare loop, and the share of the views."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import EXACT
from benchmarks.pages import put
from benchmarks.workload import BARE, BY_HAND, RAY, ROOT, SYSTEMS
from fedssl.files import write_bytes, write_text
from fedssl.report.figures import COLOURS, HATCHES, image, new, styled

COMMAND = "python -m benchmarks, {}"  # marks the places in the pages
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE, FULL, FIGURE = "engines.md", "speed.md", "speed.png"
SHOWN = "small, batch 4, 16x16"  # in the figure
Rows = Sequence[Mapping[str, Any]]


def compared(rows: Rows) -> dict[str, dict[str, Rows]]:
    """Workload -> system -> its turns.

    Raises:
        RuntimeError: systems that promise the same bits ended with different ones.
    """
    found: dict[str, dict[str, Rows]] = {}
    for group in dict.fromkeys(row["group"] for row in rows if row["name"] == BARE):
        here = [row for row in rows if row["group"] == group]
        found[group] = {name: [r for r in here if r["name"] == name] for name in SYSTEMS}
        found[group] = {name: turns for name, turns in found[group].items() if turns}
        hashes = {row["sha256"] for name in EXACT for row in found[group].get(name, ())}
        if len(hashes) != 1 and here[0]["work"].get("device", "cpu") == "cpu":  # GPUs add up in any order
            raise RuntimeError(f"{group}: systems that promise equal bits do not compute the same thing")
    return found


def later(row: Mapping[str, Any], key: str) -> float:
    """Mean of the rounds but the first, in which data are read and models built."""
    return statistics.fmean(row[key][1:] or row[key])


def ratios(mine: Rows, floor: Rows, key: str) -> list[float]:
    """Of the turns that both have."""
    pairs = [(a, b) for a in mine for b in floor if a["turn"] == b["turn"]]
    return [later(a, key) / later(b, key) for a, b in pairs if later(b, key) > 0]


def matrix(rows: Rows) -> str:
    """Systems by workloads: wall and CPU seconds of a round over the bare loop's."""
    groups = compared(rows)
    body = []
    for name in SYSTEMS:
        cells = [name]
        for systems in groups.values():
            both = [ratios(systems.get(name, ()), systems[BARE], key) for key in ("round_s", "round_cpu_s")]
            cells.append(" / ".join(f"{statistics.median(v):.2f}" for v in both) if all(both) else "")
        if any(cells[1:]):
            body.append(cells)
    differences = [row for row in rows if row["name"].startswith("difference")]
    last = ["difference of cohort=16"]
    for group in groups:
        away = next((row["difference"] for row in differences if row["group"] == group), None)
        last.append("" if away is None else f"{away:.0e}")
    return table(["a round over the bare loop's, wall / CPU", *groups], [*body, last])


def whole(rows: Rows) -> str:
    """Seconds of whole runs, from the call of Python to the last round, and how much longer Ray's take."""
    groups = compared(rows)
    names = [name for name in SYSTEMS if name not in (BARE, BY_HAND)]
    body, seconds = [], {}
    for name in names:
        for group, systems in groups.items():
            turns = [row["imports_s"] + row["startup_s"] + sum(row["round_s"]) for row in systems.get(name, ())]
            seconds[name, group] = statistics.median(turns) if turns else None
    for name in names:
        cells = []
        for group in groups:
            mine, ray = seconds[name, group], seconds[RAY, group]
            less = f" ({ray / mine:.1f} times less)" if mine and ray and name != RAY else ""
            cells.append(f"{mine:.1f} s{less}" if mine else "")
        if any(cells):
            body.append([name, *cells])
    rounds = next(iter(groups.values()))[BARE][0]["work"]["rounds"]
    return table([f"a whole run of {rounds} rounds", *groups], body)


def full(result: Mapping[str, Any]) -> str:
    """Everything that was measured of the compared systems, as a page."""
    lines = ["# Speed\n", f"{about_text(result)}: `{result['command']}`. {NOTE}\n"]
    for group, systems in compared(result["rows"]).items():
        work = systems[BARE][0]["work"]
        lines.append(
            f"## {group}\n\n{work['clients']} clients of {work['examples']} examples, batch {work['batch_size']}, "
            f"{work['size']}x{work['size']}, {work['encoder']} of width {work['width']}, "
            f"{systems[BARE][0]['parameters']} parameters; turns: {len(systems[BARE])}. SHA-256 of the exact systems "
            f"{systems[BARE][0]['sha256'][:16]}.\n"
        )
        body, on_gpu = [], "peak_gpu_mib" in systems[BARE][0]
        for name, turns in systems.items():
            middle = [statistics.median(row[key] for row in turns) for key in ("startup_s", "peak_mib")]
            times = [statistics.median(later(row, key) for row in turns) for key in ("round_s", "round_cpu_s")]
            first = statistics.median(row["round_s"][0] for row in turns)
            cells = [name, f"{middle[0]:.2f}", f"{first:.2f}", *(f"{t:.2f}" for t in times), f"{middle[1]:.0f}"]
            cells += [f"{max(row['peak_gpu_mib'] for row in turns):.0f}"] if on_gpu else []
            body.append([*cells, *(_spread(ratios(turns, systems[BARE], k)) for k in ("round_s", "round_cpu_s"))])
        head = ["system", "start-up s", "first round s", "a round s", "CPU s a round", "peak MiB"]
        head += ["its GPU's"] if on_gpu else []
        lines.append(table([*head, "wall / bare", "CPU / bare"], body))
        away = [row for row in result["rows"] if row["group"] == group and row["name"].startswith("difference")]
        lines += [
            f"{row['system']} against bare after {work['rounds']} rounds: {row['difference']:.1e} of its norm, "
            f"{row['of_the_movement']:.1e} of what training moved, {row['worst_array']:.1e} of the norm of the worst "
            "array.\n"
            for row in away
        ]
    return "\n".join(lines)


NOTE = (
    "One torch thread a client, fresh processes, systems in turn; medians, and ratios of neighbours of a turn. Rounds "
    "without the first. Memory is that of all processes; pages they share count in each. `FedAvg by hand` and "
    "`pfl-research` draw their own random numbers; all others but the cohorts end with equal bits, which is checked."
)


def about_text(result: Mapping[str, Any]) -> str:
    """When, on what and beside what."""
    about, loads = result["machine"], [row["load"] for row in result["rows"]]
    where = f"{about['gpu']}, {about['cpu']}" if "gpu" in about else about["cpu"]
    return (
        f"{about['date'][:10]}, {where}, {about['cores']} cores, torch {about['versions']['torch']}, load "
        f"{min(loads):.1f} to {max(loads):.1f} (median {statistics.median(loads):.1f})"
    )


def steps(rows: Rows) -> str:
    """What the two views cost in a step."""
    body = []
    for row in (row for row in rows if row["group"].startswith("step")):
        work, total = row["work"], row["views_s"] + row["step_s"]
        size = f"width {work['width']}, {work['size']}x{work['size']}"
        times = [f"{1000 * row[key]:.1f}" for key in ("views_s", "step_s")]
        body.append([size, str(work["batch_size"]), *times, f"{100 * row['views_s'] / total:.0f} %"])
    return table(["encoder, images", "batch", "two views, ms", "step, ms", "share of the views"], body)


@styled
def figure(rows: Rows) -> Any:
    """Seconds of a round of small clients; hatched: equal within rounding, the others in bits."""
    systems = compared(rows)[SHOWN]
    drawing, axes = new(2.4)
    names = list(reversed(systems))
    seconds = [statistics.median(later(row, "round_s") for row in systems[name]) for name in names]
    colours = [COLOURS[2] if "cohort" in name else COLOURS[0] for name in names]
    axes.barh(names, seconds, color=colours, hatch=[HATCHES[1] if "cohort" in name else "" for name in names])
    for place, total in enumerate(seconds):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=8)
    work = systems[BARE][0]["work"]
    axes.set_xlabel(f"seconds, {work['clients']} clients")
    axes.set_xmargin(0.12)
    axes.grid(visible=False, axis="y")
    return drawing


def write_tables(result: Mapping[str, Any], docs: Path) -> None:
    """Put the tables into the page."""
    about = f"\n{about_text(result)}; turns: {1 + max(row['turn'] for row in result['rows'])}. {NOTE}\n"
    put(docs / PAGE, COMMAND.format("speed"), matrix(result["rows"]) + about)
    put(docs / PAGE, COMMAND.format("whole"), whole(result["rows"]) + "\n")
    put(docs / PAGE, COMMAND.format("steps"), steps(result["rows"]))


def write(result: Mapping[str, Any], docs: Path, results: Path) -> None:
    """Write the tables, all numbers as a page beside the results, and the figure."""
    write_tables(result, docs)
    write_text(results / FULL, full(result))
    write_bytes(docs / FIGURE, image(figure(result["rows"]), "png"))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
