"""Flower's SuperLink and SuperNodes as real processes, under TLS and with keys: the same bits as in one process."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import stat
import subprocess
import threading
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from ssl import SSLContext, SSLError, create_default_context
from typing import Any

import numpy as np
import pytest
from conftest import TINY, assert_same, execute, final_arrays
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from benchmarks.nodes import ROOT, Federation, Wire, federation
from fedssl import config
from fedssl.errors import ConfigError, FedsslError, ProtocolError
from fedssl.flower.deploy import keys, site, submit
from fedssl.rundir import RunDirectory
from simulations import cli, deployment

OPTIONS = [
    *(option for option in TINY if not option.startswith(("data", "partition", "engine", "federation.clients"))),
    *("data=npz", "data.path=", "data.augment.mean=[0.5]", "data.augment.std=[0.25]"),
    *("partition=sites", "partition.shape=[1,8,8]", "federation.clients=2"),
    *("method=byol", "strategy.share.teacher=local"),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), 3) as running:
        running.superlink()
        yield running


@dataclass(frozen=True)
class Caller:
    """Speaks to a SuperLink as a SuperNode does: every request has the node's public key and a signed time."""

    port: int
    key: ec.EllipticCurvePrivateKey
    trusted: SSLContext

    @property
    def public(self) -> bytes:
        return public_key_to_bytes(self.key.public_key())

    def ask(self, path: str, message: Any, skew: float = 0.0, **changed: bytes) -> tuple[int, bytes]:
        """Status and content of the answer; `skew`: seconds by which the node's clock is wrong."""
        stamp = (now() + timedelta(seconds=skew)).isoformat()
        own = {"public-key": self.public, "signature": sign_message(self.key, stamp.encode())}
        own |= {name.replace("_", "-"): value for name, value in changed.items()}
        headers = {f"flwr-{name}": b64encode(value).decode() for name, value in own.items()}
        request = urllib.request.Request(
            f"https://127.0.0.1:{self.port}/v1/fleet/{path}",
            message.SerializeToString(),
            {**headers, TIMESTAMP_HEADER: stamp, "Content-Type": PROTOBUF_MEDIA_TYPE},
        )
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.trusted) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def spoilt_claims_are_refused(real: Federation) -> None:
    """A registered node is answered; one bit, another's key, another's number or a wrong clock, and it is not."""
    own, trusted = real.folder / "keys", create_default_context(cafile=str(real.folder / "keys" / "ca.crt"))
    keys_of = [load_ssh_private_key((own / f"node-{n}.key").read_bytes(), None) for n in (1, 2)]
    other, caller = (Caller(real.port, key, trusted) for key in keys_of)  # type: ignore[arg-type]
    status, content = caller.ask("activate-node", ActivateNodeRequest(public_key=caller.public, heartbeat_interval=60))
    assert status == 200, content
    node = ActivateNodeResponse.FromString(content).node_id

    def beat(by: Caller = caller, number: int = node, **words: Any) -> int:
        message = SendNodeHeartbeatRequest(node=Node(node_id=number), heartbeat_interval=60)
        return by.ask("send-node-heartbeat", message, **words)[0]

    assert beat() == 200
    assert beat(skew=-240) == 200  # Flower lets clocks be five minutes late
    assert beat(skew=-400) == 401  # nor is a message taken that somebody kept and sends again later
    assert beat(skew=60) == 401
    assert beat(number=node ^ 1) == 401
    assert beat(by=other) == 401
    assert beat(public_key=other.public) == 401
    assert beat(signature=sign_message(caller.key, b"2020-01-01T00:00:00+00:00")) == 401
    wire = Wire(real.port)
    through = Caller(wire.port, caller.key, trusted)
    assert beat(by=through) == 200
    for spoilt in (False, True):
        plain = socket.create_connection(("127.0.0.1", wire.port), timeout=30)
        with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            wire.spoils = spoilt  # the handshake is over
            secure.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answered = b""
            with contextlib.suppress(SSLError, ConnectionError):
                answered = secure.recv(64)
            assert answered.startswith(b"HTTP/1.1 200") is not spoilt
    with pytest.raises(urllib.error.URLError):
        beat(by=through)
    wire.cut()


def test_a_federation_under_tls_with_keys_equals_the_simulation(
    real: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = real.folder / "keys"
    rng, places = np.random.default_rng(0), []
    for number, count in enumerate((24, 16)):
        places.append(str(real.folder / f"site{number}.npz"))
        images = [rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) for n in (count, 2)]
        np.savez(places[-1], train_images=images[0], test_images=images[1])
    real.register(3)
    keys.make(tmp_path / "other", 1, ["127.0.0.1"])
    strange = tmp_path / "other" / "ca.crt"
    strangers = [
        real.node("keyless", 0, places[0], None),
        real.node("misled", 0, places[0], own / "node-0.key", strange),  # it trusts another authority
    ]
    nodes = [real.node(f"node-{n}", n, places[n], own / f"node-{n}.key") for n in range(2)]
    for name, value in real.environment.items():
        monkeypatch.setenv(name, value)
    code = cli.answer(["submit", "edge", "--out", str(tmp_path), "--every", "2", *OPTIONS, "name=deployed"])
    assert code == 0, capsys.readouterr().err + real.logs()
    deployed = RunDirectory(tmp_path / "deployed")
    assert deployed.done
    assert (deployed.path / "report.html").exists()
    assert [row["clients"] for row in deployed.rows()] == [2, 2]
    rehearsal = [*OPTIONS, f"engine.sites=[{','.join(places)}]", f"out={tmp_path}", "name=rehearsed"]
    assert_same(final_arrays(deployed), final_arrays(execute(config.compose(rehearsal))))
    (states,) = (real.folder / "state").iterdir()
    assert states.name == deployed.identity()
    assert {path.name for path in states.iterdir()} >= {"000000-000002.safetensors", "000001-000002.safetensors"}
    assert all(node.poll() is None for node in nodes)
    spoilt_claims_are_refused(real)
    for stranger in strangers:
        assert stranger.wait(120) != 0, real.logs()
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        context = create_default_context(cafile=str(strange))
        urllib.request.urlopen(f"https://127.0.0.1:{real.port}/health", context=context, timeout=30)


def test_keys_are_private_whole_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert cli.answer(["keys", str(folder), "--nodes", "2", "--host", "fl.example.org", "--host", "10.0.0.5"]) == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    private = {"ca.key", "server.key", "superexec.secret", "node-0.key", "node-1.key"}
    assert modes == {
        **dict.fromkeys(private, 0o600),
        **dict.fromkeys(("ca.crt", "server.crt", "node-0.pub", "node-1.pub"), 0o644),
    }
    root, leaf = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5"]
    key = load_ssh_private_key((folder / "node-1.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == load_ssh_public_key((folder / "node-1.pub").read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert cli.answer(["keys", str(folder)]) == 2
    assert "keys are never overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for words, expected in (
        (["--nodes", "0"], "at least one of each"),
        (["--nodes", "two"], "--nodes needs a whole number"),
        (["--host", "no_such host"], "neither a name nor an address"),
        (["--colour", "red"], "not an option"),
        (["--host"], "without a value"),
        (["another"], "exactly one new folder"),
    ):
        assert cli.answer(["keys", str(tmp_path / "more"), *words]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "more").exists()
    (tmp_path / "file").write_text("")
    assert cli.answer(["keys", str(tmp_path / "file" / "keys")]) == 2
    assert "cannot be written" in capsys.readouterr().err


class Answers:
    """Flower's command, as `submit` calls it."""

    def __init__(self, **answers: list[tuple[int, str]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, *words: str, shown: bool = False) -> subprocess.CompletedProcess[str]:
        self.asked.append(words)
        if words[0] == "run":
            self.text = Path(words[words.index("--run-config") + 1]).read_text()
        code, said = self.answers[words[0]].pop(0)
        return subprocess.CompletedProcess(words, code, said, "")


def test_a_submitted_run_that_fails_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(status: str, details: str = "") -> tuple[int, str]:
        return 0, f'{{"runs": [{{"run-id": "7", "status": "{status}", "status-details": "{details}"}}]}}'

    gone = (1, '{"success": false, "error-message": "unreachable"}')
    ends = {"finished:completed": 0, "finished:failed": 1, "finished:stopped": 1}
    for status, expected in ends.items():
        flwr = Answers(
            run=[(0, '{"success": true, "run-id": "7"}')],
            log=[(0, ""), (1, ""), (0, "")],
            list=[listed("running"), gone, listed(status, "two clients")],
        )
        monkeypatch.setattr(submit, "_call", flwr)
        words = ["method=byol", 'data.path=/a place/"x".npz']
        monkeypatch.setattr(deployment.config, "compose", lambda _: config.Plan(None, {}, Path("runs/x")))  # type: ignore[arg-type]
        assert cli.answer(["submit", "edge", "--out", "/srv/runs", "--every", "0", *words]) == expected
        said = " ".join(capsys.readouterr().err.split())
        assert f"run 7: {status}" in said
        assert ("run 7 ended as" in said) is (expected == 1)
        told = tomllib.loads(flwr.text)
        assert shlex.split(told["overrides"]) == words
        assert told["out"] == "/srv/runs"
    monkeypatch.setattr(submit, "_call", Answers(run=[gone]))
    assert cli.answer(["submit", "edge", "--out", "/srv/runs"]) == 2
    assert "flwr run failed: unreachable" in capsys.readouterr().err
    for wrong, sentence in ((["--out", "runs"], "is relative"), ([], "--out"), (["a", "b", "--out", "/x"], "one conn")):
        assert cli.answer(["submit", *wrong]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(ProtocolError, match="knows no run 7: its database is another one"):
        monkeypatch.setattr(submit, "_call", Answers(list=[(0, '{"runs": []}')]))
        submit.Submission("edge", "7").status()


def test_another_version_and_an_unreadable_number_are_refused() -> None:
    site.same_version({})
    with pytest.raises(FedsslError, match=r"submitted with fedssl 0\.0\.7 and this machine has .*: install the same"):
        site.same_version({"fedssl": "0.0.7"})
    for wrong in ({}, {"partition-id": "0"}, {"partition-id": -1}, {"partition-id": True}):
        with pytest.raises(ConfigError, match="a number of its own from 0 on"):
            site.client_of(wrong)


def test_the_wire_of_the_soak_can_be_cut_and_mended() -> None:
    def echo(listener: socket.socket) -> None:
        for _ in range(2):
            near, _ = listener.accept()
            with near, contextlib.suppress(ConnectionError):
                while content := near.recv(64):
                    near.sendall(content)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=echo, args=(listener,), daemon=True).start()
    wire = Wire(listener.getsockname()[1])
    near = socket.create_connection(("127.0.0.1", wire.port), timeout=10)
    near.sendall(b"one")
    assert near.recv(64) == b"one"
    wire.cut()
    with contextlib.suppress(ConnectionError):
        assert near.recv(64) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", wire.port), timeout=10)
    wire.mend()
    with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as again:
        again.sendall(b"two")
        assert again.recv(64) == b"two"
    near.close()
    listener.close()


@pytest.mark.parametrize("unit", sorted((ROOT / "deploy" / "systemd").glob("*.service")), ids=lambda path: path.stem)
def test_units_find_what_flower_starts_by_name(unit: Path) -> None:
    text = unit.read_text()
    command = re.search(r"^ExecStart=(\S+)/flower-\w+ ", text, re.MULTILINE)
    assert command
    assert f"\nEnvironment=PATH={command[1]}:" in text
    assert "\nRestart=always\n" in text
