"""Files are whole or absent, and a run directory can be opened, refused, resumed and cut back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedssl.errors import ConfigError, FedsslError, ResumeError
from fedssl.files import finite, read_arrays, write_arrays, write_bytes, write_json, write_text
from fedssl.job.provenance import git_commit, split_table
from fedssl.parts import Arrays
from fedssl.rundir import Checkpoint, RunDirectory

CONFIG: dict[str, Any] = {
    "seed": 0,
    "local": {"lr": 0.002, "precision": "float32", "clip_norm": None},
    "strategy": {"_target_": "x", "share": {}},
    "data": {"channels": (1, 2)},
    "engine": {"workers": 2},
    "name": "run",
    "out": "runs",
}
ARRAYS: Arrays = {
    "zero": np.array(2.5, np.float32),
    "empty": np.zeros((3, 0, 2)),
    "mask": np.array([True, False]),
    "count": np.array([2**62, -1]),
    "half": np.array([0.1], np.float16),
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "stepped": np.arange(12, dtype=np.int16)[::-3],
}


def sentence(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_bytes(path, b"old")
    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:

            def full(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, call, full)
            with pytest.raises(ConfigError, match="No space left on device.*free space") as caught:
                write_bytes(path, b"new")
        assert str(path) in sentence(caught)
        assert path.read_bytes() == b"old"
        assert names(path.parent) == ["file"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("place", ["file/x.json", "file/deep/x.json", "folder", "a" * 300, "b" * 300 + "/x.json"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_bytes(tmp_path / place, b"content")
    sentence(caught)
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        write_text(tmp_path / "x", "content")


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_arrays(path, ARRAYS, {"a": "ü"})
    arrays, meta = read_arrays(path)
    assert_same({k: arrays[k] for k in ARRAYS}, ARRAYS)
    assert {k: v.shape for k, v in arrays.items()} == {k: v.shape for k, v in ARRAYS.items()}
    assert meta == {"a": "ü"}
    write_arrays(path, {})
    assert read_arrays(path) == ({}, {})


@settings(max_examples=25, deadline=None)
@given(cut=st.floats(0, 0.999), position=st.floats(0, 0.999), value=st.integers(0, 255))
def test_a_damaged_file_is_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, cut: float, position: float, value: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    write_arrays(path, {"x": np.ones(4, np.float32)}, {"k": "v"})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ResumeError, match="damaged or missing") as caught:
        read_arrays(path)
    sentence(caught)
    header = bytearray(whole)
    header[int(position * (len(whole) - 16))] = value
    path.write_bytes(bytes(header))
    try:
        read_arrays(path)  # a changed letter may still be a file
    except ResumeError as error:
        assert "damaged" in str(error)  # noqa: PT017


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "none"):
        with pytest.raises(ResumeError, match="damaged or missing"):
            read_arrays(path)


def test_numbers_that_json_cannot_hold() -> None:
    row = {
        "a": math.nan,
        "b": [1.5, math.inf, (np.float32(-np.inf), "x")],
        "c": {"d": np.float32(0.5)},
        "e": True,
        "f": 3,
    }
    assert finite(row) == {"a": None, "b": [1.5, None, [None, "x"]], "c": {"d": 0.5}, "e": True, "f": 3}
    numpy = finite({"n": np.int64(3), "flag": np.bool_(True), "row": np.array([1.0, math.nan])})
    assert json.loads(json.dumps(numpy)) == {"n": 3, "flag": True, "row": [1.0, None]}


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": math.nan, "n": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ü": None, "n": [1]}
    assert "ü" in text
    assert text.endswith("}\n")


def test_open_is_new_once_and_the_same_after(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "a" / "run", CONFIG)
    before = run.path.joinpath("config.yaml").read_bytes()
    assert (run.begun, run.done) == (True, False)
    RunDirectory.open(run.path, CONFIG | {"engine": {"workers": 9}, "name": "other", "out": "there"})
    assert run.path.joinpath("config.yaml").read_bytes() == before
    assert run.config()["data"] == {"channels": [1, 2]}
    assert RunDirectory.open(run.path, run.config()).path == run.path
    (tmp_path / "empty").mkdir()
    assert RunDirectory.open(tmp_path / "empty", CONFIG).begun


@settings(max_examples=25, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:_*1", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
@example("a\x85b")
def test_any_configuration_is_itself_when_opened_again(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("run") / "x"
    RunDirectory.open(path, {"value": value})
    RunDirectory.open(path, {"value": value})


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, CONFIG)
    changed = CONFIG | {"seed": 1, "local": {"lr": 0.1, "precision": "bf16", "epochs": 2}, "new": 3}
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(tmp_path, changed)
    text = sentence(caught)
    assert "local.epochs: None there, 2 here" in text
    assert "local.lr: 0.002 there, 0.1 here" in text
    assert "and 2 more" in text
    with pytest.raises(ConfigError, match=r"seed: 0 there, 5 here\)"):
        RunDirectory.open(tmp_path, CONFIG | {"seed": 5})


def test_a_place_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files and no config\.yaml"):
        RunDirectory.open(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.open(tmp_path / "notes.txt", CONFIG)
    with pytest.raises(FedsslError):
        RunDirectory.open(tmp_path / "notes.txt" / "run", CONFIG)
    with pytest.raises(FedsslError):
        RunDirectory.open(tmp_path / ("x" * 300), CONFIG)
    with pytest.raises(ResumeError, match="is not a run directory"):
        RunDirectory(tmp_path).config()
    assert names(tmp_path) == ["notes.txt"]


def test_a_run_killed_before_its_first_file_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.4711.tmp").write_text("see")
    assert RunDirectory.open(tmp_path, CONFIG).begun


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [", b"\xff\xfe\x00", b"a: &x *y\n"])
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ResumeError, match=r"config\.yaml is damaged"):
        RunDirectory.open(tmp_path, CONFIG)


def test_logs_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)
    assert run.rows() == []
    run.log({"round": 1, "loss": math.nan, "words": "ü\u2028"}, [{"round": 1, "client": c} for c in range(2)])
    run.log({"round": 2, "loss": 0.5}, [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    assert run.rows() == [{"round": 1, "loss": None, "words": "ü\u2028"}, {"round": 2, "loss": 0.5}]
    assert [row["client"] for row in run.rows("clients.jsonl")] == [0, 1]


def point(at: int) -> Checkpoint:
    momentum = {f"m/{k}": np.full(2, at, np.float32) for k in "ab"}
    return Checkpoint(at, {"encoder.w": np.full((2, 2), at, np.float32)}, (momentum, {"eta": 0.1, "step": at}))


def trained(path: Path, rounds: int, every: int = 1) -> RunDirectory:
    run = RunDirectory.open(path, CONFIG)
    for at in range(1, rounds + 1):
        run.log({"round": at}, [{"round": at, "client": c} for c in range(2)])
        if at % every == 0:
            run.checkpoint(point(at))
    return run


def test_a_checkpoint_is_read_back_and_replaces_the_one_before(tmp_path: Path) -> None:
    run = trained(tmp_path, 3)
    run.clients.mkdir()
    last = run.latest()
    assert last is not None
    assert last.round == 3
    assert_same(last.arrays, point(3).arrays)
    assert_same(last.strategy[0], point(3).strategy[0])
    assert last.strategy[1] == {"eta": 0.1, "step": 3}
    assert names(tmp_path / "checkpoints") == ["000003", "LATEST", "clients"]


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = trained(tmp_path, 5, every=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6')
    last = run.latest()
    assert last is not None
    assert last.round == 4
    assert [row["round"] for row in run.rows()] == [1, 2, 3, 4]
    assert [row["round"] for row in run.rows("clients.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]
    run.log({"round": 5}, [])
    assert len(run.rows()) == 5
    young = trained(tmp_path / "young", 1, every=2)
    assert young.latest() is None
    assert young.rows() == []


def test_latest_decides_which_checkpoint_counts(tmp_path: Path) -> None:
    run = trained(tmp_path, 2)
    write_arrays(tmp_path / "checkpoints" / "000003" / "server.safetensors", point(3).arrays)
    last = run.latest()
    assert last is not None
    assert last.round == 2
    run.checkpoint(point(3))
    assert names(tmp_path / "checkpoints") == ["000003", "LATEST"]


@pytest.mark.parametrize("file", ["000002/server.safetensors", "000002/strategy.safetensors", "LATEST"])
@pytest.mark.parametrize("content", [b"", b"nonsense\xff", None])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, file: str, content: bytes | None) -> None:
    run = trained(tmp_path, 2)
    path = tmp_path / "checkpoints" / file
    if content is None:
        write_arrays(path, {})  # whole, but not what belongs there
        if file.endswith("server.safetensors"):
            path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ResumeError, match="damaged") as caught:
        run.latest()
    sentence(caught)
    assert len(run.rows()) == 2, "nothing is lost by looking"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)
    other = RunDirectory.open(tmp_path, CONFIG)
    with run.lock():
        with pytest.raises(ConfigError, match="being written by another process") as caught, other.lock():
            pass
        sentence(caught)
    with other.lock(), pytest.raises(ConfigError), run.lock():
        pass
    with pytest.raises(ValueError), run.lock():
        raise ValueError
    with other.lock():
        pass


def test_json_files_of_a_run(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)
    with pytest.raises(ResumeError, match=r"no summary\.json: the run has not ended"):
        run.read("summary.json")
    run.write("summary.json", {"loss": math.inf})
    assert run.read("summary.json") == {"loss": None}
    assert run.done
    for content in (b'{"loss"', b"[1, 2]", b"\xff"):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(ResumeError, match="damaged"):
            run.read("summary.json")


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    commit = "0123456789abcdef" * 2 + "01234567"
    (git / "HEAD").write_text(commit + "\n")
    assert git_commit(tmp_path) == commit
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(tmp_path) is None, "a checkout before its first commit"
    (git / "packed-refs").write_text(
        f"# pack-refs with: peeled\n{commit[::-1]} refs/heads/other\n{commit} refs/heads/main\n"
    )
    assert git_commit(tmp_path) == commit
    (git / "refs" / "heads" / "main").write_text(commit[::-1] + "\n")
    assert git_commit(tmp_path) == commit[::-1], "a loose ref is newer than a packed one"


def test_the_split_as_a_table() -> None:
    parts = [np.array([0, 2, 3]), np.array([1]), np.array([], np.int64)]
    targets = np.array([0, 2, 0, 1])
    assert split_table(parts, targets, ("a", "b", "c")) == {
        "sizes": [3, 1, 0],
        "classes": ["a", "b", "c"],
        "counts": [[2, 1, 0], [0, 0, 1], [0, 0, 0]],
    }
    assert split_table(parts, None, ()) == {"sizes": [3, 1, 0]}
    json.dumps(split_table(parts, targets, ("a", "b", "c")))
