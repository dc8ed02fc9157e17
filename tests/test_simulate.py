"""`fedssl.simulate`: what the command does, from Python, in a notebook's process as well."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same, execute, final_arrays
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import fedssl
from fedssl import config
from fedssl.errors import ConfigError, FedsslError
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory


def test_a_run_from_python_is_the_run_of_the_command(tmp_path: Path) -> None:
    options = [*TINY, "evaluate.final=true", "evaluate.repeats=1"]
    run = fedssl.simulate(*options, f"out={tmp_path}", "name=python", quiet=True)
    assert run.path == (tmp_path / "python").resolve()
    assert run.done
    assert [row["round"] for row in run.rows] == [1, 2]
    assert 0 <= run.summary["linear_accuracy"] <= 1
    assert run.encoder()(torch.rand(2, 3, 8, 8)).shape == (2, 8)
    assert "2 rounds, linear 0." in repr(run)
    assert (run.path / "report.html").exists()
    other = execute(config.compose([*options, f"out={tmp_path}", "name=command"]))
    assert_same(final_arrays(RunDirectory(run.path)), final_arrays(other))


def test_a_run_that_is_done_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, f"out={tmp_path}", "name=twice"]
    first = fedssl.simulate(*options, quiet=True)
    assert capsys.readouterr() == ("", "")
    second = fedssl.simulate(*options)
    assert "already finished" in capsys.readouterr().err
    assert second.summary == first.summary


def test_what_is_global_stays_as_it_was(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fedssl.simulate(*TINY, f"out={tmp_path}", quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


def test_a_hydra_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config.compose(["seed=3"])
        with pytest.raises(ConfigError):
            config.compose(["sed=3"])
        assert compose("mine").x == 1
    assert not GlobalHydra.instance().is_initialized()


def test_a_wrong_option_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FedsslError, match="did you mean method.temperature"):
        fedssl.simulate("method.tmperature=1", f"out={tmp_path}")
    with pytest.raises(ConfigError, match="seed=0,1 holds several values where a run takes one"):
        fedssl.simulate("seed=0,1")
    with pytest.raises(ConfigError, match="give each as a string of its own"):
        fedssl.simulate(["method=byol"])  # type: ignore[arg-type]
    fedssl.simulate(*TINY, f"out={tmp_path}", "name=x", quiet=True)
    with pytest.raises(ConfigError, match="pass another name="):
        fedssl.simulate(*TINY, f"out={tmp_path}", "name=x", "seed=1", quiet=True)


def test_a_run_that_is_refused_before_its_first_round_leaves_its_name_free(tmp_path: Path) -> None:
    here = (*TINY, f"out={tmp_path}", "name=x", "track=tensorboard")
    with pytest.raises(ConfigError, match="is no teacher of it in this method"):
        fedssl.simulate(*here, "strategy=fedbyol_target_both", quiet=True)
    assert not (tmp_path / "x").exists()
    run = fedssl.simulate(*here, quiet=True)
    assert run.path == tmp_path / "x"


def test_a_refused_run_in_a_linked_folder_says_why(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is no teacher of it in this method"):
        fedssl.simulate(*TINY, f"out={tmp_path}", "name=x", "strategy=fedbyol_target_both", quiet=True)


def test_a_run_that_is_refused_later_keeps_what_it_has(tmp_path: Path) -> None:
    here = (*TINY, f"out={tmp_path}", "name=x")
    with pytest.raises(FedsslError, match="federation.max_change"):
        fedssl.simulate(*here, "federation.max_change=0.000001", quiet=True)
    assert RunDirectory(tmp_path / "x").config()["federation"]["max_change"] == 1e-6
    with RunDirectory(tmp_path / "x").lock():  # that of another process, which is at work there
        run = RunDirectory(tmp_path / "x")
        run.new = True
        with pytest.raises(ConfigError, match="another process"), run.or_nothing(), run.lock():
            pass
    assert run.config()


def test_the_package_imports_nothing_until_asked() -> None:
    code = "import fedssl, sys; print('torch' in sys.modules); fedssl.simulate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_notebook_gets_one_line_that_is_drawn_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    reporter = Reporter()
    reporter.begin("mine", 0, 2)
    reporter.round(1, {"loss": 1.23456})
    reporter.say("an alarm")
    reporter.round(2, {})
    reporter.end()
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.split("\n")
    assert lines[0] == "mine: 2 of 2 rounds to go"
    assert lines[1].startswith("\rround 1/2  loss 1.2346")
    assert lines[2] == "an alarm"
    assert lines[3].startswith("\rround 2/2")
    assert lines[4:] == [""]
