"""Every command and every piece of code in README and docs is run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations import cli, pretrain
from simulations.audits import canaries, inversion_demo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>bash|python|yaml)\n(?P<code>.*?)```", re.DOTALL)
# What a reader runs at full size is run here for one round, on few examples; pages on figures have them drawn.
SMALL = [
    *("federation.rounds=1", "evaluate.every=0", "evaluate.repeats=1", "evaluate.examples=200"),
    *("device=cpu", "baselines=false"),
]
FEWER = {
    "digits": ["data.test_fraction=0.7"],
    "joined": [],
    "npz": [],
    "any other": ["data.train=300", "data.test=100"],
}
DRAWN = ("README.md", "runs.md", "collapse.md")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, without what a run or a build would leave in it."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("fedssl", "strategies", "simulations", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(command: list[str], tree: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def steps(page: Path) -> Iterator[tuple[str, str | list[str]]]:
    """The python blocks and the `fedssl` commands of a page, in order, the runs shrunk."""
    for match in BLOCK.finditer(page.read_text()):
        if match["file"]:
            continue
        if match["kind"] == "python":
            yield "python", match["code"]
        for line in match["code"].replace("\\\n", " ").splitlines() if match["kind"] == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fedssl"]:
                yield "fedssl", [*words[1:], *(smaller(page, words) if words[1] == "pretrain" else [])]
            elif words:
                assert words[0] in ("make", "git", "cd", "pip", "python"), (
                    f"{line!r} is a command that nothing here runs"
                )


def smaller(page: Path, words: list[str]) -> list[str]:
    """Options that shrink a run."""
    data = next((word[5:] for word in words if word.startswith("data=")), "digits")
    own = {word.split("=")[0] for word in words}
    fewer = [option for option in FEWER.get(data, FEWER["any other"]) if option.split("=")[0] not in own]
    return [*SMALL, *fewer, *([] if page.name in ("README.md", "runs.md") else ["evaluate.final=false"])]


LONG = ("audits.md", "client_privacy.md", "strategies.md", "studies.md")  # `make test-all` runs them


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=pytest.mark.slow if p.name in LONG else ()) for p in PAGES]
)
def test_commands_and_code_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, because importing torch costs more than most commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inversion_demo, "STEPS", 20)
    for budget in ("_STEPS", "_ROUNDS", "_FEWEST"):  # as test_audit_runs.py has them
        monkeypatch.setattr(canaries, budget, 40)
    if page.name not in DRAWN:
        monkeypatch.setattr(pretrain, "finish_report", lambda run: None)
    for kind, content in steps(page):
        if kind == "python":
            exec(content, {"__name__": "__main__"})
        elif "engine=ray" in content:
            continue  # half a minute: tests/test_engines.py runs it
        else:
            assert cli.answer(content) == 0, content


@pytest.mark.slow
def test_the_extensions_join_the_contract(copy: Path, tmp_path: Path) -> None:
    files = [match for match in BLOCK.finditer((ROOT / "docs" / "extending.md").read_text()) if match["file"]]
    assert len(files) == 4
    for match in files:
        (copy / match["file"]).write_text(match["code"])
    names = "((align and images) or damped) and not golden"
    suite = ["tests/test_methods.py", "tests/test_strategies.py", "tests/test_config.py"]
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite, "-k", names], copy, copy)
    pretrain = ["pretrain", "method=align", "strategy=damped", "name=mine", *SMALL, *FEWER["digits"]]
    code = f"from simulations.cli import answer; assert answer(['list']) == answer({pretrain}) == 0"
    listed = run([sys.executable, "-c", code], copy, tmp_path).stdout
    assert "method=align" in listed
    assert "strategy=damped" in listed
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"`((?:docs|tests|fedssl|strategies|benchmarks)/[\w/.]+\.\w+)`", prose):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
