"""Rules of the tree that no reviewer should have to check: who imports whom, sizes, forbidden calls."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for folder in ("fedssl", "strategies", "simulations") for p in (ROOT / folder).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in FILES]

# Each layer may import itself and the ones before it. A folder is in the layer of the one around it unless it is named.
LAYERS = (
    {
        *("errors", "parts", "seeds", "files", "tree", "build", "intervals"),
        *("partition", "participation", "compression", "edge"),
    },
    {
        *("constants", "draws", "descent", "model", "method", "temperature", "schedules", "diagnostics", "probes"),
        *("duplicates", "networks", "losses", "theory", "measures", "modalities", "datasets", "methods.common"),
    },
    {"methods", "gradient", "client", "cohort", "workshop", "privacy", "aggregation"},
    {"sites", "job", "rundir", "progress"},
    {"evaluation", "export", "report", "tracking"},
    {"config", "simulation"},
    {"flower"},
)


def layer(module: str) -> int:
    """The layer of a module of fedssl, given as `fedssl.x.y`: that of its innermost folder or file that is named."""
    path = module.split(".")[1:]
    names = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    return next(i for name in names for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at run time) of every import of a file; those under TYPE_CHECKING are not at run time."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            found.append((name, id(node) not in typing_only))
            if name == "fedssl":
                found += [(f"fedssl.{alias.name}", id(node) not in typing_only) for alias in node.names]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_follow_the_layers(name: str) -> None:
    path = ROOT / name
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for imported, runtime in imports(path):
        root = imported.split(".")[0]
        if module.startswith("fedssl"):
            assert root not in ("strategies", "simulations"), f"the library imports {imported}"
            if imported.count(".") and module.count(".") and root == "fedssl" and runtime:
                assert layer(imported) <= layer(module), f"{module} imports {imported} of a higher layer"
        if root == "flwr":
            assert module.startswith("fedssl.flower") or module == "strategies.base", f"{module} imports flwr"
        if root in ("hydra", "omegaconf"):
            assert module == "fedssl.config" or module.startswith("simulations"), f"{module} imports {root}"
        if root == "matplotlib":
            in_report = module.removeprefix("fedssl.report.")
            drawing = module != in_report and (in_report in ("figures", "charts") or in_report.endswith("_figures"))
            assert drawing, f"{module} imports matplotlib"
        if root == "opacus":
            assert module.startswith("fedssl.privacy"), f"{module} imports opacus"
        if root == "torch" and module.startswith("fedssl.") and runtime and module != "fedssl.seeds":
            assert layer(module) > 0, f"{module} imports torch"
        if root == "torch":
            assert not module.startswith("strategies"), f"{module} imports torch"
        assert root not in ("torchvision", "timm", "lightly"), f"{module} imports {root}, which needs a CUDA torch"
        if root in ("pickle", "dill", "cloudpickle", "marshal"):
            assert module == "fedssl.datasets.cifar", f"{module} imports {root}"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", NAMES)
def test_nothing_forbidden_is_called(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno}: assert outside the tests"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.manual_seed", "random.seed", "torch.seed"), f"{name}:{node.lineno}: {called}"
            own = called in ("np.random.Generator", "np.random.PCG64") or (
                called == "np.random.default_rng" and node.args
            )
            assert own or not called.startswith(("np.random.", "random.")), (
                f"{name}:{node.lineno}: {called} draws from a global generator"
            )
            if name.startswith("fedssl"):
                assert called != "print", f"{name}:{node.lineno}: print in the library"
            if called in ("torch.load", "np.load"):
                text = ast.unparse(node)
                assert "weights_only=True" in text or "allow_pickle=False" in text, f"{name}:{node.lineno}: {text}"


def test_folders_are_small() -> None:
    for folder in {p.parent for p in FILES} - {ROOT / "fedssl"}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 12, folder


def test_the_map_names_all_there_is() -> None:
    """docs/overview.md says which question each folder and each module beside the folders answers."""
    told = (ROOT / "docs" / "overview.md").read_text()
    for path in (ROOT / "fedssl").iterdir():
        if (path / "__init__.py").exists():
            assert f"`{path.name}/`" in told, path.name
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.stem}`" in told, path.name


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("__init__.py")])
def test_folders_say_what_they_are(name: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / name).read_text()))
