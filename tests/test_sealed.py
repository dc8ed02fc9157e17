"""What a client keeps can be encrypted at rest: only its key opens it, and nothing changes unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same
from flwr.app import ConfigRecord, Context, RecordDict

from fedssl import files
from fedssl.edge import sealed
from fedssl.errors import ConfigError, FedsslError, ResumeError
from fedssl.flower import state_files
from fedssl.flower.codec import ClientState
from fedssl.flower.deploy import memory

KEY, OTHER = bytes(range(32)), bytes(32)
SECRET = "the ledger of a client"
STATE = ClientState(
    local={"queue.x": np.arange(6, dtype=np.float32).reshape(2, 3), "bank.n": np.array(3)},
    mine={"encoder.w": np.ones((2, 2), np.float16)},
    memo={"a": 1.5},
    round=4,
    residual={"encoder.w": np.zeros(3, np.float32)},
    ledger=SECRET,
    own="mine",
)


def assert_equal(a: ClientState, b: ClientState) -> None:
    for name in ("local", "mine", "residual"):
        assert_same(getattr(a, name), getattr(b, name))
    assert (a.memo, a.round, a.ledger, a.own) == (b.memo, b.round, b.ledger, b.own)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_state_comes_back(key: bytes | None, tmp_path: Path) -> None:
    path = state_files.write(tmp_path, 7, STATE, key)
    assert path.name == "000007-000004.safetensors"
    assert (SECRET.encode() in path.read_bytes()) == (key is None)
    assert_equal(state_files.read(path, key), STATE)


def test_equal_states_are_never_equal_files(tmp_path: Path) -> None:
    once, twice = (state_files.write(tmp_path / str(i), 7, STATE, KEY).read_bytes() for i in range(2))
    assert once != twice
    assert len(once) == len(twice)


def test_what_was_not_written_so_is_refused(tmp_path: Path) -> None:
    path = state_files.write(tmp_path, 7, STATE, KEY)
    content = path.read_bytes()

    def refused(sentence: str, key: bytes | None = KEY, at: Path = path) -> None:
        with pytest.raises(ResumeError, match=re.escape(sentence)):
            state_files.read(at, key)

    refused("cannot be opened with this node's state-key", OTHER)
    refused("is encrypted and this node has no state-key", None)
    for i in (14, 26, len(content) // 2, len(content) - 1):  # of the nonce, the first byte, the middle, the tag
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        refused("or has been changed")
    path.write_bytes(content[:20])
    refused("or has been changed")
    path.write_bytes(content[:13] + b"\x02" + content[14:])
    refused("a later version")
    renamed = tmp_path / "000007-000009.safetensors"  # an old ledger as a new one
    renamed.write_bytes(content)
    refused("or has been changed", at=renamed)
    plain = state_files.write(tmp_path, 7, STATE)
    refused("is not encrypted and this node has a state-key", at=plain)
    plain.unlink()
    refused("cannot be read (No such file or directory)", at=plain)


def test_files_of_a_later_version_are_refused_and_of_an_earlier_read(tmp_path: Path) -> None:
    path = state_files.write(tmp_path, 7, STATE)
    arrays, meta = files.read_arrays(path)
    assert meta["format"] == "1"
    files.write_arrays(path, arrays, {key: value for key, value in meta.items() if key != "format"})
    assert_equal(state_files.read(path), STATE)  # as they were before there was a number
    files.write_arrays(path, arrays, meta | {"format": "2"})
    with pytest.raises(ResumeError, match="a later version of fedssl"):
        state_files.read(path)


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.key"

    def refused(sentence: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            sealed.key_in(path)

    refused("cannot be read (No such file or directory): make one with `umask 077; head -c 32 /dev/urandom")
    path.write_bytes(KEY)
    path.chmod(0o640)
    refused("has mode 0640, so others may read it: chmod 600")
    path.chmod(0o600)
    assert sealed.key_in(path) == KEY
    for wrong in (KEY[:-1], KEY + b"\n"):
        path.write_bytes(wrong)
        refused("is not 32 bytes long")


def test_a_node_keeps_its_state_under_its_key(tmp_path: Path) -> None:
    path = tmp_path / "state.key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    config = ConfigRecord({"state-dir": str(tmp_path / "states"), "checkpoint": 0})

    def context(**words: str) -> Context:
        node = {"partition-id": 7, **words}
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})

    node = context(**{"state-key": str(path)})
    STATE.save(node)
    memory.keep(config, node, 7)
    (file,) = (tmp_path / "states").iterdir()
    assert SECRET.encode() not in file.read_bytes()
    again = context(**{"state-key": str(path)})
    memory.restore(config, again, 7, 5)
    assert_equal(ClientState.load(again), STATE)
    with pytest.raises(FedsslError, match="no state-key"):
        memory.restore(config, context(), 7, 5)
    path.chmod(0o644)
    with pytest.raises(FedsslError, match="the state-key FILE has mode 0644"):
        memory.restore(config, again, 7, 5)
