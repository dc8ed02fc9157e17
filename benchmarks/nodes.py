"""Flower's SuperLink and SuperNodes as processes of this machine, under TLS and with keys, to be hurt."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from ssl import create_default_context

import numpy as np

from fedssl import config
from fedssl.flower.deploy import keys
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Federation:
    """A SuperLink on this machine, and what belongs to it.

    Attributes:
        folder: of keys, logs, databases and states.
        port: of the SuperLink.
        environment: of all its processes; its `FLWR_HOME` is this federation's alone.
        processes: the daemons by name.
    """

    folder: Path
    port: int
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def begin(self, name: str, command: str, *words: str, **more: str) -> subprocess.Popen[bytes]:
        """Start one of Flower's daemons in a process group of its own, with its log in the folder.

        `more` is put into its environment.
        """
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / command), *words], env=self.environment | more, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def superlink(self, isolation: str = "subprocess") -> None:
        """Start the SuperLink, with what it has in its database, and wait until it answers."""
        own, secret = self.folder / "keys", ["--superexec-auth-secret-file", f"{self.folder}/keys/superexec.secret"]
        self.begin(
            "superlink", "flower-superlink", "--ssl-ca-certfile", f"{own}/ca.crt", "--ssl-certfile",
            f"{own}/server.crt", "--ssl-keyfile", f"{own}/server.key", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(self.port),
            "--database", f"{self.folder}/state.db", "--isolation", isolation,
            *(secret if isolation == "process" else []),
        )  # fmt: skip
        trusted, limit = create_default_context(cafile=str(own / "ca.crt")), time.monotonic() + 180
        while time.monotonic() < limit:
            with suppress(OSError):
                urllib.request.urlopen(f"https://127.0.0.1:{self.port}/health", context=trusted, timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not answer\n{self.logs()}")

    def superexec(self) -> None:
        """Start what runs the ServerApp beside a SuperLink with `isolation` process."""
        self.begin(
            "superexec", "flower-superexec", "--runtime-api-address", f"127.0.0.1:{self.port}", "--root-certificates",
            f"{self.folder}/keys/ca.crt", "--superexec-auth-secret-file", f"{self.folder}/keys/superexec.secret",
        )  # fmt: skip

    def node(
        self,
        name: str,
        client: int,
        place: str,
        key: Path | None,
        authority: Path | None = None,
        port: int = 0,
        state: Path | None = None,
        **more: str,
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode.

        Args:
            name: of its log.
            client: its partition-id.
            place: its data-dir.
            key: of the node, if it has one.
            authority: whom it trusts, if not this federation's.
            port: where it reaches the SuperLink, if not directly.
            state: its state-dir, if not one with the others.
            more: variables of its environment.
        """
        signed = ["--auth-supernode-private-key", str(key)] if key else []
        retries = ["--max-retries", "2"] if authority else []  # one that cannot connect would try for ever
        return self.begin(
            name, "flower-supernode", *retries, "--superlink", f"127.0.0.1:{port or self.port}", "--root-certificates",
            str(authority or self.folder / "keys" / "ca.crt"), *signed, "--port", str(free_port()), "--node-config",
            f'partition-id={client} data-dir="{place}" state-dir="{state or self.folder / "state"}"', **more,
        )  # fmt: skip

    def register(self, nodes: int) -> None:
        """Tell the SuperLink the public keys."""
        asked = [
            subprocess.Popen(
                [str(BIN / "flwr"), "supernode", "register", f"{self.folder}/keys/node-{number}.pub", "edge"],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for number in range(nodes)
        ]
        for process in asked:
            said, _ = process.communicate(timeout=180)
            if process.returncode:
                raise RuntimeError(said.decode())

    def kill(self, name: str) -> None:
        """kill -9 a daemon and all that it has started."""
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)

    def logs(self) -> str:
        """The end of all logs."""
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


@contextmanager
def federation(folder: Path, nodes: int) -> Iterator[Federation]:
    """Keys and a place for a federation; on leaving, no process of it is left."""
    keys.make(folder / "keys", nodes, ["127.0.0.1"])
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower's daemons look for one another there
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_NUM_THREADS": "1",
    }
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "edge"\n[superlink.edge]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder}/keys/ca.crt"\n'
    )
    running = Federation(folder, port, environment)
    try:
        yield running
    finally:
        for name in list(running.processes):
            running.kill(name)
        for process in Path("/proc").glob("[0-9]*"):  # what a daemon has left behind; the home tells whose it is
            with suppress(OSError):
                if f"FLWR_HOME={folder}/home\0".encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)


def own_data(folder: Path, nodes: int) -> list[str]:
    """Unlabelled grey images for so many nodes, of different sizes; returns where."""
    rng, places = np.random.default_rng(0), []
    for node in range(nodes):
        places.append(str(folder / f"site-{node}.npz"))
        train, test = (rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) for n in (32 + 8 * node, 2))
        np.savez(places[-1], train_images=train, test_images=test)
    return places


# A tiny run on such data.
OPTIONS = (
    *("data=npz", "data.path=", "data.augment.mean=[0.5]", "data.augment.std=[0.25]"),
    *("partition=sites", "partition.shape=[1,8,8]", "encoder.width=4", "encoder.dim=8", "method.hidden=16"),
    *("method.out=8", "local.batch_size=8", "evaluate.every=0", "evaluate.final=false", "device=cpu"),
    *("federation.tolerate=null", "federation.quorum=0.5"),
)


def simulated(rundir: RunDirectory, places: Sequence[str], options: Sequence[str], *others: str) -> RunDirectory:
    """A run of these nodes once more, in this process, beside it.

    Args:
        rundir: of the run.
        places: the data of its nodes.
        options: of the run.
        others: more options, such as those of `same_clients`.
    """
    beside = [f"engine.sites=[{','.join(places)}]", f"out={rundir.path.parent}", f"name={rundir.path.name}-simulated"]
    plan = config.compose([*options, *beside, *others])
    again = plan.open()
    plan.build_engine().run(plan.job, again, Reporter(quiet=True))
    return again


def same_clients(rundir: RunDirectory) -> tuple[str, ...]:
    """Options by which those clients take part in each round that took part in this run."""
    return "participation=replay", f"participation.path={rundir.path / 'clients.jsonl'}"


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own in a new folder, to be filled.

    Raises:
        OSError: this user may mount none.
    """
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise OSError(" ".join(mounted.stderr.split()))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on a disk; returns the file to delete for room."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


class Wire:
    """A cable between a node and its SuperLink that can be cut: forwards connections of a port to another.

    Attributes:
        port: where the node connects.
        spoils: whether a bit of whatever the node sends is flipped on its way.
    """

    def __init__(self, port: int) -> None:
        self._target, self._open, self.spoils = port, set[socket.socket](), False
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks, and none can be made."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Connections can be made again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with suppress(OSError), near, socket.create_connection(("127.0.0.1", self._target)) as far:
            self._open |= {near, far}
            while True:
                for end in select.select([near, far], [], [])[0]:
                    content = end.recv(1 << 16)
                    if not content:
                        self._open -= {near, far}
                        return
                    if self.spoils and end is near:
                        content = content[:-1] + bytes([content[-1] ^ 1])
                    (far if end is near else near).sendall(content)
