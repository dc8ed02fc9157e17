"""`start`: a federation that begins with the encoder of another run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.export import load_encoder
from fedssl.job.setup import build_model, data_of, initial_model
from fedssl.model import to_arrays
from fedssl.privacy.statement import PUBLIC_START, with_public_start
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory
from simulations.studies.tools.runs import Finished

SMALL = (
    *("device=cpu", "data=synthetic", "data.train=60", "data.test=30", "data.classes=3", "data.size=8"),
    *("encoder.width=4", "encoder.dim=8", "method.hidden=8", "method.out=8", "federation.clients=2"),
    *("federation.rounds=1", "evaluate.every=0", "evaluate.final=false", "partition=iid", "local.batch_size=16"),
)
BYOL = ("method=byol", "method.norm=layer")


def run(folder: Path, *options: str) -> RunDirectory:
    """A finished run."""
    plan = config.compose([*SMALL, *options, f"out={folder}"])
    rundir = plan.open()
    plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
    return rundir


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on data of the same shape."""
    return run(tmp_path_factory.mktemp("public"), "data.seed=7", "name=public").path


def plan(*options: str) -> Plan:
    return config.compose([*SMALL, *options])


def test_the_first_model_has_the_encoder_of_that_run_and_teachers_follow(public: Path) -> None:
    job = plan(*BYOL, f"start={public}").job
    shape = data_of(job, torch.device("cpu")).train.shape
    mine, seeded = initial_model(job, shape), to_arrays(build_model(job, shape))
    arrays = to_arrays(mine)
    for name, tensor in load_encoder(public).network.state_dict().items():
        assert np.array_equal(arrays[f"encoder.{name}"], tensor.numpy()), name
        assert np.array_equal(arrays[f"teacher.encoder.{name}"], tensor.numpy()), name
    heads = [name for name in arrays if name.startswith(("projector", "predictor"))]
    assert heads
    assert all(np.array_equal(arrays[name], seeded[name]) for name in heads)
    assert any(not np.array_equal(arrays[name], seeded[name]) for name in arrays if name.startswith("encoder"))


def test_a_federation_begins_with_it_and_goes_on(public: Path, tmp_path: Path) -> None:
    begun = run(tmp_path, *BYOL, f"start={public}", "local.lr=1e-12", "local.weight_decay=0")
    theirs = load_encoder(public).network.state_dict()
    for name, tensor in load_encoder(begun.path).network.state_dict().items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), "clients got it: they have not moved"
    moved = run(tmp_path, *BYOL, f"start={public}")
    assert any(not torch.equal(v, theirs[k]) for k, v in load_encoder(moved.path).network.state_dict().items())
    assert Finished.of(moved).job.start == str(public)


def test_what_it_says_of_privacy(public: Path, tmp_path: Path) -> None:
    private = ("privacy=example", "privacy.epsilon=8", f"start={public}")
    claim = json.loads((run(tmp_path, *BYOL, *private).path / "privacy.json").read_text())
    assert PUBLIC_START in claim["not_covered"]
    both = with_public_start({"unit": "client", "not_covered": ["a"], "record": {"not_covered": ["b"]}})
    assert both["not_covered"] == ["a", PUBLIC_START]
    assert both["record"]["not_covered"] == ["b", PUBLIC_START]
    assert with_public_start({"unit": None, "says": "nothing"}) == {"unit": None, "says": "nothing"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("start=nowhere",), "has no encoder"),
        (("start=PUBLIC", "encoder.dim=4"), "has another encoder"),
        (("start=PUBLIC", "encoder.norm=batch"), "has another encoder"),
        (("start=PUBLIC", "strategy=fedbn"), "stays with the clients"),
        (("start=PUBLIC", *BYOL, "strategy.share.teacher=local"), "stays with the clients"),
    ],
)
def test_it_refuses(options: tuple[str, ...], words: str, public: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run(tmp_path, *(text.replace("PUBLIC", str(public)) for text in options))
    assert "\n" not in str(caught.value)


def test_no_start_is_the_default() -> None:
    assert plan().job.start is None
