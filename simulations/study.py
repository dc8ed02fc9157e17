"""`fedssl study NAME`: run a study of the theory, and leave its table, figures, findings and page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedssl import config
from fedssl.build import build
from fedssl.errors import ConfigError
from fedssl.files import write_json, write_text
from fedssl.progress import Reporter, duration
from fedssl.report import charts, figures, page
from simulations.studies.base import Bench, Finding, Outcome, Study


def main(arguments: Sequence[str]) -> int:
    """Run one study: `study.KEY=VALUE` are its own options, all others those of the runs it makes.

    Raises:
        ConfigError: no such study, or an option that it does not have.
    """
    names = config.options_of("study")
    if not arguments or arguments[0] not in names:
        found = repr(arguments[0]) if arguments else "no name"
        raise ConfigError(f"study needs one of {', '.join(names)}; {found} was given")
    name, rest = arguments[0], list(arguments[1:])
    own = [text for text in rest if text.startswith("study.")]
    others = [text for text in rest if not text.startswith("study.")]
    if odd := [text for text in others if "=" not in text]:
        raise ConfigError(f"{odd[0]!r} is not an option: write study.KEY=VALUE, or KEY=VALUE for the runs")
    tree = _tree(name, own)
    folder = Path(str(tree.pop("out") or "studies")) / (f"{name}-tiny" if tree.get("tiny") else name)
    study = cast(Study, build(tree, "study"))
    _check(others)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used ({error.strerror}): pass another study.out=") from error
    torch.set_num_threads(1)  # what a study trains itself is small; its runs set their own
    reporter, start = Reporter(), time.monotonic()
    few = ["evaluate.repeats=2"] if study.tiny else []  # most of the time of a small run goes into its probes
    outcome = study.run(Bench(folder, [*few, *others], reporter))
    seconds = time.monotonic() - start
    write(folder, name, {"study": tree, "runs": others}, outcome, seconds)
    _say(folder, outcome, seconds)
    return 0


def _check(options: Sequence[str]) -> None:
    """Refuses a wrong option of the runs before anything is done; a method's is checked in full by its run.

    Raises:
        ConfigError: in one sentence.
    """
    instead = {"seed": "study.seeds says how many there are", "out": "study.out says where", "name": "it names them"}
    for text in options:
        if (key := text.partition("=")[0]) in instead:
            raise ConfigError(f"{text!r} is refused: the study sets {key} for each of its runs; {instead[key]}")
    known = {
        key
        for method in config.options_of("method")
        for key in OmegaConf.load(config.conf_dir() / "method" / f"{method}.yaml")
    }
    own = [text for text in options if text.startswith("method.")]
    if odd := [text for text in own if text.partition("=")[0].split(".")[1] not in known]:
        raise ConfigError(f"{odd[0]!r} is no option of any method: `fedssl list methods` shows them")
    config.compose([text for text in options if text not in own])


def _tree(name: str, options: Sequence[str]) -> dict[str, Any]:
    node = OmegaConf.load(config.conf_dir() / "study" / f"{name}.yaml")
    try:
        given = OmegaConf.from_dotlist([text.removeprefix("study.") for text in options])
        tree = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(node, given), resolve=True))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"the options {' '.join(options)} cannot be read: write study.KEY=VALUE") from error
    return {"out": None, **tree}


def write(folder: Path, name: str, setting: Mapping[str, Any], outcome: Outcome, seconds: float) -> None:
    """Write summary.json, table.md, figures/ and report.html."""
    pictures = []
    for stem, panels in outcome.charts.items():
        svg, _ = figures.save(charts.chart(panels), folder / "figures" / stem)
        pictures.append(page.picture(svg.read_bytes(), stem.replace("_", " ")))
    table = cells(outcome)
    write_text(folder / "table.md", markdown(table))
    findings = [
        page.tag("li", page.tag("b", page.text(f"{_word(f)}: {f.claim}")), page.text(f". {f.found}"))
        for f in outcome.findings
    ]
    content = page.page(
        f"fedssl study: {name}",
        page.tag("h1", page.text(f"Study: {name}")),
        page.section("What was found", page.tag("ul", *findings)),
        page.section("Figures", *pictures),
        page.section("Table", page.table(table)),
        page.folded("Options", OmegaConf.to_yaml(OmegaConf.create(dict(setting)))),
    )
    write_text(folder / "report.html", content)
    write_json(
        folder / "summary.json",
        {
            "name": name,
            **setting,
            "findings": [asdict(finding) for finding in outcome.findings],
            "table": list(outcome.table),
            "seconds": round(seconds, 1),
        },
    )


def cells(outcome: Outcome) -> list[list[str]]:
    """The table as text, headings first."""
    keys = list(outcome.table[0]) if outcome.table else ["nothing"]
    return [keys, *([_cell(row.get(key)) for key in keys] for row in outcome.table)]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]) + "\n"


def _word(finding: Finding) -> str:
    return {True: "holds", False: "does not hold", None: "undecided"}[finding.holds]


def _say(folder: Path, outcome: Outcome, seconds: float) -> None:
    for finding in outcome.findings:
        print(f"{_word(finding):14} {finding.claim}\n{'':14} {finding.found}")
    print(f"{duration(seconds)}; report: {folder / 'report.html'}")
