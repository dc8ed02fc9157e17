"""Every command and every piece of code in README and docs is run, here or where `ELSEWHERE` says."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import catalogue, pages
from fedssl import config, simulation
from simulations import cli
from simulations.audits import canaries, inversion_demo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("bash", "python")  # what a reader runs here; `sh` is for other machines, the others are no commands
KINDS = (*RUN, "sh", "yaml", "toml", "nginx")
OWN = ("extending.md",)  # tests/test_extending.py runs it, in a tree with its files
LONG = ("audits.md", "client_privacy.md", "strategies.md", "studies.md")  # `make test-all` runs them
DRAWN = ("start.md", "runs.md", "collapse.md")  # pages on figures have them drawn
# What a reader runs at full size is run here for one round, on few examples.
SMALL = [
    *("federation.rounds=1", "evaluate.every=0", "evaluate.repeats=1", "evaluate.examples=200"),
    *("device=cpu", "baselines=false"),
]
FEWER = {
    "data=digits": ["data.test_fraction=0.7"],
    "experiment=demo": ["data.test_fraction=0.7"],
    "experiment=har": [],
    "data=cifar10_npz": [],
    "data=joined": [],
    "data=npz": [],
    "any other": ["data.train=300", "data.test=100"],
}
ELSEWHERE = {  # how a command begins -> who runs it, or why nobody does
    "make test": "this is one of its tests; .ci/run calls it on a fresh machine",
    "make docs": "tests/test_site.py builds the same site, as strictly",
    "git clone": "there is no network in a test",
    "python3.11 -m venv": "`make` does the same, with whatever python3 there is",
    "pip install": "there is no package index in a test; tests/test_packaging.py builds the wheel and runs it",
    "flower-superlink": "tests/test_deployment.py, with a port and folders of its own",
    "flower-superexec": "tests/test_deployment.py",
    "flower-supernode --superlink": "tests/test_deployment.py",
    "flower-supernode --node-config": "tests/test_node_floor.py gives nodes these words",
    "flwr supernode register": "tests/test_deployment.py",
    "fedssl submit": "tests/test_deployment.py; the options are composed here",
    "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "tests/test_flwr_run.py",
    "flwr run": "tests/test_flwr_run.py",
    "python -m benchmarks --pfl": "it takes half an hour; tests/test_speed.py sees that it asks for it",
    "umask": "tests/test_sealed.py makes such a key; the folder is root's",
}


def code(page: Path) -> Iterator[tuple[str, str]]:
    """The blocks of a page: their kinds, and what is in them."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield match["kind"], match["code"]


def lines(text: str) -> list[str]:
    """The commands of a block."""
    joined = [re.sub(" +", " ", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in joined if line and not line.startswith("#")]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def steps(page: Path) -> Iterator[tuple[str, str | list[str]]]:
    """The python blocks and the `fedssl` commands of a page, in order, the runs shrunk."""
    for kind, text in code(page):
        if kind == "python":
            yield "python", text
        for line in lines(text) if kind == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                yield from (("fedssl", smaller(page, command)) for command in recipe(words[1]))
            elif words[0] == "fedssl":
                yield "fedssl", smaller(page, words[1:])


def recipe(target: str) -> list[list[str]]:
    """The `fedssl` commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, f"the Makefile has no {target}"
    return [shlex.split(line)[1:] for line in found[1].splitlines() if line.startswith("\t$(BIN)/fedssl ")]


def smaller(page: Path, words: list[str]) -> list[str]:
    """A command, with options that shrink it if it is a run."""
    if words[0] != "pretrain":
        return words
    data = next((word for word in words if word.startswith(("data=", "experiment="))), "data=digits")
    own = {word.split("=")[0] for word in words}
    fewer = [option for option in FEWER.get(data, FEWER["any other"]) if option.split("=")[0] not in own]
    return [*words, *SMALL, *fewer, *([] if page.name in ("start.md", "runs.md") else ["evaluate.final=false"])]


def stand_ins(folder: Path) -> None:
    """Small files in place of those that only a reader has: /path/to/... of the pages."""
    rng = np.random.default_rng(0)
    images = {
        f"{part}_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for part, n in (("train", 60), ("test", 20))
    }
    np.savez(folder / "cifar10.npz", **images, train_labels=np.arange(60) % 10, test_labels=np.arange(20) % 10)
    each = np.arange(240)  # 30 people, two recordings of four windows
    signals = rng.standard_normal((240, 9, 32)).astype(np.float32)
    np.savez(folder / "har_smartphone.npz", signals=signals, labels=each % 6, subjects=each // 8, experiments=each // 4)


TESTED = [page for page in PAGES if page.name not in OWN and any(kind in RUN for kind, _ in code(page))]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=name_of(p), marks=pytest.mark.slow if p.name in LONG else ()) for p in TESTED]
)
def test_commands_and_code_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, because importing torch costs more than most commands; a page is read from top to bottom."""
    names: dict[str, object] = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inversion_demo, "STEPS", 20)
    for budget in ("_STEPS", "_ROUNDS", "_FEWEST"):  # as test_audit_runs.py has them
        monkeypatch.setattr(canaries, budget, 40)
    if page.name not in DRAWN:
        monkeypatch.setattr(simulation, "finish_report", lambda run: None)
    if "/path/to/" in page.read_text():
        stand_ins(tmp_path)
    for kind, content in steps(page):
        if isinstance(content, str):
            assert kind == "python"
            exec(content, names)
        elif "engine=ray" in content:
            continue  # half a minute: tests/test_engines.py runs it
        else:
            assert cli.answer([word.replace("/path/to", str(tmp_path)) for word in content]) == 0, content


def test_no_command_is_forgotten() -> None:
    """A command that is not run here has its reason, and no reason is without its command."""
    used = set()
    for page in PAGES:
        for kind, text in code(page):
            assert kind in KINDS, f"{name_of(page)}: say of what kind a block is: {', '.join(KINDS)}"
            for line in lines(text) if kind in ("bash", "sh") else ():
                words = shlex.split(line, comments=True)
                here = kind == "bash" and (words[0] == "fedssl" or (words[0] == "make" and bool(recipe(words[1]))))
                reasons = {begin for begin in ELSEWHERE if line.startswith(begin)}
                assert here or reasons, f"{name_of(page)}: nothing runs {line!r}"
                used |= reasons
    assert used == set(ELSEWHERE)
    for reason in ELSEWHERE.values():
        for test in re.findall(r"tests/\w+\.py", reason):
            assert (ROOT / test).exists(), test


def test_options_of_commands_for_other_machines_are_known() -> None:
    for page in PAGES:
        for kind, text in code(page):
            for line in lines(text) if kind == "sh" else ():
                words = shlex.split(line, comments=True)
                if words[0] == "fedssl":
                    config.compose([word for word in words if "=" in word])


def test_words_of_the_prose_exist() -> None:
    """Commands, targets, extras, options and their fields that a sentence names."""
    commands = re.findall(r"^  (\w+)", cli.USAGE, re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    options = {group: config.options_of(group) for group in config.groups()}
    known = {group: fields(group) for group in options} | sections()
    field = re.compile(rf"(?<![\w.@/-])({'|'.join(known)})\.(\w+)(?![\w(])")
    for page in PAGES:
        for words in re.findall(r"`([^`]+)`", prose(page)):
            told = f"{name_of(page)}: `{words}`"
            assert all(name in commands for name in re.findall(r"^fedssl ([a-z]+)", words)), told
            assert all(name in targets for name in re.findall(r"^make ([\w-]+)", words)), told
            assert all(name in extras for name in re.findall(r"fedssl\[(\w+)\]", words)), told
            for name in re.findall(r"python -m benchmarks\.(\w+)", words):
                assert name.isupper() or (ROOT / "benchmarks" / f"{name}.py").exists(), told
            for group, option in re.findall(r"(?<![\w.@])(\w+)=(\w+)", words):
                assert option.isupper() or option in options.get(group, [option]), told
            for group, key in field.findall(words):
                assert key.isupper() or key in ("json", "safetensors") or key in known[group], told


def sections() -> dict[str, set[str]]:
    """The parts of config.yaml that are no groups, with their keys."""
    tree = yaml.safe_load((config.conf_dir() / "config.yaml").read_text())
    return {name: set(part) for name, part in tree.items() if isinstance(part, dict) and name != "hydra"}


def fields(group: str) -> set[str]:
    """The keys of all options of a group, those included that another group fills."""
    found: set[str] = set()
    for path in (config.conf_dir() / group).glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        found |= set(yaml.safe_load(text)) | set(re.findall(r"^  - /\w+@(\w+)", text, re.MULTILINE))
    return found


def test_links_lead_somewhere() -> None:
    """Files; what is between pages, anchors too, tests/test_site.py looks at."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^):#]+)(?:#[\w-]+)?\)", prose(page)):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"
        told = re.sub(r"^`[\w/.]+`:$", "", prose(page), flags=re.MULTILINE)  # files that a page adds
        for name in re.findall(r"`((?:docs|tests|fedssl|strategies|simulations|benchmarks|conf)/[\w/.]+\.\w+)`", told):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"


def test_the_table_of_the_readme_is_that_of_the_configuration() -> None:
    text = catalogue.PAGE.read_text(encoding="utf-8").split(pages.begin(catalogue.COMMAND))[1].split(pages.END)[0]
    assert text == catalogue.table(), "run `python -m benchmarks.catalogue`"


def test_every_option_is_on_its_page() -> None:
    for group, name in catalogue.PAGES.items():
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        families = tuple(re.findall(r"`(\w+_)\*`", text))
        told = [o for o in config.options_of(group) if re.search(rf"\b{o}\b", text) or o.startswith(families)]
        assert told == config.options_of(group), f"docs/{name}.md says nothing of some {group}"


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 60
