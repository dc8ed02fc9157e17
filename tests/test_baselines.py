"""The central baseline takes as many steps and sees as many examples as the federation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import tiny

from fedssl import config
from fedssl.client import FitResult
from fedssl.config import Plan
from fedssl.errors import PrivacyError
from fedssl.evaluation.baselines import central
from fedssl.job import split
from fedssl.job.setup import data_of


@pytest.mark.parametrize("fraction", ["1.0", "0.5"])
def test_equal_steps_and_examples(fraction: str, plan: Callable[..., Plan]) -> None:
    sizes = ("federation.clients=4", "federation.rounds=4", "local.epochs=2", "partition.alpha=0.2")
    job = plan(*sizes, f"participation.fraction={fraction}").job
    train = data_of(job, torch.device("cpu")).train
    seen: list[FitResult] = []
    central(job, train, torch.device("cpu"), lambda at, rounds, result: seen.append(result))
    sizes = [len(rows) for rows in split(job, train)]
    federated = sum(-(-n // job.local.batch_size) for n in sizes) * 2 * 4 * float(fraction)
    assert len(seen) == 4 * float(fraction)
    assert sum(result.steps for result in seen) == pytest.approx(federated, rel=0.05)
    assert sum(result.examples for result in seen) * 2 == sum(sizes) * 2 * 4 * float(fraction)


def test_a_run_reports_its_baselines(plan: Callable[..., Plan]) -> None:
    from conftest import execute

    rundir = execute(plan("baselines=true", "evaluate.final=true", "evaluate.repeats=2"))
    summary, probes = rundir.read("summary.json"), rundir.read("probes.json")
    assert set(probes["probes"]) == {"federated", "random encoder", "central", "raw values"}
    for prefix in ("", "random_encoder_", "central_", "raw_values_"):
        assert 0 < summary[f"{prefix}linear_accuracy"] <= 1
        assert 0 < summary[f"{prefix}one_label_accuracy"] <= 1
    assert probes["probes"]["random encoder"] != probes["probes"]["federated"]
    assert len(probes["spectra"]["central"]) == 8


def test_a_baseline_is_refused_what_its_clients_are_refused() -> None:
    pairs = tiny("privacy=pairs", "privacy.noise_multiplier=1", "method.norm=layer", modality="pairs")
    job = config.compose([o for o in pairs if not o.startswith("encoder.dim")]).job
    cpu = torch.device("cpu")
    with pytest.raises(PrivacyError, match="no vectorised form for pairs"):
        central(job, data_of(job, cpu).train, cpu, lambda at, rounds, result: None)
