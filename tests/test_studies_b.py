"""Four studies of the theory at their tiniest: stop_gradient, teacher, vicreg_balance, imprinting."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simulations import study
from simulations.studies.tools.sweeps import apart, pair

SMALLER = {
    "stop_gradient": ("study.rounds=2", "study.clients=2"),
    "teacher": ("study.rounds=2", "study.epochs=2", "study.clients=2", "study.batch_size=64"),
    "vicreg_balance": ("study.rounds=2", "study.clients=2"),
    "imprinting": ("study.rounds=2", "study.clients=3"),
}


@pytest.fixture(scope="module", params=sorted(SMALLER))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study that has run, and its folder."""
    name, out = request.param, tmp_path_factory.mktemp("studies")
    assert study.main([name, "study.tiny=true", f"study.out={out}", *SMALLER[name]]) == 0
    return name, out / f"{name}-tiny"


def strict(path: Path) -> dict[str, Any]:
    """JSON without nan and infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path.name} holds {word}")

    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return content


def test_a_study_leaves_findings_table_figures_and_its_science(done: tuple[str, Path]) -> None:
    name, folder = done
    summary = strict(folder / "summary.json")
    assert (summary["name"], summary["study"]["tiny"]) == (name, True)
    assert len(summary["findings"]) >= 6
    for finding in summary["findings"]:
        assert re.match(r"T\d", finding["claim"])
        assert finding["holds"] in (True, False, None)
        assert re.search(r"\d", finding["found"]), finding
        assert not re.search(r"\b(nan|inf)\b", finding["found"]), finding
    for row in summary["table"]:
        assert set(row) == {"part", "place", "setting", "measure", "mean", "deviation", "expected"}
        assert math.isfinite(row["mean"])
        assert math.isfinite(row["deviation"])
    assert (folder / "table.md").read_text().count("\n") == len(summary["table"]) + 2
    assert (folder / "report.html").stat().st_size > 5000
    pictures = list((folder / "figures").glob("*.png"))
    assert len(pictures) >= 3
    for path in pictures:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"
    {"stop_gradient": stop, "teacher": teacher, "vicreg_balance": balance, "imprinting": imprint}[name](summary)


def verdict(summary: dict[str, Any], words: str) -> Any:
    """Whether the one claim with these words holds."""
    (found,) = [finding["holds"] for finding in summary["findings"] if words in finding["claim"]]
    return found


def value(summary: dict[str, Any], **wanted: str) -> float:
    """The mean of the one row with these entries."""
    (found,) = [row["mean"] for row in summary["table"] if all(row[key] == text for key, text in wanted.items())]
    return float(found)


def stop(summary: dict[str, Any]) -> None:
    assert verdict(summary, "changes the stability") is True
    assert verdict(summary, "the text's words") is False, "the Jacobian says the reverse under the squared error"
    assert verdict(summary, "predicts how simulated encoders") is True
    assert verdict(summary, "predict the averaged clients") is True
    ranks = {
        setting: value(summary, place="central", setting=setting, measure="effective rank of projections")
        for setting in ("stop-gradient and predictor", "predictor alone")
    }
    assert ranks["predictor alone"] < ranks["stop-gradient and predictor"]


def teacher(summary: dict[str, Any]) -> None:
    assert verdict(summary, "geometric average") is True
    derived, kept = (
        value(summary, part="homes", setting=f"{home}, m = 0.999", measure="lag, mean of the rounds")
        for home in ("derived", "local")
    )
    assert 0 < derived < kept, "a rebuilt teacher cannot lag by more than a round"


def balance(summary: dict[str, Any]) -> None:
    assert verdict(summary, "invariance is high while the variance falls") is False
    starved, paper, adaptive = (
        value(summary, place="central", setting=setting, measure="deviation of projections")
        for setting in ("25, 1, 1", "25, 25, 1", "25, 1, 1 adaptive")
    )
    assert starved < paper / 2
    assert adaptive == pytest.approx(paper, rel=1e-4), "the floor of variance does it, not the rise of invariance"


def imprint(summary: dict[str, Any]) -> None:
    before, after = (
        value(summary, part="labels", place=place, setting="imprinted keys, 126 a class", measure="accuracy")
        for place in ("untrained", "central")
    )
    assert after > before
    skewed = {"part": "owners", "place": "skewed clients", "measure": "accuracy"}
    union, sums, own = (
        value(summary, setting=setting, **skewed)
        for setting in ("union of keys", "sums of unit keys", "own, imprinted, all classes")
    )
    assert sums == pytest.approx(union, abs=0.003), "sums of unit keys are all that the union needs"
    assert own < union


def test_a_difference_is_decided_by_the_spread() -> None:
    assert apart((0.9, 0.01), (0.8, 0.02)) is True
    assert apart((0.7, 0.01), (0.8, 0.02)) is False
    assert apart((0.81, 0.01), (0.8, 0.02)) is None
    assert apart((0.9, 0.0), (0.8, 0.0)) is None, "one seed says nothing about the spread"
    assert pair((0.9, 0.0)) == "0.900"
    assert pair((0.9, 0.01), 2) == "0.90 ± 0.01"
