"""Splits from files: a run's own comes back with the same fingerprint, and what is no partition is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import partition
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.partition import Stored, read_split, write_split


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 200), clients=st.integers(1, 12), kind=st.sampled_from(["npz", "json"]), seed=st.integers(0, 3))
def test_what_is_written_comes_back(
    n: int, clients: int, kind: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = partition.quantity_skew(max(n, clients), clients, rng(seed), alpha=0.3, min_size=1)
    path = tmp_path_factory.mktemp("split") / f"split.{kind}"
    write_split(path, parts)
    back = read_split(str(path), max(n, clients), clients)
    assert partition.fingerprint(back) == partition.fingerprint(parts)
    assert all(rows.dtype == np.int64 for rows in back)
    written = path.read_bytes()
    write_split(path, back)
    assert path.read_bytes() == written


def test_index_lists_of_others_are_read_in_their_order(tmp_path: Path) -> None:
    lists = {f"client_{client}": np.array([client + 11, client], np.int32) for client in range(11)}
    np.savez(tmp_path / "lists.npz", **dict(sorted(lists.items())))  # client_10 before client_2
    parts = read_split(str(tmp_path / "lists.npz"), 22, 11)
    assert [part.tolist() for part in parts] == [[client, client + 11] for client in range(11)]
    (tmp_path / "lists.json").write_text("[[2, 0], [1]]")
    assert [part.tolist() for part in read_split(str(tmp_path / "lists.json"), 3, 2)] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([[0, 1], [2]], "2 clients but the job has 3"),
        ([[0], [1], [2, 4]], "names example 4 but the training set has 4"),
        ([[0], [1], [2, -1]], "names example -1"),
        ([[0], [1, 3], [2, 3]], r"gives example 3 out 2 times \(client 1, 2\)"),
        ([[0], [1, 1], [2, 3]], r"gives example 1 out 2 times \(client 1\)"),
        ([[0], [1], [2]], "leaves out 1 of 4 examples, the first is 3"),
        ([[0, 1, 2, 3], [], []], "Client 1 of .* has no example"),
        ([[0], [1.5], [2, 3]], "whole numbers"),
        ([[0], ["1"], [2, 3]], "whole numbers"),
        ([[0], [[1]], [2, 3]], "whole numbers"),
        ([[0], [[1], 4], [2, 3]], "is not a split"),
        ([0, 1], "no list of lists"),
        ({"a": [0]}, "no list of lists"),
        ("nonsense", "no list of lists"),
        (None, "is not a split"),
    ],
)
def test_what_is_no_partition_gets_one_sentence(content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text("{" if content is None else json.dumps(content))
    with pytest.raises(ConfigError, match=words) as caught:
        read_split(str(file), 4, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"owner": np.array([0, 1, -1])}, "from 0 on"),
        ({"owner": np.array([0.0, 1.0, 2.0])}, "whole numbers"),
        ({"owner": np.array([0, 2, 2])}, "Client 1 of .* has no example"),
        ({"owner": np.array([0, 1, 2, 0])}, "names example 3"),
        ({"rows": np.array([0])}, "it holds rows"),
        ({"client_0": np.array([0, 1, 2])}, "1 clients but the job has 3"),
    ],
)
def test_arrays_that_are_no_split_are_refused(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "split.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        read_split(str(tmp_path / "split.npz"), 3, 3)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no file"):
        read_split(str(tmp_path), 3, 3)
    for content in (b"text", b"PK\x03\x04broken"):
        (tmp_path / "split.npz").write_bytes(content)
        with pytest.raises(ConfigError, match="is not a split"):
            read_split(str(tmp_path), 3, 3)
    np.save(tmp_path / "split.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="npy file"):
        read_split(str(tmp_path / "split.npy"), 3, 3)


def test_the_split_of_a_run_is_that_of_the_next(plan: Callable[..., Plan], tmp_path: Path) -> None:
    first = execute(plan("partition=dirichlet", "partition.alpha=0.3", "seed=4"))
    told = first.read("manifest.json")["split"]
    second = execute(plan("partition=file", f"partition.path={first.path}", "seed=4", name="second"))
    assert second.read("manifest.json")["split"] == told
    assert_same(final_arrays(first), final_arrays(second))
    third = plan("partition=file", f"partition.path={first.path}", "partition.fingerprint=0123", name="third")
    with pytest.raises(ConfigError, match="has the fingerprint"):
        execute(third)
    assert Stored(str(first.path), told["fingerprint"]).split(range(60), 3, rng())  # type: ignore[arg-type]
