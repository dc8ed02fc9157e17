"""The wheel and the Flower app bundle hold what they must, and run without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import TINY, copy_of_the_sources

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would ship."""
    out = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_sources(out)
    code = f"import hatchling.build as b; print(b.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_ships_exactly_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedssl", "strategies", "simulations"}
    shipped = {name.removeprefix("fedssl/conf/") for name in names if name.startswith("fedssl/conf/")}
    assert shipped == {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
    assert "fedssl/py.typed" in names
    assert not [name for name in names if "test" in name]


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys, fedssl; assert 'site' in fedssl.__file__, fedssl.__file__\n"
        "from simulations.cli import dispatch\n"
        "sys.exit(dispatch(['pretrain', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY, "federation.rounds=1", f"out={tmp_path}", "name=wheel"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **QUIET, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "wheel" / "report.html").exists()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Flower app bundle, built by Flower's own command from a folder of a name that it accepts."""
    source = copy_of_the_sources(tmp_path_factory.mktemp("app"))
    done = subprocess.run(
        [str(Path(sys.executable).parent / "flwr"), "build"], cwd=source, capture_output=True, text=True,
        env={**os.environ, **QUIET, "FLWR_HOME": str(source.parent / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(source.glob("*.fab"))


def test_the_bundle_holds_the_code_and_the_yaml(bundle: Path) -> None:
    names = zipfile.ZipFile(bundle).namelist()
    for name in (
        "fedssl/flower/server_app.py",
        "strategies/fedavg.py",
        "simulations/cli.py",
        "conf/config.yaml",
        "conf/method/byol.yaml",
    ):
        assert name in names
    assert not [name for name in names if name.startswith("tests/")]
    kinds = {Path(name).suffix for name in names}
    assert kinds <= {".py", ".yaml", ".toml", ".md", ""}, "code, configuration and what Flower adds; no data"
    sources = [*ROOT.glob("fedssl/**/*.py"), *ROOT.glob("strategies/**/*.py"), *ROOT.glob("simulations/**/*.py")]
    assert bundle.stat().st_size < 1.5 * sum(path.stat().st_size for path in sources)


def test_the_server_app_runs_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """ServerApp and ClientApp as `flwr run .` enters them, loaded from the unpacked bundle, give the run's own bits."""
    site = tmp_path / "fab"
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(site)
    overrides = " ".join(f"'{o}'" for o in [*TINY, "name=bundle"])
    code = f"""
import fedssl
assert "fab" in fedssl.__file__, fedssl.__file__
from flwr.app import Context, RecordDict
from fedssl.flower.client_app import app as client_app
from fedssl.flower.server_app import app as server_app
from fedssl.flower.in_process import InProcessGrid
with InProcessGrid(client_app, 3, 1) as grid:
    config = {{"overrides": {overrides!r}, "out": {str(tmp_path)!r}}}
    server_app(grid, Context(run_id=1, node_id=1, node_config={{}}, state=RecordDict(), run_config=config))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, **QUIET, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "summary.json").exists()


def test_versions_and_pins_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    names = {requirement.split(">")[0].split("=")[0] for requirement in project["dependencies"]}
    assert {"torch", "flwr", "opacus", "numpy", "hydra-core", "matplotlib"} <= names
    assert names - set(pins) <= {"pillow", "rich", "pyyaml"}
    assert pins["torch"] == "2.13.0"
