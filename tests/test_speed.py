"""`python -m benchmarks` measures each thing once, and its pages say what was measured. Nothing looks at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from second_device import THERE, second_device

from benchmarks import __main__ as everything
from benchmarks import cost, pages, speed, workload
from benchmarks.workload import BARE, BY_HAND, PFL, RAY, ROOT, Work

TINY = Work(clients=5, rounds=2, examples=8, batch_size=4, size=8, width=4)
TRUE = cost.Constants(1e-3, 1e-2, 2e-4, 3e-8, 4e-3, 5e-9, 300.0, 6.0, 2.0)


def invented(name: str, work: Work) -> dict[str, Any]:
    """A row as the cost model says it would be."""
    if name.startswith("step"):
        flop = 1e6 * work.width**2 * work.batch_size
        views = TRUE.batch + TRUE.pixel * work.batch_size * work.size**2
        return {"views_s": views, "step_s": TRUE.step + TRUE.gflop * flop / 1e9, "flop": flop, "parameters": 1}
    if name.startswith("difference"):
        return {"system": name, "difference": 1e-6, "of_the_movement": 1e-5, "worst_array": 1e-4}
    parameters, flop = 100 * work.width**2, 1e5 * work.width * work.batch_size
    row = {"work": work.__dict__, "parameters": parameters, "flop": flop}
    said = cost.predict(TRUE, cost.size_of(row, 1))
    sent = {} if name in (BARE, BY_HAND, PFL) else {"bytes_up": said["bytes"] / 2, "bytes_down": said["bytes"] / 2}
    exact = "by hand" not in name and "cohort" not in name
    times = {key: [9.0] + [said["seconds"]] * (work.rounds - 1) for key in ("round_s", "round_cpu_s")}
    about = {"system": name, "imports_s": 1.0, "startup_s": 0.5, "peak_mib": said["mib"], **row, **times, **sent}
    return about | {"sha256": "same" if exact else name}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for page in (speed.PAGE, cost.PAGE):
        shutil.copy(ROOT / "docs" / page, folder)
    return folder


def test_nothing_is_measured_twice_and_the_pages_say_what_was(tmp_path: Path, docs: Path) -> None:
    out, asked = tmp_path / "speed.json", []

    def once(name: str, work: Work) -> dict[str, Any]:
        asked.append((name, work))
        if len(asked) == 9:
            raise KeyboardInterrupt
        return invented(name, work)

    options = ["--turns", "1", "--no-ray", "--out", str(out), "--docs", str(docs)]
    with pytest.raises(KeyboardInterrupt):
        everything.main(options, once)
    assert len(json.loads(out.read_text())["rows"]) == 8
    assert everything.main(options, once) == 0
    cells = list(everything.cells(1, left_out=(RAY, PFL)))
    assert len(asked) == len(cells) + 1, "only what was interrupted was asked again"
    assert everything.main([*options, "--only", "reference: bare", "--again"], once) == 0
    assert len(asked) == len(cells) + 2
    text = (docs / speed.PAGE).read_text()
    assert "| in_process, 2 workers | 1.00 / 1.00 |" in text
    assert "| difference of cohort=16 | 1e-06 |" in text
    assert "+0 %" in (docs / cost.PAGE).read_text()
    assert (docs / speed.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert "## reference" in (tmp_path / speed.FULL).read_text()
    for page in (docs / cost.PAGE, docs / speed.PAGE, tmp_path / speed.FULL, out):
        assert str(tmp_path) not in page.read_text()


def test_pfl_research_is_measured_where_it_is_told_to_be(
    tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, set[Path | None]] = {}

    def fresh(name: str, work: Work, beside: Path | None = None) -> dict[str, Any]:
        places.setdefault(name, set()).add(beside)
        return invented(name, work)

    monkeypatch.setattr(everything, "fresh", fresh)
    options = ["--turns", "1", "--no-ray", "--out", str(tmp_path / "speed.json"), "--docs", str(docs)]
    assert everything.main([*options, "--pfl", str(tmp_path)]) == 0
    assert places.pop(PFL) == {tmp_path.resolve()}
    assert set.union(*places.values()) == {None}, "what is beside it may be older than what others need"
    assert "| pfl-research | 1.00 / 1.00 |" in (docs / speed.PAGE).read_text()


def test_the_pages_are_those_of_the_stored_numbers(docs: Path) -> None:
    result = json.loads(speed.RESULTS.read_text())
    for page in (speed.PAGE, cost.PAGE):
        text = (docs / page).read_text()
        assert text.count("<!-- begin: python -m benchmarks, ") == 3
        (docs / page).write_text(text.replace("| ", "| stale "))
    speed.write_tables(result, docs)
    cost.write(result, docs)
    for page in (speed.PAGE, cost.PAGE):
        for part in (docs / page).read_text().split("<!-- begin: python -m benchmarks, ")[1:]:
            written = part.split(pages.END)[0]
            assert "stale" not in written
            assert written in (ROOT / "docs" / page).read_text(), "run `python -m benchmarks --tables`"
    assert (speed.RESULTS.parent / speed.FULL).read_text() == speed.full(result)


def test_the_cost_model_finds_the_constants_that_made_the_numbers() -> None:
    rows = [
        {"group": group, "name": name, "turn": turn, "load": 0.0, "work": work.__dict__, **invented(name, work)}
        for group, name, turn, work in everything.cells(1)
    ]
    found = cost.fit(rows)
    for name, value in TRUE.__dict__.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.01), name
    for each in cost.errors(found, rows):
        assert each["predicted"] == pytest.approx(each["measured"], rel=1e-3)


def test_a_round_costs_what_its_parts_cost() -> None:
    size = cost.Size(clients=7, parameters=1000, rounds=3, flop=2e6, examples=10, batch_size=4, size=8, sampled=2)
    said = cost.predict(TRUE, size)
    steps = 3 * (1e-3 + 2e-4) + 10 * (2e6 / 1e9 * 1e-2 + 64 * 3e-8)
    assert said["seconds"] == pytest.approx(3 * 2 * (steps + 4e-3 + 5e-6))
    assert said["bytes"] == 3 * 2 * 2 * 4000
    assert said["mib"] == pytest.approx(300 + (6 * 4000 + 2 * 4 * 3 * 64 * 70 + 7 * 10 * 3 * 64) / 2**20)


def test_systems_that_should_agree_and_do_not_are_refused() -> None:
    about = {"group": "g", "turn": 0, "work": TINY.__dict__}
    rows = [{**about, "name": name, "sha256": name} for name in (BARE, "in_process, 1 worker")]
    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        speed.compared(rows)


def test_a_gpu_has_rows_and_a_page_of_its_own(tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, str]] = set()

    def once(name: str, work: Work) -> dict[str, Any]:
        asked.add((name, work.device))
        return invented(name, work) | {"peak_gpu_mib": 77.0, "sha256": name}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU called {device}")
    monkeypatch.setattr(everything, "RESULTS", tmp_path / "speed.json")
    before = (docs / speed.PAGE).read_bytes()
    assert everything.main(["--turns", "1", "--device", "cuda", "--docs", str(docs), "--pfl", str(tmp_path)], once) == 0
    there = {BARE, BY_HAND, RAY, "in_process, 1 worker", "in_process, 2 workers"}
    assert asked == {(name, "cuda") for name in (*there, "in_process, cohort=16", "in_process, cohort=auto")}
    page = (tmp_path / "speed_cuda.md").read_text()
    assert "a GPU called cuda" in page
    assert "| its GPU's |" in page
    assert "| 77 |" in page
    assert (docs / speed.PAGE).read_bytes() == before
    assert Work(device="cuda").plan(RAY, tmp_path).engine["gpus_per_client"] == 0.5


@pytest.mark.parametrize("system", [BARE, BY_HAND])
def test_loops_train_on_the_device_that_they_are_told(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = workload.train(system, TINY, tmp_path, workload.Clock())
    # Its generators are the CPU's under another name, so even the loop by hand draws the same numbers there.
    monkeypatch.setattr(workload, "device_of", lambda job: THERE)
    with second_device():
        assert_same(workload.train(system, TINY, tmp_path, workload.Clock()), here)


def test_cohorts_and_the_loop_by_hand_do_the_work_of_the_bare_loop() -> None:
    bare = workload.here(BARE, TINY)
    hand = workload.here(BY_HAND, TINY)
    assert bare["sha256"] != hand["sha256"]
    assert (bare["parameters"], bare["flop"]) == (hand["parameters"], hand["flop"])
    cohort = workload.here("in_process, cohort=16", TINY)
    assert cohort["bytes_up"] == pytest.approx(5 * 4 * bare["parameters"], rel=1e-3)
    exact = workload.here("difference: in_process, 1 worker", TINY)
    assert (exact["difference"], exact["worst_array"]) == (0, 0)
    away = workload.here("difference: in_process, cohort=16", TINY)
    assert 0 < away["difference"] < 0.01


def test_a_step_is_measured_with_its_views() -> None:
    row = workload.here("step: ", replace(TINY, clients=1))
    assert row["flop"] == workload.flop(TINY) > 1e5
    assert min(row["views_s"], row["step_s"]) > 0
