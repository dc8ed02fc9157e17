"""What is promised against servers, files and clients that lie: docs/security.md, promise by promise."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, execute, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedssl import config
from fedssl.build import load
from fedssl.errors import ConfigError, FedsslError, PrivacyError, ProtocolError
from fedssl.flower import codec, engines
from fedssl.flower.client import trust
from fedssl.flower.client_app import app
from fedssl.flower.in_process import InProcessGrid
from fedssl.job import Job
from fedssl.job.setup import data_of, initial_model, shares_of
from fedssl.parts import Arrays
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.secagg import participant
from fedssl.privacy.spending import pay
from simulations.attacks import liars

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fedssl", "strategies", "simulations", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PLACES = (*Job.GROUPS, "public", "encoders.a", "data.augment", "method.out", "local.lr", "data.train")


def job_of(*options: str) -> Job:
    return config.compose(tiny("method=byol", "method.norm=layer", *options)).job


@dataclass
class Server:
    """A server of one client, which may send it anything."""

    grid: InProcessGrid

    @property
    def context(self) -> Context:
        return self.grid.context(1)

    def send(self, tree: Any, at: int = 1, **words: Any) -> Message:
        """One instruction to train; the arrays fit the honest job."""
        content = RecordDict({codec.ARRAYS: codec.encode(initial()), codec.CONFIG: _config(tree, at, words)})
        return app(self.grid.create_message(content, "train", 1, "round"), self.context)

    def state(self) -> codec.ClientState:
        return codec.ClientState.load(self.context)


def _config(tree: Any, at: int, words: dict[str, Any]) -> ConfigRecord:
    named = {key.replace("_", "-"): value for key, value in words.items()}
    return ConfigRecord({"job": json.dumps(tree), "server-round": at, "attempt": 1, **named})


def initial() -> Arrays:
    job = job_of()
    model = initial_model(job, data_of(job, torch.device("cpu")).train.shape)
    shares = shares_of(job, model)
    return {key: value.numpy().copy() for key, value in model.state_dict().items() if shares[key].comes}


@pytest.fixture
def server() -> Iterator[Server]:
    with InProcessGrid(app, 3) as grid:
        yield Server(grid)


# Code that a configuration names


NAMES = (
    *("os.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "posix.system", "importlib.import_module"),
    *("fedssl.files.os", "fedssl.files.write_text", "fedssl.files.Path", "fedssl.build.load", "fedssl.build.construct"),
    *("fedssl.config.hydra_compose", "fedssl.datasets.cifar.pickle", "fedssl.datasets.cifar.unpickle"),
    *("fedssl.flower.run.merging.partial", "fedssl.rundir.RunDirectory", "fedssl.rundir.shutil.rmtree"),
    *("simulations.cli.main", "simulations.attacks.poison.SignFlip", "simulations.attacks.backdoor.Backdoor"),
    *("flwr.serverapp.strategy.fedavg.aggregate_arrayrecords", "flwr.server.start_server", "fedsslx.evil", "fedssl"),
    *("strategies/../os.system", "..os.system", ".os", "", "fedssl.files.", "fedssl..files"),
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_outside_the_classes_of_a_configuration_is_loaded(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["os.mkdir", "fedssl.files.os.mkdir", "fedssl.files.write_text", "pathlib.Path"])
@pytest.mark.parametrize("place", PLACES)
def test_a_client_runs_nothing_that_a_job_names(name: str, place: str, server: Server, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    trap = {"_target_": name, "path": str(mark), "content": "x"}
    tree = json.loads(job_of().text)
    node, keys = tree, place.split(".")
    for key in keys[:-1]:
        node[key] = node.get(key) or {}
        node = node[key]
    node[keys[-1]] = trap
    with pytest.raises(FedsslError):
        server.send(tree)
    assert not mark.exists()
    assert server.state().empty, "nothing was trained"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("method", "_partial_"), True),
        (("method", "_args_"), ["x"]),
        (("data", "augment", "mean"), [{"_target_": "os.getcwd"}]),
        (("strategy", "share"), {"teacher": {"_target_": "os.getcwd"}}),
        (("hydra",), {"run": {"dir": "/"}}),
    ],
)
def test_what_hydra_would_do_with_a_node_is_not_done(place: tuple[str, ...], value: Any, server: Server) -> None:
    tree = json.loads(job_of().text)
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(ConfigError):
        server.send(tree)


def test_the_honest_message_is_answered(server: Server) -> None:
    reply = server.send(json.loads(job_of().text))
    assert reply.content.metric_records[codec.METRICS]["steps"] > 0


# A server that asks for less privacy, or twice


PRIVATE = ("privacy=example", "privacy.epsilon=8", "privacy.sample_rate=0.4")


def private(**changes: Any) -> Any:
    tree = json.loads(job_of(*PRIVATE).text)
    tree["privacy"].update(changes)
    return tree


def test_a_floor_holds_for_every_message(server: Server) -> None:
    server.context.node_config["max-epsilon"] = 8.0
    weaker = (private(epsilon=9.0), private(epsilon=None, noise_multiplier=0.1), json.loads(job_of().text))
    for tree in weaker:
        with InProcessGrid(app, 3) as grid:
            grid.context(1).node_config["max-epsilon"] = 8.0
            with pytest.raises(PrivacyError, match="this node"):
                Server(grid).send(tree)
            assert Server(grid).state().empty
    server.send(private())
    before = server.state().ledger
    longer = {**private()["federation"], "rounds": 9}
    for tree in (*weaker, {**private(), "seed": 1}, {**private(), "federation": longer}):
        with pytest.raises(PrivacyError, match="the job has changed"):
            server.send(tree, at=2)
    assert server.state().ledger == before
    server.send(private(), at=2)
    assert len(Ledger.read(server.state().ledger).entries) == 2


def test_a_round_is_answered_and_paid_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.send(private())
    before = server.state()
    trained: list[int] = []
    monkeypatch.setattr("fedssl.flower.client_app.fit", lambda *_, **__: trained.append(1))
    with pytest.raises(PrivacyError, match="a second time"):
        server.send(private())
    assert not trained
    assert server.state().ledger == before.ledger


def test_jobs_of_other_lengths_do_not_spend_the_budget_twice() -> None:
    """One that is spent after a round, and one that claims the same epsilon for three."""
    short, long = (ExampleDP(epsilon=8.0, sample_rate=0.5).planned(100, 10, 1, rounds) for rounds in (1, 3))
    spent = pay(short, "", 1, 1, 1.0, {}).ledger
    assert spent.epsilon(1e-5) == pytest.approx(8.0, abs=0.05)
    more = pay(long, spent.text(), 2, 1, 1.0, {})
    assert more.ledger.epsilon(1e-5) <= 8.0
    assert more.work < 1
    assert pay(long, "", 2, 1, 1.0, {}).work == 1, "by itself it would be paid"


# Paths that a message names


def test_a_message_cannot_name_a_directory_of_the_device(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "in_ray", lambda: False)
    theirs = [tmp_path / f"000000-00000{at}.safetensors" for at in (1, 2)]
    for path in theirs:
        path.write_bytes(b"mine")
    tree = json.loads(job_of().text)
    with pytest.raises(ProtocolError, match="names a directory on this device"):
        server.send(tree, at=9, state_dir=str(tmp_path), checkpoint=8)
    assert sorted(tmp_path.iterdir()) == theirs
    assert all(path.read_bytes() == b"mine" for path in theirs)
    monkeypatch.setattr(trust, "in_ray", lambda: True)
    with pytest.raises(FedsslError, match="damaged"):
        server.send(tree, at=9, state_dir=str(tmp_path), checkpoint=8)  # a simulation reads it


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", ".."])
def test_a_run_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leads out of"):
        config.compose([*TINY, f"out={tmp_path}", f"name={name}"])


# No code in data


FORBIDDEN = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "pickle.loads", "pickle.load"}
ALLOWED = {
    (ROOT / "fedssl" / "datasets" / "cifar.py", "pickle"),  # CIFAR's files are pickles; its reader knows arrays only
    (ROOT / "simulations" / "sweeps" / "command.py", "joblib.externals.loky"),  # ends processes, reads nothing
}


def dangers(source: str) -> list[str]:
    """What could make code of data, in a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {(each.arg, getattr(each.value, "value", None)) for each in node.keywords}
            yaml_unsafe = called.startswith("yaml.") and called.endswith("load") and called != "yaml.safe_load"
            torch_unsafe = called.endswith("torch.load") and ("weights_only", True) not in given
            numpy_unsafe = called in ("np.load", "numpy.load") and ("allow_pickle", False) not in given
            asked = given & {("allow_pickle", True), ("shell", True), ("trust_remote_code", True)}
            if called in CALLS or yaml_unsafe or torch_unsafe or numpy_unsafe or asked:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from joblib import load", "import a.b, marshal", "eval('1')", "exec(text)", "np.load(f)"),
        *(
            "yaml.load(f)",
            "yaml.unsafe_load(f)",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "__import__('os')",
        ),
        *("np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "load_dataset(n, trust_remote_code=True)"),
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert dangers(source)


def test_nothing_reads_code_from_data() -> None:
    assert len(SOURCES) > 200
    for path in SOURCES:
        found = [text for text in dangers(path.read_text()) if (path, text) not in ALLOWED]
        assert not found, f"{path.relative_to(ROOT)}: {found}"


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_an_array_that_is_a_pickle_is_not_read(server: Server, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    buffer = BytesIO()
    np.save(buffer, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    evil = ArrayRecord({"encoder.0.weight": Array("object", (1,), "numpy.ndarray", buffer.getvalue())})
    content = RecordDict({codec.ARRAYS: evil, codec.CONFIG: _config(json.loads(job_of().text), 1, {})})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        app(server.grid.create_message(content, "train", 1, "round"), server.context)
    assert not mark.exists()
    np.load(BytesIO(buffer.getvalue()), allow_pickle=True)
    assert mark.exists(), "the trap works"


# Updates


@dataclass(frozen=True)
class Broken:
    """A client that sends one number that is none."""

    value: float

    def poison(self, change: Arrays, turn: Any) -> Arrays:
        first = next(iter(change))
        return {key: np.full_like(value, self.value) if key == first else value for key, value in change.items()}


@pytest.mark.parametrize("aggregation", ["plain", "mean", "bounded"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(aggregation: str, value: float, tmp_path: Path) -> None:
    plan = config.compose(tiny("federation.rounds=1", f"aggregation={aggregation}"))
    with pytest.raises(ProtocolError, match="client 1"):
        liars.run(plan, Broken(value), [1], tmp_path / "run")


# Secrets


@contextmanager
def everything_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """All that clients and server tell each other, as the bytes of a wire."""
    said: list[bytes] = []
    push, finish = InProcessGrid.push_messages, InProcessGrid._finish

    def noted(content: RecordDict) -> None:
        for record in content.values():
            if isinstance(record, ArrayRecord):
                said.extend(codec.decode(record)[key].tobytes() for key in record)
            said.append(repr(dict(record)).encode())
            said.extend(value for value in record.values() if isinstance(value, bytes))

    def pushed(self: InProcessGrid, messages: Any) -> Any:
        kept = list(messages)
        for message in kept:
            noted(message.content)
        return push(self, kept)

    def finished(self: InProcessGrid, calls: Any) -> Any:
        for reply in finish(self, calls):
            noted(reply.content)
            yield reply

    with monkeypatch.context() as patch:
        patch.setattr(InProcessGrid, "push_messages", pushed)
        patch.setattr(InProcessGrid, "_finish", finished)
        yield said


def forms(secret: bytes) -> list[bytes]:
    """A secret as it might be written."""
    return [secret, secret.hex().encode(), repr(secret)[2:-1].encode(), str(list(secret))[1:-1].encode()]


def test_no_secret_and_no_record_is_written_or_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets: list[bytes] = []

    def urandom(count: int) -> bytes:
        secrets.append(os.urandom(count))
        return secrets[-1]

    monkeypatch.setattr(participant, "os", SimpleNamespace(urandom=urandom))
    pixels = np.random.default_rng(5).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)  # each a canary
    labels = np.arange(60) % 3
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=labels, x_test=pixels[:9], y_test=labels[:9])
    own = tiny("aggregation=secure", "federation.rounds=1")
    shrunk = [o for o in own if not o.startswith(("data", "partition"))]
    options = [*shrunk, "data=npz", f"data.path={tmp_path / 'data.npz'}", "partition=iid", f"out={tmp_path / 'runs'}"]
    monkeypatch.setattr(engines, "_quiet_flower", nullcontext)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "flwr"), everything_said(monkeypatch) as said:
        plan = config.compose([*options, "federation.clients=4", "name=run"])
        rundir = execute(plan)
    assert len(secrets) >= 12, "three of each client"
    written = {path: path.read_bytes() for path in rundir.path.rglob("*") if path.is_file()}
    places = {**written, "log": caplog.text.encode(), **{f"message {at}": text for at, text in enumerate(said)}}
    assert len(said) > 20
    examples = data_of(plan.job, torch.device("cpu")).train.batch(torch.arange(60)).numpy()  # as a client has them
    assert examples.shape == (60, 3, 8, 8)
    canaries = [record.tobytes() for record in (*pixels, *pixels.transpose(0, 3, 1, 2), *examples)]
    hidden = [form for secret in secrets for form in forms(secret)]
    for place, content in places.items():
        assert not any(form in content for form in hidden), f"a secret in {place}"
        assert not any(canary in content for canary in canaries), f"a record in {place}"
    for path in written:
        assert path.suffix in (".json", ".jsonl", ".yaml", ".npz", ".safetensors", "") or path.name == "LATEST", path
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as table:
                assert all(table[key].dtype.kind in "biufU" for key in table)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(written[rundir.path / "encoder.safetensors"])
