"""Mechanisms shared by methods: gradient caching, FedDecorr, paces of teachers, adaptive weights, temperature rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays, tiny
from test_methods import METHODS, STEP, batch_of, fit_one, job_of, model_of
from torch import Tensor

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient, cached_backward
from fedssl.losses import decorrelation
from fedssl.method import Batch, Step
from fedssl.methods.common.decorrelated import Decorrelated
from fedssl.model import pairs, tensors, to_arrays
from fedssl.networks.teacher import TEACHER, Pace, follow
from fedssl.parts import Coupling

Compose = Callable[..., Plan]


def gradients(job: Any, size: int | None, n: int = 7) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, by the whole batch or in pieces."""
    model = model_of(job).double()
    drawn = batch_of(job, n)
    batch = Batch([view.double() for view in drawn.views], drawn.index)
    if size is None:
        out = job.method.loss(model, batch, STEP)
        out.loss.backward()
    else:
        out = cached_backward(job.method, model, batch, STEP, size)
    return out.loss.item(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_caching_gives_the_same_gradient(name: str, size: int) -> None:
    job = job_of(name)
    loss, whole = gradients(job, None)
    cached_loss, cached = gradients(job, size)
    assert cached_loss == pytest.approx(loss, rel=1e-12)
    assert cached.keys() == whole.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(cached[key], gradient, rtol=1e-9, atol=1e-11, msg=key)


def test_gradient_caching_holds_few_activations() -> None:
    """The encoder never sees more examples with a graph than a piece has."""
    job = job_of("simclr")
    model = model_of(job)
    seen: list[tuple[int, bool]] = []
    model["encoder"].register_forward_hook(lambda _m, x, _y: seen.append((len(x[0]), torch.is_grad_enabled())))
    cached_backward(job.method, model, batch_of(job, 10), STEP, 4)
    assert [count for count, graph in seen if graph] == [4, 4, 2, 4, 4, 2]
    assert [count for count, graph in seen if not graph] == [4, 4, 2, 4, 4, 2]


def test_micro_batches_train_the_same_model(plan: Compose) -> None:
    plain = ("local.optimizer=sgd", "local.momentum=0")  # an adaptive step makes a whole one of a gradient's rounding
    whole = final_arrays(execute(plan(*plain, name="whole")))
    pieces = final_arrays(execute(plan(*plain, "privacy.micro_batch=3", name="pieces")))
    for key, value in whole.items():
        np.testing.assert_allclose(pieces[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_micro_batches_refuse_batch_norm_in_the_encoder(plan: Compose) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.norm=group"):
        execute(plan("privacy.micro_batch=3", "encoder.norm=batch"))
    with pytest.raises(ConfigError, match="at least 1"):
        PlainGradient(micro_batch=0)


@pytest.mark.parametrize("name", METHODS)
def test_decorrelation_adds_its_term_to_any_method(name: str) -> None:
    plain, added = job_of(name), job_of(name, "local.decorrelation=0.5")
    assert isinstance(added.method, Decorrelated)
    assert added.method.coupling is not Coupling.none
    model, batch = model_of(plain), batch_of(plain, 8)
    a, b = plain.method.loss(model, batch, STEP), added.method.loss(model, batch, STEP)
    assert b.per_example is None
    torch.testing.assert_close(b.loss, a.loss + 0.5 * decorrelation(a.features))
    torch.testing.assert_close(b.aux["decorrelation"], decorrelation(a.features).detach())
    for parameter in model.parameters():
        parameter.grad = None
    (b.loss - a.loss).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model["encoder"].parameters())


def test_decorrelation_works_in_a_run_and_refuses_nonsense(plan: Compose) -> None:
    rows = execute(plan("method=byol", "local.decorrelation=0.1")).rows("clients.jsonl")
    assert all(row["decorrelation"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="rewards correlation"):
        plan("local.decorrelation=-1")


def test_an_adaptive_teacher_is_faster_where_the_loss_is_more_curved() -> None:
    pace = Pace()
    for _ in range(50):
        assert pace.decay(torch.tensor(2.0), 0.99).item() == pytest.approx(0.99)
    assert pace.decay(torch.tensor(4.0), 0.99).item() == pytest.approx(1 - 0.01 * 4 / pace.mean.item(), rel=1e-5)
    assert pace.decay(torch.tensor(1e9), 0.99).item() == pytest.approx(1 - 0.01 * 4), "at most 4 times faster"
    assert pace.decay(torch.tensor(0.0), 0.99).item() == pytest.approx(1 - 0.01 / 4), "at most 4 times slower"
    assert Pace().decay(torch.tensor(0.0), 0.5).item() == pytest.approx(0.5), "a flat loss has no curvature to compare"
    fast = Pace()
    fast.decay(torch.tensor(1.0), 0.0)
    assert 0 <= fast.decay(torch.tensor(1e9), 0.0).item() <= 1


@pytest.mark.parametrize("method", ["byol", "moco", "dino"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "adaptive"])
def test_every_teacher_takes_every_schedule(method: str, schedule: str, plan: Compose) -> None:
    made = plan(f"method={method}", f"method.decay_schedule={schedule}")
    assert ("pace" in [part.name for part in made.job.method.parts]) == (schedule == "adaptive")
    model = model_of(made.job)
    fit_one(made.job, model)
    moved = [not torch.equal(a, b) for a, b in pairs(model, TEACHER) if a.is_floating_point()]
    assert any(moved)
    with pytest.raises(ConfigError, match="decay_schedule"):
        plan(f"method={method}", "method.decay_schedule=linear")


def test_a_constant_teacher_is_the_weighted_mean_of_past_students() -> None:
    """Closed form: teacher = m^t initial + (1 - m) sum_k m^(t - 1 - k) student_k."""
    model = model_of(job_of("byol", "method.norm=none")).double()
    decay, steps = 0.9, 12
    generator = torch.Generator().manual_seed(0)
    expected = {key: decay**steps * value.detach().clone() for key, value in tensors(model["teacher"])}
    for k in range(steps):
        with torch.no_grad():
            for part in TEACHER.follows:
                for key, value in tensors(model[part]):
                    value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
                    expected[f"{part}.{key}"] += (1 - decay) * decay ** (steps - 1 - k) * value
        follow(model, Step(1, 1, k, steps), decay, "constant")
    for key, value in tensors(model["teacher"]):
        torch.testing.assert_close(value, expected[key])


def test_adaptive_weights_rise_only_while_views_drift_apart_and_variance_falls() -> None:
    from fedssl.methods.vicreg import Balance

    base = (25.0, 25.0, 1.0)
    balance = Balance(base)

    def run(steps: int, invariance: Callable[[int], float], hinge: Callable[[int], float]) -> Tensor:
        for i in range(steps):
            balance.update(torch.tensor(invariance(i)), torch.tensor(hinge(i)), base, 4.0)
        return balance.weights.clone()

    assert torch.equal(run(30, lambda i: 1.0, lambda i: 0.2), torch.tensor(base)), "nothing happens: the base weights"
    assert torch.equal(run(30, lambda i: 1.0 + 0.1 * i, lambda i: 0.2), torch.tensor(base)), "one sign is not enough"
    risen = run(60, lambda i: 4.0 + 0.1 * i, lambda i: 0.2 + 0.01 * i)
    assert risen[0] > 25 * 1.5
    assert risen[1] >= risen[0]
    assert risen[2].item() == pytest.approx((risen[0].item() / 25) ** 0.5, rel=1e-5), "moderate"
    assert run(300, lambda i: 11.0 + i, lambda i: 1.0 + i)[0].item() == pytest.approx(100.0), "at most 4 times the base"
    assert torch.allclose(run(400, lambda i: 0.1, lambda i: 0.0), torch.tensor(base)), "and back"


def test_adaptive_vicreg_runs_and_reports(plan: Compose) -> None:
    rows = execute(plan("method=vicreg", "method.balance=adaptive")).rows("clients.jsonl")
    assert all({"invariance", "variance", "covariance", "invariance_weight"} <= row.keys() for row in rows)
    with pytest.raises(ConfigError, match="fixed or adaptive"):
        plan("method=vicreg", "method.balance=auto")


@pytest.mark.parametrize("word", ["cosine", "target_probability", "max_snr", "auto"])
@pytest.mark.parametrize("method", ["simclr", "moco", "instance", "sigmoid"])
def test_a_temperature_can_be_a_rule(method: str, word: str) -> None:
    job = job_of(method, f"method.temperature={word}")
    model = model_of(job)
    out = job.method.loss(model, batch_of(job, 8), STEP)
    assert torch.isfinite(out.loss)
    result = fit_one(job, model)
    assert np.isfinite(result.loss)
    if word != "cosine":
        assert 0.0099 < result.measures["temperature"] < 10.1
    with pytest.raises(ConfigError, match="temperature"):
        job_of(method, "method.temperature=warm")


def test_a_chosen_temperature_is_reported_for_each_client(plan: Compose) -> None:
    rows = execute(plan("method.temperature=target_probability")).rows("clients.jsonl")
    assert len({row["temperature"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("simsiam", "method.predictor=false"),
        ("simsiam", "method.stop_gradient=false"),
        ("simsiam", "method.similarity=dot"),
        ("byol", "method.predictor=false"),
        ("byol", "method.similarity=dot"),
        ("simclr", "method.similarity=dot"),
        ("moco", "method.similarity=dot"),
    ],
)
def test_ablations_change_the_loss_and_keep_the_contract(method: str, option: str) -> None:
    plain, ablated = job_of(method), job_of(method, option)
    a, b = (job.method.loss(model_of(job), batch_of(job, 8), STEP) for job in (plain, ablated))
    if option != "method.stop_gradient=false":
        assert a.loss.item() != b.loss.item()
    model = model_of(ablated)
    assert [part.name for part in ablated.method.parts] == list(model.keys())
    fit_one(ablated, model)
    assert all(torch.isfinite(value).all() for _, value in tensors(model))


def test_without_the_stop_gradient_both_sides_learn() -> None:
    """The gradient at the projector differs, the loss does not."""
    grads = []
    for option in ("true", "false"):
        job = job_of("simsiam", f"method.stop_gradient={option}")
        model = model_of(job)
        out = job.method.loss(model, batch_of(job, 8), STEP)
        out.loss.backward()
        grads.append((out.loss.item(), model["projector"][0].weight.grad.clone()))
    assert grads[0][0] == pytest.approx(grads[1][0])
    assert not torch.allclose(grads[0][1], grads[1][1])


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dino",)])
def test_heads_have_the_depth_that_is_asked_for(name: str, layers: int) -> None:
    job = job_of(name, f"method.layers={layers}", "method.norm=layer")
    head = model_of(job)["decoder" if name == "mae" else "projector"]
    assert sum(isinstance(module, torch.nn.Linear) for module in head.modules()) == layers
    assert fit_one(job, model_of(job)).steps > 0


def test_tiny_options_fit_every_method() -> None:
    for name in METHODS:
        config.compose(tiny(f"method={name}"))
    assert to_arrays(model_of(job_of("mae")))
