"""Defects verified in public codes of the field, each named; none can happen here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import execute
from test_methods import METHODS, STEP, batch_of, fit_one, job_of, model_of

from fedssl.config import Plan
from fedssl.flower import state_files
from fedssl.losses import nt_xent
from fedssl.model import pairs, to_arrays
from fedssl.networks.teacher import TEACHER, follow

Compose = Callable[..., Plan]


def test_1_a_queue_is_wiped_at_each_rounds_start(plan: Compose) -> None:
    """Local negatives never survived a round. Here the keys of round 1 are still there in round 2, bit for bit."""
    keys = []
    for rounds in (1, 2):
        run = execute(plan("method=moco", "method.queue=500", f"federation.rounds={rounds}", name=f"r{rounds}"))
        path = state_files.newest(run.clients, 0, 99)
        assert path is not None
        keys.append(state_files.read(path).local)
    first = int(keys[0]["queue.pushed"])
    assert int(keys[1]["queue.pushed"]) == 2 * first
    assert keys[0]["queue.keys"][:first].any(axis=1).all()
    assert keys[1]["queue.keys"][: 2 * first].any(axis=1).all()
    assert keys[1]["queue.index"][: 2 * first].min() >= 0


@pytest.mark.parametrize("name", [n for n in METHODS if any(p.teaches for p in job_of(n).method.parts)])
def test_2_the_teacher_of_the_first_round_is_the_student(name: str) -> None:
    """The same object: EMA without effect. Here a teacher owns its memory and lags from the first step on."""
    job = job_of(name)
    model = model_of(job)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs(model, TEACHER))
    fit_one(job, model)
    assert any(not torch.equal(a, b) for a, b in pairs(model, TEACHER))


def test_4_the_ema_is_inverted() -> None:
    """A target kept .004 of itself a step. Here a decay of .99 keeps .99."""
    model = model_of(job_of("byol"))
    before = [a.clone() for a, _ in pairs(model, TEACHER)]
    with torch.no_grad():
        for parameter in model["encoder"].parameters():
            parameter += 1
    follow(model, STEP, 0.99, "constant")
    moved = [(a - b).abs().max().item() for (a, _), b in zip(pairs(model, TEACHER), before, strict=True)]
    assert max(moved) == pytest.approx(0.01, rel=1e-3)


def test_11_the_diagonal_is_multiplied_by_zero_instead_of_masked() -> None:
    """A similarity of 0 still adds exp(0) = 1 to every denominator; worst for two examples."""
    z = torch.eye(2, dtype=torch.float64)
    masked = math.log(1 + 2 * math.exp(-1 / 0.5))
    multiplied = math.log((math.exp(1 / 0.5) + 2 + 1) / math.exp(1 / 0.5))
    assert nt_xent(z, z, temperature=0.5).mean().item() == pytest.approx(masked, rel=1e-12)
    assert abs(masked - multiplied) > 0.1


@pytest.mark.parametrize("n", [2, 5, 8, 9])
@pytest.mark.parametrize("name", METHODS)
def test_13_a_client_smaller_than_a_batch_has_no_batch_or_wrong_labels(name: str, n: int) -> None:
    """No step, a division by zero, or labels of the configured batch size. Here it trains on what it has."""
    job = job_of(name, "local.batch_size=8", "local.warmup=0")
    model = model_of(job, n)
    before = to_arrays(model)["encoder.0.weight"]
    result = fit_one(job, model, n=n)
    assert (result.examples, result.steps) == (n, -(-n // 8))
    assert math.isfinite(result.loss)
    assert (to_arrays(model)["encoder.0.weight"] != before).any()
    out = job.method.loss(model, batch_of(job, n), STEP)
    assert torch.isfinite(out.loss)
