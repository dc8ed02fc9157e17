"""The study privacy_utility: a tiny run, its design, and the audits that it draws."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from fedssl import config
from fedssl.errors import ConfigError
from simulations import study
from simulations.studies.base import Bench
from simulations.studies.federated.mechanisms import MECHANISMS, lower_bound
from simulations.studies.privacy_utility import PrivacyUtility, Setting

START = Path("start")


def test_a_tiny_run_leaves_findings_table_and_figures(tmp_path: Path) -> None:
    smaller = ("study.mechanisms=['BYOL, records']", "study.clients=2", "encoder.width=4", "encoder.dim=16")
    assert study.main(["privacy_utility", "study.tiny=true", f"study.out={tmp_path}", *smaller]) == 0
    folder = tmp_path / "privacy_utility-tiny"
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    settings = {(row["place"], row["setting"]) for row in summary["table"]}
    assert settings == {
        *((f"iid, {start}", f"BYOL, records, {e}") for start in ("no start", "public start")
          for e in ("no privacy", "epsilon 8")),
        *(("floor", name) for name in ("raw pixels", "untrained encoder", "public start")),
    }  # fmt: skip
    values = {(row["place"], row["setting"], row["measure"]): row["mean"] for row in summary["table"]}
    assert all(math.isfinite(value) for value in values.values())
    private = "iid, no start", "BYOL, records, epsilon 8"
    assert 7 < values[*private, "epsilon, accounted"] <= 8
    assert values[*private, "epsilon, audited"] < values[*private, "epsilon, accounted"]
    assert ("floor", "raw pixels", "epsilon, accounted") not in values
    assert len({values["floor", name, "5 labels a class"] for name in ("untrained encoder", "public start")}) == 2
    assert all(re.search(r"\d", finding["found"]) for finding in summary["findings"])
    assert summary["findings"][-1]["holds"] is True, "no audit finds more than what is accounted for"
    for name in ("accuracy", "audit"):
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300


def test_every_setting_composes_and_says_what_it_begins_with() -> None:
    study = PrivacyUtility(epsilons=(8.0,))
    for setting in study.settings:
        job = config.compose(study.options(setting, START)).job
        job.check()
        assert job.private == (setting.epsilon is not None) or setting.mechanism == "SimCLR, clients"
        assert job.start == (str(START) if setting.begun else None)
    assert len(study.settings) == len(set(study.settings)) == 4 * (2 * 2 + 2)


def test_audits_see_a_mechanism_that_claims_too_little_noise() -> None:
    study = PrivacyUtility()
    for name, noise in (("BYOL, records", "privacy"), ("SimCLR, clients", "aggregation")):
        options = study.options(Setting(name, 2.0, "iid", False), None)
        quiet = lower_bound(options, 0)
        assert quiet is not None
        assert quiet <= 2
        target = "privacy.epsilon=null" if noise == "privacy" else "aggregation.target_epsilon=null"
        loud = lower_bound((*options, target, f"{noise}.noise_multiplier=0.05"), 0)
        assert loud is not None
        assert loud > max(1, quiet + 0.5), "almost without noise; only sampling still hides who was there"
    assert lower_bound(study.options(Setting("VICReg, statistics", 2.0, "iid", False), None), 0) is None


def test_it_refuses_a_mechanism_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="study.mechanisms names 'none'"):
        PrivacyUtility(mechanisms=("none",)).run(Bench(tmp_path))
    assert all(mechanism.unit in ("record", "client") for mechanism in MECHANISMS.values())


def test_the_yaml_says_how_long_it_takes() -> None:
    second = (config.conf_dir() / "study" / "privacy_utility.yaml").read_text().splitlines()[1]
    how = r"\((about [1-9]\d* min on one thread of an AMD EPYC|not run yet)\)"
    assert re.fullmatch(rf"# Full size: fedssl study privacy_utility {how}", second)
