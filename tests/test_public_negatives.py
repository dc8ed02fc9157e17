"""Public negatives: SimCLR, MoCo and instance discrimination whose losses read one example of the client at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import test_methods
import torch
from conftest import TINY, execute, public_like, tiny
from test_methods import STEP, batch_of, coupled, job_of, model_of
from torch import Tensor, nn

from fedssl import config
from fedssl.client import Local
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.gradient import PlainGradient
from fedssl.job.setup import public_of
from fedssl.method import Batch
from fedssl.networks.keys import KeyBank, KeyQueue
from fedssl.parts import Coupling
from fedssl.privacy import coupling
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.per_record import Engine, by_engine, dense, trainable

Compose = Callable[..., Plan]
NAMES = ("simclr", "moco", "instance")
every = pytest.mark.parametrize("name", NAMES)
PUBLIC = (*public_like(TINY), "method.negatives=public", "method.norm=group")


def public_job(name: str, *overrides: str) -> Any:
    batch = ("method.public_batch=5",) if name == "simclr" else ()
    return job_of(name, *PUBLIC, *batch, *overrides)


def unit(x: Tensor) -> list[float]:
    norm = math.sqrt(sum(v * v for v in x.tolist()))
    return [v / norm for v in x.tolist()]


def reference(anchor: Tensor, positive: Tensor, keys: Tensor, t: float) -> float:
    """-log of the positive's share among itself and the public keys, by hand."""
    a = unit(anchor)
    scores = [sum(x * y for x, y in zip(a, unit(other), strict=True)) / t for other in (positive, *keys)]
    return math.log(sum(math.exp(s) for s in scores)) - scores[0]


@every
def test_the_loss_is_the_definition(name: str) -> None:
    job = public_job(name)
    model = model_of(job).double()
    drawn = batch_of(job, 4)
    views = [view.double() for view in drawn.views]
    batch = Batch(views, drawn.index, None if drawn.public is None else drawn.public.double(), drawn.public_index)
    out = job.method.loss(model, batch, STEP)
    network = nn.Sequential(model["encoder"], model["projector"])
    with torch.no_grad():
        first, second = (network(view) for view in views)
        keys = {
            "simclr": lambda: network(batch.public),
            "moco": lambda: model["queue"].keys,
            "instance": lambda: model["bank"].keys,
        }[name]()
    assert len(keys) == {"simclr": 5, "moco": 60, "instance": 60}[name]
    t = job.method.temperature
    expected = [reference(first[i], second[i], keys, t) for i in range(4)]
    if name == "simclr":
        expected = [(x + reference(second[i], first[i], keys, t)) / 2 for i, x in enumerate(expected)]
    assert out.per_example is not None
    assert out.per_example.tolist() == pytest.approx(expected, rel=1e-12)
    assert out.loss.item() == pytest.approx(sum(expected) / 4, rel=1e-12)


@pytest.mark.parametrize(
    "suite",
    [
        "declared_parts_are_the_models_parts",
        "gradients_reach_exactly_the_trainable_parts",
        "the_output_keeps_its_contract",
        "teachers_move_towards_not_onto_the_student",
        "the_state_survives_arrays",
        "the_loss_falls",
        "bf16_trains",
        "local_training_is_a_function_of_its_seeds",
    ],
)
@every
def test_the_contract_of_every_method(name: str, suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "moco" and suite.startswith("teachers"):
        return
    if name == "instance" and suite == "the_loss_falls":
        return  # below: its keys are as old as the round
    monkeypatch.setattr(test_methods, "job_of", lambda name, *more, **_: public_job(name, *more))
    getattr(test_methods, f"test_{suite}")(name, "images")


def test_instance_discrimination_learns_over_rounds_whose_keys_are_fresh() -> None:
    job = public_job("instance", "local.warmup=0")
    model, still = model_of(job, 32), Local(epochs=10, batch_size=16, lr=1e-12)
    before = test_methods.fit_one(job, model, n=32, local=still).loss
    for _ in range(25):
        test_methods.fit_one(job, model, n=32, local=Local(batch_size=16, lr=0.01, warmup=0.0))
    assert test_methods.fit_one(job, model, n=32, local=still).loss < before - 0.2


def test_hooks_cannot_tell_public_rows_from_records() -> None:
    """With as many public examples as records opacus would add row to row, without a word."""
    options = ["method=simclr", *PUBLIC, "privacy=example", "privacy.engine=hooks", "encoder.norm=group"]
    with pytest.raises(PrivacyError, match=r"privacy\.engine=vmap"):
        config.compose(tiny(*options))
    job = public_job("simclr")
    with pytest.raises(PrivacyError, match="public"):
        by_engine(Engine.hooks, job.method, model_of(job), batch_of(job, 5), STEP)


@every
def test_the_loss_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_methods, "job_of", lambda name, *more, **_: public_job(name, *more))
    test_methods.test_the_loss_changes_nothing(name, "images", "group")


@every
def test_one_record_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike with negatives of its own, it has something to contrast."""
    monkeypatch.setattr(test_methods, "job_of", lambda name, *more, **_: public_job(name, *more))
    test_methods.test_small_clients_train_or_are_refused(name, "images", 1)
    assert test_methods.fit_one(public_job(name), model_of(public_job(name), 1), n=1).loss > 0.1


@every
def test_a_record_reads_no_other(name: str) -> None:
    job = public_job(name)
    assert job.method.coupling is Coupling.none
    assert not any(part.holds_examples or part.sized for part in job.method.parts)
    assert not coupled(job)
    assert public_job(name, "method.temperature=cosine").method.coupling is Coupling.none
    for option in ("method.norm=batch", "method.temperature=target_probability"):
        assert public_job(name, option).method.coupling is Coupling.batch, option
    assert job_of(name).method.coupling is not Coupling.none, "defaults are what they were"


@pytest.mark.filterwarnings("ignore:Full backward hook")
@every
def test_the_probes_admit_it_and_every_engine_agrees(name: str) -> None:
    job = public_job(name)
    model = model_of(job)
    train = job.data.load().train
    ExampleDP().admit(job.method, model, train, job.data.augment)
    batch = batch_of(job, 4)
    engines = (
        [Engine.vmap, Engine.loop, Engine.ghost] if name == "simclr" else list(Engine)
    )  # SimCLR's network sees public rows too
    found = [[dense(g) for g in by_engine(engine, job.method, model, batch, STEP).gradients] for engine in engines]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    out = job.method.loss(model, batch, STEP)
    whole = torch.autograd.grad(out.loss, trainable(model))
    for a, b in zip(found[0], whole, strict=True):
        torch.testing.assert_close(a.mean(0), b, rtol=1e-3, atol=1e-6)


def test_the_probes_see_negatives_of_its_own_whatever_is_declared() -> None:
    job = job_of("simclr", "method.norm=group")
    batches = coupling.inputs(job.data.load().train, job.data.augment, job.method)
    with pytest.raises(PrivacyError, match="act on each other"):
        coupling.probe_alone(job.method, model_of(job), batches)


def test_queue_and_bank_hold_public_examples_and_follow_the_merged_weights() -> None:
    for name in ("moco", "instance"):
        job = public_job(name)
        model = model_of(job)
        held: KeyQueue | KeyBank = model["queue" if name == "moco" else "bank"]
        before = held.keys.clone()
        assert before.norm(dim=1).tolist() == pytest.approx([1.0] * len(before), rel=1e-5)
        twin = model_of(job, 3)
        other = twin["queue" if name == "moco" else "bank"].keys
        assert torch.equal(other, before), "not a function of the client's examples"
        out = job.method.loss(model, batch_of(job, 8), STEP)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape)
        job.method.after_step(model, out, STEP)
        assert torch.equal(held.keys, before), "steps leave it alone"
        public = public_of(job, torch.device("cpu"))
        job.method.after_merge(model, job.data.load().train, public, job.data.augment, STEP)
        assert not torch.allclose(held.keys, before)


def test_a_queue_takes_as_many_public_examples_as_it_holds() -> None:
    job = public_job("moco", "method.queue=7")
    model = model_of(job)
    assert model["queue"].keys.shape == (7, 8)
    assert sorted(model["queue"].index.tolist()) == list(range(7))
    assert job_of("moco").method.public_limit is None


def test_privacy_names_public_negatives_and_refuses_ones_own_as_public(plan: Compose) -> None:
    for name, negatives in (("simclr", "public"), ("moco", "public"), ("instance", "public")):
        with pytest.raises(PrivacyError, match=rf"method\.norm=group method\.negatives={negatives} data@public=NAME"):
            config.compose([f"method={name}", "privacy=example"])
    with pytest.raises(PrivacyError, match="act on each other"):
        config.compose(
            ["method=simclr", "privacy=example", "data@public=synthetic", "method.negatives=public"]
        )  # the head's batch normalisation is left
    own = ["data@public=digits", "public.augment.flip=0.0"]
    base = ["method=simclr", "method.norm=group", "method.negatives=public", "encoder.norm=group"]
    config.compose([*base, *own])
    with pytest.raises(ConfigError, match="the clients' own examples"):
        config.compose([*base, *own, "privacy=example"])


@every
def test_a_private_federation_runs(name: str, plan: Compose) -> None:
    made = plan(f"method={name}", *PUBLIC, "encoder.norm=group", "privacy=example", "privacy.epsilon=4")
    rundir = execute(made)
    said = json.loads((rundir.path / "privacy.json").read_text())
    assert 3.5 < said["epsilon"] <= 4
    assert said["unit"] == "record"
    assert all("loss" not in row for row in rundir.rows("clients.jsonl"))


def test_wrong_options_get_a_sentence() -> None:
    for options, sentence in (
        (("method.negatives=queue",), "use batch or public"),
        (("method.public_batch=0",), "at least 1"),
        (("method.negatives=public",), "reads public examples and there are none"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            job_of("simclr", *options)
    job = public_job("simclr")
    with pytest.raises(ConfigError, match="no public examples beside the batch"):
        job.method.loss(model_of(job), Batch(batch_of(job, 2).views, torch.arange(2)), STEP)
    with pytest.raises(ConfigError, match="use own or public"):
        job_of("moco", "method.negatives=batch")
    assert isinstance(job.privacy, PlainGradient)
