"""The reference shows everything public, and everything public says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fedssl import config
from fedssl.build import load

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
OURS = ("fedssl", "strategies", "simulations")
PUBLIC = (  # modules of which every class and function is public
    "fedssl",
    *("fedssl.config", "fedssl.errors", "fedssl.rundir", "fedssl.seeds"),  # runs
    *("fedssl.method", "fedssl.parts", "fedssl.gradient", "fedssl.temperature", "fedssl.schedules"),
    "fedssl.networks.heads",
    *("fedssl.losses", "fedssl.losses.moments", "fedssl.losses.decomposed", "fedssl.theory"),
    *("fedssl.datasets.base", "fedssl.partition", "fedssl.duplicates", "fedssl.participation.base"),
    *("fedssl.diagnostics", "fedssl.probes", "fedssl.measures.retrieval", "fedssl.measures.alarms"),
    *("fedssl.privacy.accountant", "fedssl.privacy.release", "fedssl.privacy.audit", "fedssl.privacy.clients.banded"),
    *("strategies.base", "strategies.rules", "simulations.studies.base"),
)


def of_module(module: ModuleType) -> dict[str, Any]:
    """The classes and functions that a module offers, by name."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    found = {f"{module.__name__}.{name}": getattr(module, name) for name in names if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))
    }


def of_yaml() -> dict[str, Any]:
    """The classes of this project that a yaml names, wherever it is nested."""

    def targets(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "_target_")
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from targets(child)

    trees = (yaml.safe_load(path.read_text()) for path in config.conf_dir().rglob("*.yaml"))
    return {name: load(name) for tree in trees for name in targets(tree) if name.startswith(OURS)}


def of_pages() -> dict[str, Any]:
    """What the code on the pages imports by name; modules that it imports must be public as a whole."""
    found = {}
    for page in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
            for node in imports if page.name != "extending.md" else ():
                module = importlib.import_module(str(node.module))
                if str(node.module).startswith(OURS):
                    found |= {f"{node.module}.{alias.name}": getattr(module, alias.name) for alias in node.names}
    for name, value in found.items():
        assert not inspect.ismodule(value) or name in PUBLIC, f"a page imports {name}, which is not public as a whole"
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def public() -> dict[str, Any]:
    """Everything that may be built upon, by the name under which it is found."""
    modules = [of_module(importlib.import_module(name)) for name in PUBLIC]
    return {name: value for part in (*modules, of_yaml(), of_pages()) for name, value in part.items()}


def shown() -> dict[str, Any]:
    """What the pages of the reference ask mkdocstrings for."""
    found = {}
    for page in REFERENCE.glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            home, _, last = name.rpartition(".")
            value = getattr(importlib.import_module(home), last, None) if home else None
            if value is None or inspect.ismodule(value):
                found |= of_module(importlib.import_module(name))
            else:
                found[name] = value
    return found


def test_everything_public_has_a_place_in_the_reference() -> None:
    there = {id(value) for value in shown().values()}
    missing = [name for name, value in public().items() if id(value) not in there]
    assert not missing, f"no page of docs/reference shows {', '.join(missing)}"


@pytest.mark.parametrize("everything", [public, shown])
def test_everything_public_says_what_it_is(everything: Any) -> None:
    silent = [name for name, value in everything().items() if not described(value)]
    for name, value in everything().items():
        members = vars(value) if inspect.isclass(value) and value.__module__.startswith(OURS) else {}
        functions = {
            key: member for key, member in members.items() if inspect.isfunction(member) or isinstance(member, property)
        }
        silent += [f"{name}.{key}" for key in functions if key[0] != "_" and not inspect.getdoc(getattr(value, key))]
    assert not silent, f"without a docstring: {', '.join(silent)}"


def described(value: Any) -> bool:
    """Whether an object has a docstring of its own: a dataclass without one is given its signature."""
    text = value.__doc__ or ""
    return bool(text) and not text.startswith(f"{value.__name__}(")


def test_what_is_silent_would_be_found() -> None:
    assert not described(type("Silent", (), {}))
    assert described(load("fedssl.methods.byol.BYOL"))
