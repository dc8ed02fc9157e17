"""`fedssl audit` on tiny finished runs: files, exit codes, contradictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import execute, tiny

from fedssl import config
from fedssl.datasets.base import Data
from fedssl.errors import ConfigError, ResumeError
from fedssl.job import shards
from fedssl.rundir import RunDirectory
from simulations import inspect_audit
from simulations.audits import canaries, inversion_demo
from simulations.audits import target as target_module
from simulations.audits.target import Claim, Run

LAYER = ("method=byol", "method.norm=layer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of a method without coupling."""
    out = tmp_path_factory.mktemp("runs")
    return execute(config.compose([*tiny(*LAYER), f"out={out}", "name=run"])).path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def claim(run: Path, **told: object) -> None:
    (run / "privacy.json").write_text(json.dumps({"unit": "record", "delta": 1e-5, **told}))


def test_an_audit_leaves_its_findings(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_audit.main([str(copied)]) == 0
    found = json.loads((copied / "audit.json").read_text())
    names = [attack["name"] for attack in found["attacks"]]
    assert names == ["EncoderMI-T, encoder", "EncoderMI-T, projector", "EncoderMI-V", "loss", "agreement", "norm"]
    for attack in found["attacks"]:
        assert attack["auc"]["low"] <= attack["auc"]["value"] <= attack["auc"]["high"], attack["name"]
        assert attack["unit"] == "record"
        assert attack["epsilon"] >= 0
    assert (found["attacks"][0]["members"], found["attacks"][0]["others"]) == (60, 30)
    assert not found["contradicted"]
    assert found["claims"][0]["epsilon"] is None
    assert found["control"]["alike"]
    assert {path.suffix for path in (copied / "figures").glob("audit.*")} == {".svg", ".png"}
    assert "claims no epsilon" in capsys.readouterr().out


def test_a_false_claim_is_contradicted_by_the_code_that_trained(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain gradients under an epsilon of 0.5: canaries show that the claim is false."""
    claim(copied, epsilon=0.5)
    assert inspect_audit.main([str(copied)]) == 1
    printed = capsys.readouterr().out
    assert "CONTRADICTED: gradient canaries" in printed
    assert json.loads((copied / "audit.json").read_text())["contradicted"]
    claim(copied, epsilon=100.0)
    assert inspect_audit.main([str(copied)]) == 0
    assert "no attack contradicts epsilon=100.00" in capsys.readouterr().out
    claim(copied, epsilon=0.5, unit="client")  # gradients of single records are not what was claimed
    assert inspect_audit.main([str(copied)]) == 0


def test_both_claims_of_a_run_are_held_against_it(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"unit": "record", "epsilon": 0.5, "delta": 1e-5, "relation": "one record of one client added or removed"}
    client = {"epsilon": 30.0, "unit": "client", "relation": "all updates of one client replaced by zeros"}
    claim(copied, **client, record=record)
    claims = Claim.all_of(RunDirectory(copied))
    assert [(each.unit, each.epsilon, each.replaced) for each in claims] == [
        ("record", 0.5, False),
        ("client", 30.0, False),
    ]
    assert Claim(1.0, relation="all updates of one client replaced by any others").replaced
    assert inspect_audit.main([str(copied)]) == 1
    printed = capsys.readouterr().out
    assert "CONTRADICTED: gradient canaries" in printed
    assert "no attack contradicts epsilon=30.00 at delta=1e-05 for one client" in printed


def test_a_private_run_holds_its_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DP-SGD end to end: the bounds are below the epsilon of its ledger, and above one that is too small."""
    private = ("privacy=example", "privacy.epsilon=null", "privacy.noise_multiplier=0.8", "local.batch_size=8")
    run = execute(config.compose([*tiny(*LAYER, *private), f"out={tmp_path}", "name=dp"])).path
    assert inspect_audit.main([str(run), "--examples", "30"]) == 0
    assert "no attack contradicts epsilon=" in capsys.readouterr().out
    found = json.loads((run / "audit.json").read_text())
    bounds = {bound["name"]: bound for bound in found["bounds"]}
    assert 0.3 < bounds["gradient canaries"]["epsilon"] < found["claims"][0]["epsilon"]
    told = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps({**told, "epsilon": bounds["gradient canaries"]["epsilon"] - 0.1}))
    assert inspect_audit.main([str(run), "--examples", "30"]) == 1


def test_shadow_runs_and_inversion(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion_demo, "STEPS", 20)
    assert inspect_audit.main([str(copied), "--shadows", "3", "--inversion", "1", "--examples", "40"]) == 0
    found = json.loads((copied / "audit.json").read_text())
    assert [attack["name"] for attack in found["attacks"]][-2:] == ["LiRA, this run", "LiRA, shadow runs"]
    assert found["attacks"][-1]["members"] + found["attacks"][-1]["others"] == 3 * 40
    assert found["inversion"]["psnr_db"] > 0
    before = (copied / "shadows" / "00" / "summary.json").stat().st_mtime_ns
    shadow = RunDirectory(copied / "shadows" / "00").config()
    assert shadow["data"]["_target_"].endswith("Halved")
    assert shadow["seed"] != RunDirectory(copied).config()["seed"]
    assert inspect_audit.main([str(copied), "--shadows", "3"]) == 0
    assert (copied / "shadows" / "00" / "summary.json").stat().st_mtime_ns == before, "it was not trained again"
    for told, spoken_of in (({}, True), ({"public": ["the number of records"]}, False), ({"unit": "client"}, True)):
        claim(copied / "shadows" / "00", epsilon=3.0, **told)
        assert inspect_audit.main([str(copied), "--shadows", "3"]) == 0
        last = json.loads((copied / "audit.json").read_text())["bounds"][-1]
        assert last["name"] == "LiRA, shadow runs"
        assert (last["claim"]["epsilon"] == 3.0) == spoken_of, "a coin changes how many records a client has"


def test_members_are_those_who_took_part(tmp_path: Path) -> None:
    few = ("federation.rounds=1", "participation.fraction=0.34")
    run = execute(config.compose([*tiny(*LAYER, *few), f"out={tmp_path}", "name=few"]))
    target = Run(run, 1000, 0)
    assert len(target.participants) == 1
    (client,) = target.participants
    np.testing.assert_array_equal(target.members, target.parts[client])


def test_a_run_that_claims_for_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its clients do not tell their steps, and gradients of records are not what it claims."""
    options = ["aggregation=client_dp", "aggregation.delta=1e-5", f"out={tmp_path}", "name=clients"]
    run = execute(config.compose([*tiny(*LAYER), *options]))
    assert inspect_audit.main([str(run.path), "--examples", "20"]) == 0
    printed = capsys.readouterr().out
    assert "for one client; that is no proof" in printed
    assert "gradient canaries" not in printed


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (canaries.TWO_WORLDS, ("method=vicreg", "privacy=statistics")),
        (canaries.TWO_WORLDS, ("method=simclr", "privacy=groups", "privacy.size=4")),
        (canaries.TWO_WORLDS, ("method=sigmoid", "privacy=pairs")),
        (canaries.CLIENTS, ("method=byol", "aggregation=client_dp", "aggregation.delta=1e-5")),
        (canaries.CLIENTS, ("method=byol", "aggregation=local_dp", "aggregation.delta=1e-5")),
        (canaries.CLIENTS, ("method=byol", "aggregation=ftrl", "aggregation.delta=1e-5", "aggregation.band=1")),
        (canaries.CLIENTS, ("method=byol", "aggregation=secure_dp")),
    ],
)
def test_the_mechanism_of_every_claim_is_audited(
    name: str, options: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few repetitions here: what canaries find is tested in test_audit_worlds and test_audit_federation."""
    for budget in ("_STEPS", "_ROUNDS", "_FEWEST"):
        monkeypatch.setattr(canaries, budget, 40)
    noise = [f"privacy.{key}={value}" for key, value in (("epsilon", "null"), ("noise_multiplier", 1.0))]
    chosen = [*options, *(noise if name == canaries.TWO_WORLDS else [])]
    small = ("federation.rounds=1", "method.norm=group", "local.batch_size=20")
    run = execute(config.compose([*tiny(*chosen, *small), f"out={tmp_path}", "name=run"]))
    assert inspect_audit.main([str(run.path), "--examples", "20"]) == 0
    found = json.loads((run.path / "audit.json").read_text())
    (bound,) = (each for each in found["bounds"] if each["name"] == name)
    assert 0 <= bound["epsilon"] < bound["claim"]["epsilon"] == found["claims"][0]["epsilon"]
    assert set(found["estimates"]) == ({name} if options[1].endswith(("client_dp", "local_dp", "ftrl")) else set())


def test_what_stays_on_clients_is_not_read(tmp_path: Path) -> None:
    """With a local projector the attacker has the encoder only."""
    run = execute(config.compose([*config_of("strategy.share.projector=local"), f"out={tmp_path}", "name=local"]))
    inside, _ = Run(run, 1000, 0).statistics()
    assert inside.keys() == {"encoder views", "norm"}


def config_of(*overrides: str) -> Sequence[str]:
    return tiny("method=simclr", *overrides)


def test_each_modality_can_be_audited(tmp_path: Path) -> None:
    for modality in ("timeseries", "graphs", "pairs"):
        method = "clip" if modality == "pairs" else "simclr"
        options = [*tiny(f"method={method}", "federation.rounds=1", modality=modality), f"out={tmp_path}"]
        run = execute(config.compose([*options, f"name={modality}"]))
        assert inspect_audit.main([str(run.path), "--examples", "20"]) == 0


def test_a_camera_a_client(tmp_path: Path) -> None:
    options = ["partition=feature_shift", f"out={tmp_path}", "name=shift"]
    run = execute(config.compose([*(o for o in tiny(*LAYER) if not o.startswith("partition.")), *options]))
    assert inspect_audit.main([str(run.path), "--examples", "20", "--shadows", "3"]) == 0


def test_groups_that_were_not_divided_at_random_give_no_bound(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brighter test examples: every attack tells the groups apart, and none of them learnt it from training."""
    data_of = target_module.data_of

    def brighter(*arguments: Any) -> Data:
        data: Data = data_of(*arguments)
        return replace(data, test=replace(data.test, images=255 - data.test.images // 4))

    monkeypatch.setattr(target_module, "data_of", brighter)
    monkeypatch.setattr(shards, "data_of", brighter)
    claim(copied, epsilon=0.01, unit="client")
    assert inspect_audit.main([str(copied)]) == 0
    found = json.loads((copied / "audit.json").read_text())
    assert not found["control"]["alike"]
    assert max(attack["auc"]["value"] for attack in found["attacks"]) > 0.9
    assert max(bound["epsilon"] for bound in found["bounds"]) == 0
    assert "not divided at random" in capsys.readouterr().out


def test_refusals(copied: Path, tmp_path: Path) -> None:
    cases: list[tuple[Sequence[str], type[Exception], str]] = [
        ([], ConfigError, "exactly one run"),
        ([str(copied), "--fast"], ConfigError, "--fast is not an option of audit"),
        ([str(copied), "--shadows"], ConfigError, "needs a value"),
        ([str(copied), "--shadows", "few"], ConfigError, "whole number"),
        ([str(copied), "--shadows", "2"], ConfigError, "too few"),
        ([str(copied), "--examples", "3"], ConfigError, "at least 8"),
        ([str(copied), "--inversion", "9"], ConfigError, "1 to 4"),
        ([str(tmp_path / "nothing")], ResumeError, "no config.yaml"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            inspect_audit.main(arguments)
    (copied / "summary.json").unlink()
    with pytest.raises(ResumeError, match="has not ended"):
        inspect_audit.main([str(copied)])
    assert [claim.epsilon for claim in Claim.all_of(RunDirectory(copied))] == [None]


def test_small_clients_have_no_shadow(tmp_path: Path) -> None:
    small = [*tiny(*LAYER), "data.train=6", "federation.clients=3", "partition=iid", "federation.rounds=1"]
    options = [o for o in small if not o.startswith("partition.")]
    run = execute(config.compose([*options, f"out={tmp_path}", "name=small"]))
    with pytest.raises(ConfigError, match="in shadow run"):
        inspect_audit.main([str(run.path), "--shadows", "4"])
