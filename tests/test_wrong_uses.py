"""Wrong uses that people come to, each with the one sentence that answers it: what was found, and what to do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from fedssl import config
from simulations import cli

QUICK = (*TINY, "federation.rounds=1")


def answer(*words: str) -> tuple[int, list[str]]:
    """Exit code and lines of complaint of a command, run in this process as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.answer(words)
    return code, [line for line in err.getvalue().splitlines() if line.strip()]


def refused(*words: str) -> str:
    """The one sentence by which a command is refused."""
    code, lines = answer(*words)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert answer("pretrain", *QUICK, f"out={out}", "name=tiny")[0] == 0
    return out / "tiny"


WORDS = {
    "pretrian": "not a command: use pretrain",
    "pretrain method.tmperature=1": "did you mean method.temperature",
    "pretrain experimnt=demo": "did you mean experiment?",
    "pretrain rounds=3": "did you mean federation.rounds",
    "pretrain method=simclrr": "did you mean method=simclr",
    "pretrain method=unheard_of": "choose one of",
    "pretrain local.lr=fast": "give a number",
    "pretrain federation.rounds=2.5": "federation.rounds",
    "pretrain federation.rounds=0": "federation.rounds",
    "pretrain byol": "write them as key=value",
    "pretrain --rounds 3": "--rounds is not an option of pretrain: options are written key=value, such as rounds=3",
    "pretrain -v": "-v is not an option",
    "pretrain method=": "method= does not exist: choose one of",
    "pretrain partition.alpha=[0.1": "write them as key=value",
    "pretrain name=../elsewhere": "leads out of",
    "pretrain device=cuda:9": "device=auto",
    "pretrain device=tpu": "use auto, cpu, cuda or cuda:1",
    "pretrain data=npz": "data.path is missing",
    "pretrain data=npz data.path=/nowhere/file.npz": "no file /nowhere/file.npz",
    "pretrain data=folder data.root=/nowhere": "/nowhere",
    "pretrain data=cifar10 data.root=/nowhere": "/nowhere",
    "pretrain partition=natural": "natural",
    "pretrain federation.clients=100000": "use at most 629 clients",
    "pretrain partition.min_size=0": "a client without examples cannot train",
    "pretrain partition.alpha=-1": "alpha",
    "pretrain strategy.share.encoder=local strategy.share.projector=local": "nothing would be federated",
    "pretrain privacy=example_dp": "privacy",
    "pretrain privacy=client_dp": "client_dp",
    "pretrain start=/nowhere/model.pth": "/nowhere/model.pth",
    "resume": "exactly one",
    "resume /nowhere": "not a run directory",
    "report": "needs a run directory",
    "report /nowhere": "not a run directory",
    "probe /nowhere": "not a run directory",
    "audit /nowhere": "not a run directory",
    "export /nowhere": "/nowhere",
    "export": "exactly one run directory",
    "study": "study needs one of",
    "study colapse": "'colapse' was given",
    "study teacher study.sedes=2": "study.sedes",
    "payload method=byoll": "did you mean method=byol",
    "fits --memory much": "--memory needs a limit such as",
    "keys": "exactly one new folder",
    "submit": "--out",
    "list nonsense": "not a group",
    "doctor --now": "no options",
}


@pytest.mark.parametrize("words", WORDS)
def test_words(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert WORDS[words] in refused(*words.split())
    assert [p for p in tmp_path.rglob("*") if p.name in ("summary.json", "metrics.jsonl")] == []


def test_an_empty_value_is_none(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("fits", "--memory", ""),
        ("export", str(finished), "--out", ""),
        ("report", str(finished), "--out", ""),
    ):
        assert f"{words[-2]} needs a value" in refused(*words)
    assert list(tmp_path.iterdir()) == []


def _images(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


FILES: dict[str, tuple[Callable[[Path], str], str]] = {
    "text": (lambda folder: str((folder / "x.npz").write_text("no") and folder / "x.npz"), "cannot be read as a .npz"),
    "no images": (lambda folder: _images(folder / "x.npz", weights=np.ones(3)), "name the images train_images"),
    "labels of another length": (
        lambda folder: _images(folder / "x.npz", images=np.zeros((8, 4, 4), np.uint8), labels=np.zeros(7, np.int64)),
        "7",
    ),
    "images of five dimensions": (
        lambda folder: _images(folder / "x.npz", images=np.zeros((8, 2, 3, 4, 4), np.uint8)),
        "images in",
    ),
    "objects": (
        lambda folder: _images(folder / "x.npz", images=np.array([None, 1], dtype=object)),
        "without pickle",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(kind: str, tmp_path: Path) -> None:
    make, sentence = FILES[kind]
    path = make(tmp_path)
    words = ("pretrain", "data=npz", f"data.path={path}", f"out={tmp_path}/runs", "federation.rounds=1")
    assert sentence in refused(*words)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert str(tmp_path) in refused("pretrain", "data=folder", f"data.root={tmp_path}", f"out={tmp_path}/runs")


def test_an_old_run_directory(finished: Path, tmp_path: Path) -> None:
    again = (*QUICK, f"out={finished.parent}", "name=tiny")
    assert "another configuration (local.lr" in refused("pretrain", *again, "local.lr=0.1")
    older = tmp_path / "older"
    shutil.copytree(finished, older)
    (older / "summary.json").unlink()
    text = (older / "config.yaml").read_text()
    (older / "config.yaml").write_text(text.replace("batch_size:", "batchsize:"))
    assert "batchsize" in refused("resume", str(older))
    (older / "config.yaml").write_text(text.replace("engine:", "motor:"))
    assert "not written by this version of fedssl" in refused("resume", str(older))
    (older / "config.yaml").write_text("a: [")
    assert "is damaged" in refused("report", str(older))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("")
    assert "holds other files" in refused("pretrain", *QUICK, f"out={tmp_path}", "name=notes")
    assert {path.name for path in (tmp_path / "notes").iterdir()} == {"letter.txt"}


def test_a_run_that_has_not_begun_or_ended(finished: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(finished / "config.yaml", part)
    assert "no finished round" in refused("report", str(part))
    for command in ("probe", "export", "audit"):
        assert str(part) in refused(command, str(part))


def test_a_run_that_another_process_writes(finished: Path, tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    shutil.copytree(finished, busy)
    (busy / "summary.json").unlink()
    with (busy / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another process" in refused("resume", str(busy))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, lines = answer("pretrain", *QUICK, f"out={tmp_path}", "name=x")
    assert code == 2
    assert "No space left on device" in lines[-1]
    assert "free space" in lines[-1]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "pass another" in refused("pretrain", *QUICK, f"out={tmp_path}/file", "name=x")


MISSING = {
    "ray": (("pretrain", *[o for o in QUICK if not o.startswith("engine")], "engine=ray"), "pip install 'fedssl[ray]'"),
    "datasets": (("pretrain", "data=hub", "data.name=someone/something"), "pip install 'fedssl[hub]'"),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, sentence = MISSING[module]
    monkeypatch.setitem(sys.modules, module, None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))
    code, lines = answer(*words, f"out={tmp_path}", "name=x")
    assert code == 2
    assert sentence in lines[-1]


def test_a_missing_exporter(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = ("export", str(finished), "--format", "onnx", "--out", str(tmp_path / "x"))
    assert "pip install 'fedssl[onnx]'" in refused(*words)
    assert not (tmp_path / "x").exists()
    assert "use safetensors or onnx" in refused("export", str(finished), "--format", "tflite")


def test_an_interrupted_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(config, "__file__", str(tmp_path / "fedssl" / "config.py"))
        assert "the installation is not complete" in refused("list")
    script = (
        "import sys; sys.modules['opacus'] = None; sys.modules['dp_accounting'] = None; sys.modules['hydra'] = None\n"
    )
    script += "from simulations.cli import main; sys.argv = ['fedssl', 'pretrain']; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "hydra cannot be imported" in done.stderr
    assert "install fedssl again" in done.stderr


def test_a_tree_that_was_never_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("fedssl.job.provenance.version", absent)
    code, lines = answer("pretrain", *QUICK, f"out={tmp_path}", "name=x")
    assert code == 2
    assert "fedssl is not installed" in lines[-1]
    assert "pip install" in lines[-1]


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    elsewhere = [option for option in QUICK if not option.startswith("device")]
    said = refused("pretrain", *elsewhere, "device=cuda", f"out={tmp_path}")
    assert "this machine has 0 GPUs for torch; use device=auto" in said


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    wild = ("local.optimizer=sgd", "local.lr=1e30", "method=byol", "method.norm=none", "encoder.norm=none")
    code, lines = answer("pretrain", *TINY, *wild, f"out={tmp_path}", "name=x")
    assert code == 2
    assert "lower local.lr" in lines[-1]
    assert "Traceback" not in " ".join(lines)
    assert (tmp_path / "x" / "config.yaml").exists()
