"""Every study of the theory at its tiniest: what it leaves, what it must find, how it refuses and resumes."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.rundir import RunDirectory
from simulations import study
from simulations.studies.base import Bench
from simulations.studies.tools.runs import CENTRAL
from simulations.studies.tools.sweeps import Sweep

COLUMNS = ["part", "place", "setting", "measure", "mean", "deviation", "expected"]
FEWER = ("study.rounds=2", "evaluate.repeats=1", "data.test_fraction=0.7")  # 539 digits to train with
SMALLER = {
    "augmentation": ("study.rounds=2", "study.examples=400"),
    "imprinting": (*FEWER, "study.clients=3"),
    "negatives": (*FEWER, "study.steps=80", "study.trials=2048", "federation.clients=3"),
    "similarity": (*FEWER, "study.clients=3"),
    "stop_gradient": (*FEWER, "study.clients=2"),
    "teacher": (*FEWER, "study.epochs=2", "study.clients=2", "study.batch_size=64"),
    "temperature": (*FEWER, "study.clients=3"),
    "vicreg_balance": (*FEWER, "study.clients=2"),
}


class Summary:
    """A study's summary.json; nan and infinity are refused."""

    def __init__(self, path: Path) -> None:
        def refuse(word: str) -> None:
            raise AssertionError(f"{path.name} holds {word}")

        self.content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)

    def rows(self, **wanted: str) -> list[dict[str, Any]]:
        """The rows with these entries."""
        found = [row for row in self.content["table"] if all(row[key] == text for key, text in wanted.items())]
        assert found, wanted
        return found

    def mean(self, **wanted: str) -> float:
        """That of the one row with these entries."""
        (found,) = self.rows(**wanted)
        return float(found["mean"])

    def verdict(self, words: str) -> bool | None:
        """Whether the one claim with these words holds."""
        (found,) = [finding["holds"] for finding in self.content["findings"] if words in finding["claim"]]
        return found  # type: ignore[no-any-return]


QUICK = ("augmentation", "imprinting")
RUNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(SMALLER)]


@pytest.fixture(scope="module", params=RUNS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study that has run, and its folder."""
    name, out = request.param, tmp_path_factory.mktemp("studies")
    assert study.main([name, "study.tiny=true", f"study.out={out}", *SMALLER[name]]) == 0
    return name, out / f"{name}-tiny"


def test_a_study_leaves_findings_table_and_figures(done: tuple[str, Path]) -> None:
    name, folder = done
    summary = Summary(folder / "summary.json").content
    assert (summary["name"], summary["study"]["tiny"]) == (name, True)
    assert summary["seconds"] > 0
    assert len(summary["findings"]) >= 4
    for finding in summary["findings"]:
        assert re.match(r"T\d", finding["claim"])
        assert finding["holds"] in (True, False, None)
        assert re.search(r"\d", finding["found"]), finding
        assert not re.search(r"\b(nan|inf)\b", finding["found"]), finding
    cells = [(row["part"], row["place"], row["setting"], row["measure"]) for row in summary["table"]]
    assert len(set(cells)) == len(cells)
    for row in summary["table"]:
        assert list(row) == COLUMNS
        assert math.isfinite(row["mean"])
        assert math.isfinite(row["deviation"])
    assert (folder / "table.md").read_text().count("\n") == len(summary["table"]) + 2
    assert (folder / "report.html").stat().st_size > 5000
    pictures = list((folder / "figures").glob("*.png"))
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"


def test_a_study_finds_what_is_certain(done: tuple[str, Path]) -> None:
    name, folder = done
    globals()[f"check_{name}"](Summary(folder / "summary.json"))


def check_negatives(found: Summary) -> None:
    bias = {n: found.mean(part="Gaussians", setting=f"I = 1 nats, N = {n}") for n in (4, 256)}
    assert -1.3 < math.log(bias[256] / bias[4]) / math.log(256 / 4) < -0.6, "about 1 / N"
    missed = found.rows(part="clusters", measure="nats that local batches miss, optimal critic")
    apart = [row["mean"] for row in missed if row["setting"].startswith("skew 1,")]
    assert min(apart) > 1.2, "what tells clusters apart never shows: ln 4 nats"
    for row in found.rows(part="critic merged once"):
        if row["setting"].startswith("own noise"):
            assert row["mean"] == pytest.approx(row["expected"], abs=0.12)


def check_augmentation(found: Summary) -> None:
    kept, redrawn = (f"b kept with {k}, s always" for k in (1, 0))
    read = {setting: found.mean(setting=setting, measure="accuracy of b from z") for setting in (kept, redrawn)}
    assert read[kept] > read[redrawn] + 0.1
    shared = {setting: found.mean(setting=setting, measure="nats of b that views share") for setting in read}
    assert shared == {kept: pytest.approx(math.log(8)), redrawn: 0}


def check_similarity(found: Summary) -> None:
    radial = found.rows(measure="size of the radial cosine")
    assert len(radial) == 8
    for row in radial:
        assert row["mean"] > 0.01 if "dot" in row["setting"] else row["mean"] < 1e-5, row


def check_temperature(found: Summary) -> None:
    by_floor = [found.mean(part="scores", setting=f"max_snr, floor {floor}") for floor in ("0.3", "1", "3")]
    assert by_floor == sorted(by_floor, reverse=True), "the larger the floor, the lower the temperature"
    assert found.verdict("without further assumption") is False, "without a floor the ratio grows without end"
    assert found.verdict("with a noise floor") is True
    chosen = found.rows(part="clients", measure="mean t, last round; spread over clients")
    assert all(0.0099 < row["mean"] < 10.1 for row in chosen)


def check_stop_gradient(found: Summary) -> None:
    assert found.verdict("changes the stability") is True
    assert found.verdict("the text's words") is False, "the Jacobian says the reverse under the squared error"
    assert found.verdict("predicts how simulated encoders") is True
    assert found.verdict("predict the averaged clients") is True
    ranks = {
        setting: found.mean(place="central", setting=setting, measure="effective rank of projections")
        for setting in ("stop-gradient and predictor", "predictor alone")
    }
    assert ranks["predictor alone"] < ranks["stop-gradient and predictor"]


def check_teacher(found: Summary) -> None:
    assert found.verdict("geometric average") is True
    derived, kept = (
        found.mean(part="homes", setting=f"{home}, m = 0.999", measure="lag, mean of the rounds")
        for home in ("derived", "local")
    )
    assert 0 < derived < kept, "a rebuilt teacher cannot lag by more than a round"


def check_vicreg_balance(found: Summary) -> None:
    assert found.verdict("invariance is high while the variance falls") is False
    starved, paper, adaptive = (
        found.mean(part="weights", place="central", setting=setting, measure="deviation of projections")
        for setting in ("25, 1, 1", "25, 25, 1", "25, 1, 1 adaptive")
    )
    assert starved < paper / 2
    assert adaptive == pytest.approx(paper, rel=1e-4), "the floor of variance does it, not the rise of invariance"


def check_imprinting(found: Summary) -> None:
    before, after = (
        found.mean(part="labels", place=place, setting="imprinted keys, 54 a class", measure="accuracy")
        for place in ("untrained", "central")
    )
    assert after > before
    skewed = {"part": "owners", "place": "skewed clients", "measure": "accuracy"}
    union, sums, own = (
        found.mean(setting=setting, **skewed)
        for setting in ("union of keys", "sums of unit keys", "own, imprinted, all classes")
    )
    assert sums == pytest.approx(union, abs=0.003), "sums of unit keys are all that the union needs"
    assert own < union


def test_an_interrupted_study_continues_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    class Engine:
        limit = 3

        def run(self, job: object, rundir: RunDirectory, reporter: object) -> None:
            if len(ran) == self.limit:
                raise KeyboardInterrupt
            ran.append(rundir.path.name)
            rundir.write("summary.json", {})

    monkeypatch.setattr(Plan, "build_engine", lambda self: Engine())
    settings = {name: (f"method={name}",) for name in ("simclr", "byol")}
    sweep = partial(Sweep.of, Bench(tmp_path), {"central": CENTRAL}, settings, (), 2, lambda run: {"one": 1.0})
    with pytest.raises(KeyboardInterrupt):
        sweep()
    Engine.limit = 9
    assert sweep().stat("central", "byol", "one") == (1.0, 0.0)
    assert len(ran) == len(set(ran)) == 4


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_the_yaml_says_what_it_measures_and_how_long(name: str) -> None:
    first, second = (config.conf_dir() / "study" / f"{name}.yaml").read_text().splitlines()[:2]
    assert re.search(r"\(T\d", first)
    assert re.fullmatch(rf"# Full size: fedssl study {name} \((about [1-9]\d* min on two cores|not run yet)\)", second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "study needs one of attackers, augmentation, "),
        ("nothing", "'nothing' was given"),
        ("teacher tiny", "'tiny' is not an option"),
        ("teacher study.decay=0.5", "did you mean decays"),
        ("teacher study.rounds=many", "give a whole number"),
        ("teacher study.rounds=[1", "cannot be read"),
        ("teacher study.rounds=0", "study.rounds holds 0"),
        ("teacher study.decays=[]", "study.decays is empty"),
        ("teacher seed=3", "study.seeds"),
        ("teacher out=here", "study.out"),
        ("teacher method.bogus=1", "no option of any method"),
        ("teacher local.bogus=1", "local.bogus is not an option"),
        ("teacher study.out=pyproject.toml", "pass another study.out="),
        ("augmentation study.keeps=[0.5]", "0 and 1"),
        ("negatives study.skews=[0.5,0.9]", "let it rise from 0"),
        ("temperature study.probabilities=[1.5]", "below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        study.main(arguments.split())
    assert "\n" not in str(refused.value)
