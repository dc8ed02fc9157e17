"""`fedssl fits` measures a real turn, says yes or no, and names what would help."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import execute, tiny

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.flower.run import dry
from fedssl.flower.run.dry import KilledError, Turn
from simulations import cli, fits

Compose = Callable[..., Plan]
MIB = 1 << 20
TURN = Turn(7, 200, 10, 900 * MIB, 300 * MIB, 2.0, 5.0, 1000, 500, 1300, 800, False)


def test_a_turn_is_a_real_one(plan: Compose) -> None:
    """In a process of its own: its bytes and steps are those of a run's round."""
    run = plan("compression=float16", "local.epochs=2", "federation.rounds=1", "partition=iid")
    turn = dry.measure(run.job.tree)
    row = execute(run).rows("clients.jsonl")[0]
    assert (turn.client, turn.examples, turn.steps, turn.arrays_up) == (0, 20, 6, row["bytes_up"])
    assert turn.arrays_down > turn.arrays_up
    assert turn.wire_up > turn.arrays_up
    assert turn.memory >= turn.before > 50 * MIB, "torch alone takes as much"
    assert turn.step_seconds >= 0
    assert turn.seconds == turn.other_seconds + 6 * turn.step_seconds > 0


def test_a_private_turn_and_one_under_a_hidden_sum(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    private = ("method=byol", "method.norm=layer", "privacy=example", "privacy.sample_rate=1.0", "local.epochs=4")
    known = ("privacy.epsilon=null", "privacy.noise_multiplier=1.0", "federation.rounds=1")
    job = plan(*private, *known, "aggregation=secure").job
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([job.tree, ""])))
    monkeypatch.setattr(sys, "stdout", out)
    assert dry.main() == 0
    turn = Turn(**json.loads(out.getvalue()))
    assert turn.steps == 4


@pytest.mark.parametrize("compression", ["none", "float16", "int8", "topk_int8"])
def test_bytes_are_those_on_the_wire(compression: str, plan: Compose) -> None:
    """Of serialised messages: what a run logs, and headers of less than half a kilobyte an array."""
    run = plan(f"compression={compression}", "federation.rounds=1", "partition=iid", "encoder.width=16")
    turn, done = dry.take(run.job), execute(run)
    point = done.latest()
    assert point is not None
    assert turn.arrays_up == done.rows("clients.jsonl")[0]["bytes_up"]
    assert turn.arrays_down * 3 == done.rows()[0]["bytes_down"]
    buffers = sum("running" in key or "num_batches" in key for key in point.arrays)
    arrays = len(point.arrays) if compression == "none" else 4 + buffers
    assert 0 < turn.wire_up - turn.arrays_up < 512 * arrays + 1500
    assert 0 < turn.wire_down - turn.arrays_down < 512 * len(point.arrays) + 1500 + len(run.job.text)


def test_a_job_that_its_client_refuses_is_refused(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    job, out = plan("privacy.micro_batch=2", "encoder.norm=batch").job, io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([job.tree, ""])))
    monkeypatch.setattr(sys, "stdout", out)
    assert dry.main() == 0
    said = out.getvalue()
    ends = {"returncode": 0, "stdout": said, "stderr": ""}
    monkeypatch.setattr(subprocess, "run", lambda *a, **b: SimpleNamespace(**ends))
    with pytest.raises(ConfigError, match="whose batch normalisation needs them whole"):
        dry.measure(job.tree)
    for changes, kind in (
        ({"returncode": -9}, KilledError),
        ({"returncode": 1, "stdout": "", "stderr": "x\ntorch.OutOfMemoryError: CUDA out of memory."}, KilledError),
        ({"returncode": 1, "stdout": "", "stderr": "Traceback\nValueError: odd"}, ConfigError),
    ):
        done = SimpleNamespace(**(ends | changes))
        monkeypatch.setattr(subprocess, "run", lambda *a, done=done, **b: done)
        with pytest.raises(kind):
            dry.measure(job.tree)


def answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], turns: Mapping[str, Turn | None], *words: str
) -> tuple[int, str]:
    """Exit code and output, where jobs with these options take so much; None: their client is killed."""
    known = tiny("method=byol")

    def measure(tree: Mapping[str, Any], place: str) -> Turn:
        for option, turn in turns.items():
            group, _, key = option.partition(".")
            name, _, value = key.partition("=")
            if not option or str(tree[group][name]).lower() == value:
                if turn is None:
                    raise KilledError("killed")
                return turn
        raise AssertionError("no such job")

    monkeypatch.setattr(fits, "measure", measure)
    code = cli.answer(["fits", *words, *known])
    return code, capsys.readouterr().out


def test_yes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answered(monkeypatch, capsys, {"": TURN}, "--memory", "1GiB", "--seconds", "25")
    assert code == 0
    assert "memory   yes: 900 MiB of the process, 300 MiB before the first step, limit 1.00 GiB\n" in said
    assert "seconds  yes: 25 a round (10 steps of 2 s, 5 s besides), limit 25 s\n" in said
    assert "bytes    1,000 down and 500 up a round, 1,300 and 800 with headers\n" in said
    code, said = answered(monkeypatch, capsys, {"": TURN})
    assert (code, "memory   900 MiB of" in said, "yes" in said) == (0, True, False)


def test_no_for_want_of_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answered(monkeypatch, capsys, {"": TURN}, "--seconds", "12.5")
    assert code == 1
    assert "seconds  no: 25 a round" in said
    assert "time-budget=12.5 in the node's config stops it after 3 of 10 steps" in said
    assert "makes it" not in said


def test_no_and_what_would_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured in order, the first that suffices is named; what a machine cannot do is passed over."""
    small = replace(TURN, memory=700 * MIB)
    turns = {"local.checkpointing=true": None, "privacy.micro_batch=2": small, "": TURN}
    code, said = answered(monkeypatch, capsys, turns, "--memory", "800MiB")
    assert code == 1
    assert "memory   no: 900 MiB" in said
    assert said.endswith("\n         privacy.micro_batch=2 makes it 700 MiB and 25 s a round\n")
    code, said = answered(monkeypatch, capsys, turns, "--memory", "600MiB")
    assert code == 1
    assert re.search(
        r"no option makes it fit, of privacy.micro_batch=2 \(700 MiB\), .*; 300 MiB are taken before", said
    )
    code, said = answered(monkeypatch, capsys, {"local.checkpointing=true": small, "": None}, "--memory", "800MiB")
    assert (code, said) == (
        1,
        "memory   no: killed\n         local.checkpointing=true makes it 700 MiB and 25 s a round\n",
    )


def test_remedies_are_options_of_the_job(plan: Compose) -> None:
    words = [" ".join(options) for options in fits.remedies(plan("local.batch_size=8").job)]
    assert words == [
        "local.checkpointing=true",
        "privacy.micro_batch=2",
        "local.checkpointing=true privacy.micro_batch=2",
        "local.precision=bf16",
        "local.batch_size=4",
        "local.batch_size=2",
    ]
    private = config.compose(["method=byol", "method.norm=layer", "privacy=example", "privacy.micro_batch=16"]).job
    assert [o[0] for o in fits.remedies(private)][:2] == ["privacy.micro_batch=4", "local.precision=bf16"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--memory"], "--memory needs a value"),
        (["--memory", "4"], "got 4"),
        (["--memory", "0GiB"], "got 0GiB"),
        (["--seconds", "nan"], "--seconds needs a limit such as 60 and got nan"),
        (["--bytes", "3"], "--bytes is not an option of fits"),
        (["--data-dir"], "--data-dir needs a value"),
    ],
)
def test_wrong_words_are_refused(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.answer(["fits", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_node_measures_its_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("data=npz", "data.path=", "data.augment.mean=[0.5]", "data.augment.std=[0.25]", "evaluate.every=0")
    sites = ("partition=sites", "partition.shape=[1,8,8]", "device=cpu", "encoder.width=4", "local.batch_size=8")
    assert cli.answer(["fits", *own, *sites]) == 2
    assert "say whose with --data-dir PLACE" in capsys.readouterr().err
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train_images=images, test_images=images[:2])
    turn = dry.take(config.compose([*own, *sites]).job, str(tmp_path / "own.npz"))
    assert (turn.client, turn.examples, turn.steps) == (0, 30, 4)


def test_sizes() -> None:
    assert [fits.size_of(word) for word in ("4GiB", "1.5 MB", "7B")] == [4 << 30, 1_500_000, 7]
    assert (fits.size(5 << 29), fits.size(3 << 20)) == ("2.50 GiB", "3 MiB")
