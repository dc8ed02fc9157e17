"""What docs/extending.md adds works as it stands there: it runs, passes the contract tests and the project's checks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
FILE = re.compile(r"^`(?P<file>[\w/.]+)`:\n\n```(?:python|yaml)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```bash\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = ("data.train=120", "data.test=60", "federation.rounds=1", "evaluate.every=0", "evaluate.repeats=1")
FEWER = ("data.test_fraction=0.7",)  # of the digits that the study trains on
KINDS = ("method", "strategy", "data", "study")  # one file and one yaml of each


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with the page's files."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("fedssl", "strategies", "simulations", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = list(FILE.finditer(PAGE.read_text(encoding="utf-8")))
    assert {file.split("/")[1] for match in files if (file := match["file"]).startswith("conf/")} == set(KINDS)
    assert len(files) == 2 * len(KINDS)
    for match in files:
        place = folder / match["file"]
        assert not place.exists(), f"{match['file']} is there already: what the page adds is new"
        place.write_text(match["code"], encoding="utf-8")
    return folder


def run(command: list[str], tree: Path, cwd: Path) -> str:
    """What a command says, with the tree's modules; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_the_page_run(tree: Path, tmp_path: Path) -> None:
    (text,) = (match["code"] for match in COMMANDS.finditer(PAGE.read_text(encoding="utf-8")))
    pretrain, study = (shlex.split(line)[1:] for line in text.splitlines())
    commands = [["list"], [*pretrain, *SMALL, "name=mine"], [*study, *FEWER]]
    code = f"from simulations.cli import answer; assert [answer(words) for words in {commands}] == [0, 0, 0]"
    said = run([sys.executable, "-c", code], tree, tmp_path)
    for listed in ("method=align", "strategy=damped", "data=bars", "fedssl study local_work"):
        assert listed in said
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()
    found = json.loads((tmp_path / "studies" / "local_work-tiny" / "summary.json").read_text())
    assert [row["setting"] for row in found["table"]] == ["1 local epochs", "4 local epochs"]
    assert (tmp_path / "studies" / "local_work-tiny" / "figures" / "accuracy.svg").exists()


def test_the_files_of_the_page_keep_the_style(tree: Path) -> None:
    files = [match["file"] for match in FILE.finditer(PAGE.read_text(encoding="utf-8")) if match["file"][-3:] == ".py"]
    for words in (["check"], ["format", "--check"]):
        run([sys.executable, "-m", "ruff", *words, "--no-cache", *files], tree, tree)


@pytest.mark.slow
def test_the_extensions_join_the_contract(tree: Path) -> None:
    names = "((align and images) or damped or bars or local_work or defaults_equal) and not golden"
    suite = [f"tests/test_{name}.py" for name in ("methods", "strategies", "config", "architecture")]
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite, "-k", names], tree, tree)
