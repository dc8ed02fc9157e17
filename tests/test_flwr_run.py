"""`flwr run .`: Flower's own command line, SuperLink and simulated SuperNodes give the same bits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, assert_same, copy_of_the_sources, execute, final_arrays

from fedssl.config import Plan
from fedssl.rundir import RunDirectory


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The app in a folder whose name Flower accepts, and an environment with a SuperLink of its own."""
    folder = copy_of_the_sources(tmp_path / "app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "flwr-home"
    yield (
        folder,
        {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        },
    )
    # Flower leaves its local SuperLink running; this one is ours, known by its home.
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = str(home).encode() in (process / "environ").read_bytes()
            if mine and b"flower" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed")
def test_flwr_run_equals_in_process(
    app: tuple[Path, dict[str, str]], plan: Callable[..., Plan], tmp_path: Path
) -> None:
    folder, environment = app
    # Questions between the rounds, and secrets that a client keeps from one to the next beside its own teacher.
    extra = ["method=byol", "strategy.share.teacher=local", "aggregation=secure"]
    overrides = " ".join([*TINY, *extra, "name=flwr"])
    done = subprocess.run(
        ["flwr", "run", ".", "--stream",
         "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
         "--run-config", f'overrides="{overrides}" out="{tmp_path}"'],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    theirs = RunDirectory(tmp_path / "flwr")
    assert theirs.done, done.stdout + done.stderr
    assert (theirs.path / "report.html").exists()
    assert_same(final_arrays(execute(plan(*extra, name="ours"))), final_arrays(theirs))
