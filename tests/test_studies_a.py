"""Four studies of the theory at their tiniest: negatives, augmentation, similarity, temperature."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedssl import config, seeds
from fedssl.errors import ConfigError
from simulations import study
from simulations.studies.tools.tables import SETTINGS, train
from simulations.studies.tools.two_factors import FactorViews, Scene, TwoFactors
from simulations.studies.tools.watched import free_descent

SMALLER = {
    "negatives": ("study.rounds=2", "study.steps=80", "study.trials=2048"),
    "augmentation": ("study.rounds=2", "study.examples=400"),
    "similarity": ("study.rounds=2", "study.clients=3"),
    "temperature": ("study.rounds=2", "study.clients=3"),
}


@pytest.fixture(scope="module", params=sorted(SMALLER))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study that has run, and its folder."""
    name, out = request.param, tmp_path_factory.mktemp("studies")
    assert study.main([name, "study.tiny=true", f"study.out={out}", *SMALLER[name]]) == 0
    return name, out / f"{name}-tiny"


def strict(path: Path) -> Any:
    """JSON without nan and infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path.name} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_study_leaves_findings_table_and_figures(done: tuple[str, Path]) -> None:
    name, folder = done
    summary = strict(folder / "summary.json")
    assert summary["name"] == name
    assert summary["study"]["tiny"] is True
    assert len(summary["findings"]) >= 4
    for finding in summary["findings"]:
        assert finding["claim"].startswith("T")
        assert finding["holds"] in (True, False, None)
        assert re.search(r"\d", finding["found"]), finding
        assert not re.search(r"\b(nan|inf)\b", finding["found"]), finding
    keys = set(summary["table"][0])
    for row in summary["table"]:
        assert set(row) == keys
        assert math.isfinite(row["measured"])
        assert math.isfinite(row["deviation"])
    assert (folder / "table.md").read_text().count("\n") == len(summary["table"]) + 2
    assert (folder / "report.html").stat().st_size > 5000
    pictures = list((folder / "figures").glob("*.png"))
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"
    science = {"negatives": negatives, "augmentation": augmentation, "similarity": similarity, "temperature": heat}
    science[name](summary)


def of(summary: dict[str, Any], *words: str) -> list[dict[str, Any]]:
    """The rows that hold all of these words."""
    return [row for row in summary["table"] if all(any(w in str(v) for v in row.values()) for w in words)]


def negatives(summary: dict[str, Any]) -> None:
    bias = {row["at"]: row["measured"] for row in of(summary, "T4 Gaussians", "I = 1 nats")}
    low, high = min(bias), max(bias)
    assert -1.3 < math.log(bias[high] / bias[low]) / math.log(high / low) < -0.6, "about 1 / N"
    local = [row["measured"] for row in of(summary, "T4 clusters", "skew 1, local batches")]
    assert min(local) > 1.2, "what tells clusters apart never shows: ln 4 nats"
    for row in of(summary, "T3 merged once", "own noise"):
        assert row["measured"] == pytest.approx(row["expected"], abs=0.12)


def augmentation(summary: dict[str, Any]) -> None:
    kept = {row["at"]: row for row in of(summary, "keep of b, s always kept", "accuracy of b from z")}
    assert kept[1.0]["measured"] > kept[0.0]["measured"] + 0.1
    assert kept[0.0]["shared by views (nats)"] == 0
    assert kept[1.0]["shared by views (nats)"] == pytest.approx(math.log(8))


def similarity(summary: dict[str, Any]) -> None:
    radial = {row["setting"]: row["measured"] for row in of(summary, "size of the radial cosine")}
    assert len(radial) == 8
    for setting, size in radial.items():
        assert size > 0.01 if "dot" in setting else size < 1e-5, setting


def heat(summary: dict[str, Any]) -> None:
    by_floor = [row["measured"] for row in of(summary, "max_snr, floor")]
    assert by_floor == sorted(by_floor, reverse=True), "the larger the floor, the lower the temperature"
    first, second = summary["findings"][:2]
    assert first["holds"] is False, "without a floor the ratio grows without end"
    assert second["holds"] is True
    assert all(0.0099 < row["measured"] < 10.1 for row in of(summary, "T7 clients", "mean t"))


def test_orthogonal_steps_grow_in_second_order_only() -> None:
    growth, share = free_descent("cosine", 0.01, 1.0, 0.5, 0)
    assert share == pytest.approx(1, abs=1e-9)
    assert growth == pytest.approx(free_descent("cosine", 0.005, 1.0, 0.5, 0)[0] * 2, rel=0.1)
    assert free_descent("dot", 0.01, 1.0, 0.5, 0)[1] < 0.5


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_predicted_bias_is_what_tables_learn(name: str) -> None:
    world = SETTINGS[name](4, 2, 0.9, seeds.stream(3, "joint"))
    assert world.joint.sum() == pytest.approx(1)
    once = train(world, 250, 1024, 4, 0) - world.ratio()
    assert world.spread(once - world.predicted()) < 0.08
    one = train(world, 250, 1024, 1, 0, every=1) - world.ratio()
    assert world.spread(one - world.predicted_of_steps(1)) < 0.08


def test_even_clients_have_no_bias() -> None:
    for make in SETTINGS.values():
        world = make(6, 3, 0.0, seeds.stream(0, "joint"))
        for bias in (world.predicted(), world.predicted_of_steps(1), world.predicted_of_steps(math.inf)):
            assert world.spread(bias) < 1e-9


def test_views_keep_what_they_are_told_to_keep() -> None:
    import torch

    table = TwoFactors(train=64, test=8, keep_signal=(1.0, 0.0), keep_background=(0.0, 1.0)).load().train
    scene = table.batch(torch.arange(64))
    assert scene.keep.unique(dim=0).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert np.bincount(table.groups).tolist() == [32, 32]
    views = FactorViews()
    one, two = (views.views(scene, seeds.torch_stream(0, "x"), 1)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (64, 1, 12, 12)
    plain = views.plain(scene)
    other = views.plain(Scene(scene.factors, scene.keep * 0, scene.place))
    assert torch.equal(plain, other), "what an example is does not depend on how its views are drawn"
    changed = views.plain(Scene((scene.factors + 1) % 8, scene.keep, scene.place))
    assert (changed - plain).abs().amax((1, 2, 3)).min() > 0.1
    with pytest.raises(ConfigError, match="device=cpu"):
        table.to("cuda")
    with pytest.raises(ConfigError, match="each site"):
        TwoFactors(keep_signal=(1.0,), keep_background=(2.0,))


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_the_yaml_says_what_it_measures_and_how_long(name: str) -> None:
    first, second = (config.conf_dir() / "study" / f"{name}.yaml").read_text().splitlines()[:2]
    assert re.search(r"\(T\d", first)
    assert re.fullmatch(rf"# Full size: fedssl study {name} \(\d+ min on two cores\)", second)


def test_wrong_options_of_a_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 and 1"):
        study.main(["augmentation", "study.keeps=[0.5]", f"study.out={tmp_path}"])
