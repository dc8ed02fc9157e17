"""The contract of every method: found by its yaml, so a new method is tested by existing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODALITIES, assert_same, company, fields_of, strategy_of, tiny

from fedssl import config
from fedssl.client import FitResult, Local, fit
from fedssl.errors import ConfigError
from fedssl.evaluation import encode
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.job.setup import build_model, public_of, shares_of
from fedssl.method import Batch, LossOutput, Step
from fedssl.model import Model, load_arrays, pairs, tensors, to_arrays
from fedssl.networks.norms import has_batch_norm
from fedssl.parts import Coupling, Share, part_of
from fedssl.probes import few_label

METHODS = config.options_of("method")
STEP = Step(round=1, rounds=10, step=0, steps=5)
LEARN = ("federation.rounds=1", "local.epochs=10", "local.lr=0.003", "encoder.width=8", "encoder.dim=32")
EASY_SIGNALS = (
    "data.train=600",
    "data.test=300",
    "data.steps=48",
    "data.noise=0.1",
    "data.classes=4",
    "data.subjects=2",
)
LEARNING = {
    "images": ("data=digits", *LEARN),
    "timeseries": ("data=synthetic_signals", *LEARN, *EASY_SIGNALS, "local.epochs=20"),
}
NOT_IN_SECONDS = {("mae", "timeseries"), ("simsiam", "timeseries")}  # docs/methods.md says so


def own(name: str) -> bool:
    """Whether a method is no variant of another one, made for a federated rule."""
    return not strategy_of(name) and name != "fedx"


def job_of(method: str, *overrides: str, modality: str = "images") -> Job:
    return config.compose(tiny(f"method={method}", *overrides, modality=modality)).job


def batch_of(job: Job, n: int, seed: int = 0) -> Batch:
    index = torch.arange(n)
    examples = job.data.load().train.shard(np.arange(n), 0).batch(index)
    views = job.data.augment.views(examples, torch.Generator().manual_seed(seed), job.method.views)
    public = public_of(job, torch.device("cpu")) if job.method.reads_public and job.method.public_batch else None
    if public is None:
        return Batch(views, index)
    rows = torch.arange(min(len(public), job.method.public_batch))
    return Batch(views, index, job.data.augment.plain(public.batch(rows)), rows)


CASES = [(name, modality) for name in METHODS for modality in MODALITIES if modality in job_of(name).method.modalities]
every_case = pytest.mark.parametrize(("name", "modality"), CASES)


def model_of(job: Job, n: int = 16) -> Model:
    """A model as a client has it before its first step: banks are filled."""
    train = job.data.load().train
    model = build_model(job, train.shape, n).train()
    public = public_of(job, torch.device("cpu")) if job.method.reads_public else None
    job.method.after_merge(model, train.shard(np.arange(n), 0), public, job.data.augment, STEP)
    return model


class Precise:
    """Examples in float64, where what is not a mistake is small."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: torch.Tensor) -> Any:
        return self.data.batch(index).double()


def fit_one(
    job: Job, model: Model, *, n: int = 16, round: int = 1, local: Local | None = None, precise: bool = False
) -> FitResult:
    shard: Any = job.data.load().train.shard(np.arange(n), 0)
    public: Any = public_of(job, torch.device("cpu"))
    if precise:
        shard, public = Precise(shard), None if public is None else Precise(public)
    return fit(
        job.method,
        model,
        shard,
        job.data.augment,
        local or job.local,
        gradient=PlainGradient(),
        round=round,
        rounds=job.federation.rounds,
        seed=job.seed,
        client=0,
        public=public,
    )


@every_case
def test_declared_parts_are_the_models_parts(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    model = model_of(job)
    assert [part.name for part in job.method.parts] == list(model.keys())
    for part in job.method.parts:
        assert set(part.follows) <= set(model.keys())
    shares = shares_of(job, model)
    assert shares.keys() == dict(tensors(model)).keys()
    share = Share(job.ownership.get("encoder", "merge"))
    assert all(shares[f"encoder.{k}"] is share for k, _ in tensors(model["encoder"]))


@every_case
def test_gradients_reach_exactly_the_trainable_parts(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    model = model_of(job)
    job.method.loss(model, batch_of(job, 8), STEP).loss.backward()
    trainable = {part.name for part in job.method.parts if part.trainable}
    for key, parameter in model.named_parameters():
        if part_of(key) in trainable:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None, key
    reached = {part_of(k) for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == trainable


@pytest.mark.parametrize("encoder_norm", ["group", "batch"])
@every_case
def test_the_loss_changes_nothing(name: str, modality: str, encoder_norm: str) -> None:
    options = [f"encoder.norm={encoder_norm}"] if modality != "pairs" else []
    job = job_of(name, *options, modality=modality)
    model, batch = model_of(job), batch_of(job, 8)
    before = to_arrays(model)
    first = job.method.loss(model, batch, STEP)
    second = job.method.loss(model, batch, STEP)
    assert_same(before, to_arrays(model))
    assert torch.equal(first.loss, second.loss)


@every_case
def test_the_output_keeps_its_contract(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    model = model_of(job)
    out: LossOutput = job.method.loss(model, batch_of(job, 6), STEP)
    assert out.loss.shape == ()
    assert out.features.shape == (6, 8)
    assert out.features.requires_grad, "regularisers read it"
    assert not any(value.requires_grad for value in out.aux.values())
    assert (out.per_example is not None) == (job.method.coupling is Coupling.none)
    if out.per_example is not None:
        assert out.per_example.shape == (6,)
        torch.testing.assert_close(out.per_example.mean(), out.loss)


def coupled(job: Job) -> bool:
    """Whether changing one example moves the loss of another, seen through the gradient at the encoder's outputs."""
    model = model_of(job)
    batch = batch_of(job, 6)
    views = [view.clone().requires_grad_() for view in batch.views]
    out = job.method.loss(model, replace(batch, views=views), STEP)
    assert out.per_example is not None
    out.per_example[0].backward()
    return any(bool((view.grad[1:] != 0).any()) for view in views if view.grad is not None)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_declared_coupling_none_is_true(name: str, norm: str) -> None:
    job = job_of(name, f"method.norm={norm}")
    if job.method.coupling is not Coupling.none:
        pytest.skip("this method couples examples and says so")
    assert not coupled(job)


def test_the_coupling_check_sees_a_hidden_batch_norm() -> None:
    job = job_of("byol", "method.norm=group", "encoder.norm=batch")
    assert coupled(job), "batch normalisation in the encoder couples examples"


@every_case
def test_teachers_move_towards_not_onto_the_student(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    model = model_of(job)
    followers = [part for part in job.method.parts if part.follows]
    if not followers:
        pytest.skip("no teacher")
    for part in followers:
        assert all(torch.equal(a, b) for a, b in pairs(model, part)), "a teacher starts equal to its student"
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs(model, part)), "but it is another object"
    out = job.method.loss(model, batch_of(job, 8), STEP)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    job.method.after_step(model, out, STEP)
    for part in followers:
        for teacher, student in pairs(model, part):
            if teacher.is_floating_point() and isinstance(student, torch.nn.Parameter):
                gap = (student - teacher).mean().item()
                if part.teaches:
                    assert 0.5 < gap < 1.0, "a decay near 1 keeps most of the teacher"
                else:
                    assert gap == pytest.approx(1.0), "a frozen copy stays where it is"


@every_case
def test_the_state_survives_arrays(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    model = model_of(job)
    fit_one(job, model)
    twin = model_of(job)
    load_arrays(twin, to_arrays(model))
    assert_same(to_arrays(model), to_arrays(twin))


@pytest.mark.parametrize(("name", "modality"), [case for case in CASES if case[1] == "images" or own(case[0])])
def test_the_loss_falls(name: str, modality: str) -> None:
    """Measured without learning before and after, for long enough that queues are full both times."""
    short = ["method.queue=64"] if "queue" in fields_of(name) else []
    options = [*short, "local.epochs=16", "federation.rounds=1", "local.lr=0.01", "local.warmup=0"]
    job = job_of(name, *options, modality=modality)
    model, still = model_of(job, 32), Local(epochs=6, batch_size=16, lr=1e-12)
    fit_one(job, model, n=32, local=still)
    before = fit_one(job, model, n=32, local=still).loss
    fit_one(job, model, n=32)
    assert fit_one(job, model, n=32, local=still).loss < before - 0.02


@pytest.mark.parametrize("n", [1, 2, 9])
@every_case
def test_small_clients_train_or_are_refused(name: str, modality: str, n: int) -> None:
    job = job_of(name, "local.batch_size=8", modality=modality)
    if n == 1 and has_batch_norm(model_of(job)):
        with pytest.raises(ConfigError, match="norm=group"):
            fit_one(job, model_of(job, n), n=n)
        return
    model = model_of(job, n)
    result = fit_one(job, model, n=n)
    assert result.examples == n
    assert result.steps == -(-n // 8)
    assert np.isfinite(result.loss)
    assert all(torch.isfinite(value).all() for _, value in tensors(model))


def test_one_example_has_nothing_to_contrast() -> None:
    job = job_of("simclr", "method.norm=none")
    model = model_of(job, 1)
    before = to_arrays(model)
    assert fit_one(job, model, n=1, local=Local(weight_decay=0.0)).loss == 0.0
    assert_same(before, to_arrays(model))


@every_case
def test_bf16_trains(name: str, modality: str) -> None:
    job = job_of(name, "local.precision=bf16", modality=modality)
    model = model_of(job)
    assert np.isfinite(fit_one(job, model).loss)
    assert all(value.dtype != torch.bfloat16 for _, value in tensors(model)), "the weights stay float32"


@every_case
def test_local_training_is_a_function_of_its_seeds(name: str, modality: str) -> None:
    job = job_of(name, modality=modality)
    a, b, c = model_of(job), model_of(job), model_of(job)
    torch.rand(17)  # the global generator must not matter
    assert fit_one(job, a) == fit_one(job, b)
    assert_same(to_arrays(a), to_arrays(b))
    fit_one(job, c, round=2)
    assert any((x != y).any() for x, y in zip(to_arrays(a).values(), to_arrays(c).values(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_constructor_refuses_widths_that_make_no_head(name: str) -> None:
    with pytest.raises(ConfigError):
        model_of(job_of(name, "method.hidden=0"))


QUICK = [(name, "images") for name in ("simclr", "simsiam", "vicreg")]  # the others: `make test-all`


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in CASES
        if case[1] in LEARNING and case not in NOT_IN_SECONDS and (case[1] == "images" or own(case[0]))
    ],
)
def test_learning_beats_the_random_encoder(name: str, modality: str) -> None:
    """In seconds, read with two labels a class."""
    job = config.compose([f"method={name}", *company(name, LEARNING[modality]), *LEARNING[modality]]).job
    data = job.data.load()
    model = build_model(job, data.train.shape, len(data.train))

    def accuracy() -> float:
        parts = (data.train, data.test)
        x, held = (encode(model["encoder"], part, np.arange(len(part)), job.data.augment).numpy() for part in parts)
        return few_label(x, data.train.targets, held, data.test.targets, per_class=2, repeats=10, seed=0).mean

    before = accuracy()
    fit_one(job, model, n=len(data.train))
    after = accuracy()
    assert after > before + 0.03, f"{after:.3f} after, {before:.3f} before"


def test_senseless_combinations_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="MaskedAutoencoder makes no sense on graphs"):
        job_of("mae", modality="graphs")
    with pytest.raises(ConfigError, match="Conv4 reads images and SyntheticSignals gives timeseries"):
        config.compose(["data=synthetic_signals", "encoder=conv4"])
    with pytest.raises(ConfigError, match="local_views"):
        job_of(
            "dino",
            "method.local_views=2",
            modality="pairs" if "pairs" in MODALITIES else "images",
        )


def test_golden_losses() -> None:
    """One short run of each method, against values noted when it was first right: a guard against silent changes.

    In float64: in float32 rounding differs between processors, and training amplifies it to percents.
    """
    from pathlib import Path

    path = Path(__file__).parent / "golden_losses.json"
    golden: dict[str, Any] = json.loads(path.read_text())
    measured = {}
    for name in METHODS:
        job = job_of(name, "local.epochs=4")
        measured[name] = round(fit_one(job, model_of(job, 24).double(), n=24, precise=True).loss, 5)
    assert measured.keys() == golden.keys(), f"add the new method's value to {path.name}: {measured}"
    for name, value in measured.items():
        assert value == pytest.approx(golden[name], rel=1e-4, abs=1e-4), name
