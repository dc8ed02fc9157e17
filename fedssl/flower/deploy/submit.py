"""Hand a run to a SuperLink by Flower's own command line, and wait for what becomes of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError, ProtocolError

# The app that is sent: nodes run the fedssl that is installed on them, so nothing but these names travels.
_APP = """\
[project]
name = "fedssl-deployed"
version = "{version}"
[tool.flwr.app]
publisher = "fedssl"
[tool.flwr.app.components]
serverapp = "fedssl_server:app"
clientapp = "fedssl_client:app"
[tool.flwr.app.config]
overrides = ""
out = ""
fedssl = ""
"""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Submission:
    """A run on a SuperLink.

    Attributes:
        connection: its name in `$FLWR_HOME/config.toml`.
        run: Flower's number of the run.
    """

    connection: str
    run: str

    def status(self) -> tuple[str, str]:
        """(status, details), such as ("finished:failed", "a client failed").

        Raises:
            ProtocolError: the SuperLink does not answer.
        """
        found = _flwr("list", self.connection, "--run-id", self.run, "--format", "json")
        for row in found.get("runs", ()):
            if str(row.get("run-id")) == self.run:
                return str(row.get("status")), str(row.get("status-details", ""))
        raise ProtocolError(f"the SuperLink {self.connection!r} knows no run {self.run}: its database is another one")

    def wait(self, say: Callable[[str], None], every_s: float = 5.0, patience_s: float = 900.0) -> tuple[str, str]:
        """Wait until the run has ended, with its log on this process's output; returns its last status.

        Args:
            say: told when the status changes.
            every_s: seconds between two looks, where the log breaks off.
            patience_s: how long the SuperLink may be away, to be restarted for example.

        Raises:
            ProtocolError: it has been away for longer.
        """
        last, seen = "", time.monotonic()
        while True:
            _call("log", self.run, self.connection, "--stream", shown=True)  # ends with the run, or the connection
            try:
                status, details = self.status()
                seen = time.monotonic()
            except ProtocolError as error:
                if time.monotonic() - seen > patience_s:
                    raise
                status, details = f"unknown ({error})", ""
            if status != last:
                say(f"run {self.run}: {status}")
                last = status
            if status.startswith("finished"):
                return status, details
            time.sleep(every_s)


def submit(overrides: Sequence[str], out: str, connection: str) -> Submission:
    """Send a run to the SuperLink of a connection; its nodes need fedssl of this version.

    Args:
        overrides: of the configuration.
        out: an absolute folder on the machine that runs the ServerApp. A run that has begun there goes on.
        connection: a name in `$FLWR_HOME/config.toml`; empty: its default.

    Raises:
        ConfigError: `out` is relative.
        ProtocolError: the SuperLink does not take the run.
    """
    if not Path(out).is_absolute():
        raise ConfigError(f"--out {out} is relative to a folder of Flower's: give an absolute one, on the server")
    here = version("fedssl")
    with tempfile.TemporaryDirectory(prefix="fedssl-") as folder:
        app = Path(folder) / "fedssl-deployed"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP.format(version=here), encoding="utf-8")
        for side in ("server", "client"):
            line = f'from fedssl.flower.{side}_app import app\n\n__all__ = ["app"]\n'  # Flower looks for it there
            (app / f"fedssl_{side}.py").write_text(line, encoding="utf-8")
        values = {"overrides": shlex.join(overrides), "out": out, "fedssl": here}
        chosen = Path(folder) / "run.toml"
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())  # TOML quotes as JSON does
        chosen.write_text("".join(lines), encoding="utf-8")
        found = _flwr("run", str(app), connection, "--run-config", str(chosen))
    run = found.get("run-id")
    if run is None:
        raise ProtocolError(f"the SuperLink did not take the run ({found}): read its log")
    return Submission(connection, str(run))


def _flwr(*words: str) -> dict[str, Any]:
    done = _call(*words, *(() if "--format" in words else ("--format", "json")))
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = None
    if done.returncode or not isinstance(found, dict) or found.get("success") is False:
        said = found.get("error-message", found) if isinstance(found, dict) else done.stdout + done.stderr
        raise ProtocolError(f"flwr {words[0]} failed: {' '.join(str(said).split())[:500]}")
    return found


def _call(*words: str, shown: bool = False) -> subprocess.CompletedProcess[str]:
    """Flower's command of this very environment."""
    command = Path(sys.executable).with_name("flwr")
    environment = {**os.environ, **{key: os.environ.get(key, value) for key, value in _QUIET.items()}}
    given = [word for word in words if word]  # without a connection Flower takes its default
    return subprocess.run([str(command), *given], capture_output=not shown, text=True, env=environment, check=False)
