"""What clients keep between rounds is the same in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from flwr.app import ConfigRecord, Context, RecordDict
from test_laws import BUFFERED, interrupted, metrics

from fedssl import tree
from fedssl.config import Plan
from fedssl.flower import state_files
from fedssl.flower.codec import ClientState
from fedssl.flower.run.states import States
from fedssl.parts import Arrays

Compose = Callable[..., Plan]


def context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def trained(states: States, node: int, at: int, size: int = 1000) -> None:
    """A client's turn in which it saves `size` float64."""
    ClientState(local={"queue.x": np.full(size, float(at))}, memo={"a": 1.5}, round=at, ledger="l").save(
        states.lend(node)
    )
    states.back(node)


def test_what_is_unused_for_longest_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    states = States(context, limit=2 * 10_100, folder=tmp_path / "states")
    for node in (1, 2, 3):
        trained(states, node, at=1)
    assert list(states.live) == [2, 3]
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000000-000001.safetensors"]
    assert states.nodes() == [1, 2, 3]
    assert states.state(1).local["queue.x"].tolist() == [1.0] * 1000
    assert list(states.live) == [2, 3]  # looking at it has not brought it back
    lent = states.lend(1)
    assert ClientState.load(lent).memo == {"a": 1.5}
    assert list(states.live) == [2, 3, 1]  # one that runs does not count, and is not put away
    assert not list((tmp_path / "states").iterdir())
    states.back(1)
    assert list(states.live) == [3, 1]
    states.clear()
    assert not (tmp_path / "states").exists()


def test_a_checkpoint_takes_what_is_on_disk_as_it_is(tmp_path: Path) -> None:
    states = States(context, limit=0, folder=tmp_path / "states")
    trained(states, 5, at=3)
    ClientState(round=3).save(states.lend(6))  # it has trained, and nothing would be lost with it
    states.back(6)
    assert not states.live
    states.keep(5, tmp_path / "kept")
    states.keep(6, tmp_path / "kept")
    states.keep(7, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["000004-000003.safetensors"]
    assert ClientState.load(states.get(6)).round == 3
    states.get(5)
    assert (tmp_path / "kept" / "000004-000003.safetensors").exists()  # the checkpoint's stays
    trained(states, 5, at=4)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000004-000004.safetensors"]


def test_records_that_are_no_client_state_stay_in_memory(tmp_path: Path) -> None:
    states = States(context, limit=0, folder=tmp_path)
    states.lend(1).state["aggregation"] = ConfigRecord({"secret": b"abc"})
    trained(states, 1, at=1)
    assert not states.live
    back = states.lend(1)
    assert back.state.config_records["aggregation"]["secret"] == b"abc"
    assert ClientState.load(back).round == 1


def test_without_a_limit_nothing_is_written(tmp_path: Path) -> None:
    states = States(context, None, tmp_path / "states")
    for node in range(1, 50):
        trained(states, node, at=1)
    assert len(states.live) == 49
    assert not (tmp_path / "states").exists()


SPILLED = [
    ("method=byol", "strategy.share.teacher=local", "participation.fraction=0.67"),
    ("compression=topk_int8", "compression.down=float16", "participation.fraction=0.67", "encoder.norm=batch"),
    (*BUFFERED, "strategy=fedu", "method=byol", "strategy.threshold=0.0001", "checkpoint_every=2"),
    ("aggregation=secure", "method=moco", "method.queue=16"),
]


@pytest.mark.parametrize("overrides", SPILLED, ids=lambda o: o[0])
def test_a_run_with_everything_on_disk_that_is_killed_is_one_in_memory(
    overrides: tuple[str, ...], plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    genuine = state_files.write

    def write(folder: Path, client: int, state: ClientState) -> Path:
        written.append(folder)
        return genuine(folder, client, state)

    monkeypatch.setattr(state_files, "write", write)
    options = ("federation.rounds=4", "evaluate.every=1", *overrides)
    straight = execute(plan(*options, "engine.state_limit_mib=null", name="straight"))
    assert {folder.name for folder in written} == {"clients"}
    written.clear()
    spilled = (*options, "engine.state_limit_mib=0")
    if overrides[0] != "aggregation=secure":  # whose second attempt at a round rounds otherwise
        assert not interrupted(plan(*spilled, name="broken"), 2, monkeypatch).done
    resumed = execute(plan(*spilled, name="broken"))
    assert {folder.name for folder in written} == {"states"}
    assert_same(final_arrays(straight), final_arrays(resumed))
    assert metrics(straight) == metrics(resumed)
    assert not (resumed.clients.with_name("states")).exists()
    ours, theirs = (
        {path.name: state_files.read(path) for path in run.clients.iterdir()} for run in (resumed, straight)
    )
    assert ours.keys() == theirs.keys() != set()
    for name, state in ours.items():
        for group in ("local", "mine", "residual"):
            assert_same(getattr(state, group), getattr(theirs[name], group))
        assert (state.memo, state.ledger) == (theirs[name].memo, theirs[name].ledger)


@pytest.mark.parametrize("name", ["plain", "mean"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_run_sums_as_it_is_told(name: str, exact: bool, plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    told: set[tuple[str, bool]] = set()
    for module in ("strategies.base", "fedssl.aggregation.plain"):

        def mean(now: Arrays, exact: bool = True, module: str = module) -> tree.PartialMean:
            told.add((module, exact))
            return tree.PartialMean(now, exact)

        monkeypatch.setattr(f"{module}.PartialMean", mean)
    execute(plan("federation.rounds=1", f"aggregation={name}", f"aggregation.exact={str(exact).lower()}", name="run"))
    assert ("strategies.base", exact) in told
    assert (("fedssl.aggregation.plain", exact) in told) is (name == "mean")
